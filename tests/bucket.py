#!/usr/bin/env python3
"""A bucket for measurements: it speaks as much S3 as an upload needs, and keeps nothing of what is uploaded in parts.

    python3 tests/bucket.py

It prints the address it listens on, and ends with its standard input.
"""

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

objects = {}
uploads = {}
buffers = threading.local()


class Bucket(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self):
        super().setup()
        buffers.own = bytearray(1 << 20)

    def log_message(self, *_):
        pass

    def answer(self, status=200, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", len(body))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def xml(self, root, inner):
        self.answer(body=f'<?xml version="1.0"?><{root}>{inner}</{root}>'.encode())

    def asked(self):
        parts = urlsplit(self.path)
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}

    def swallow(self):
        left, kept = int(self.headers.get("Content-Length", 0)), []
        keeps = left <= 1 << 20
        while left:
            count = self.rfile.readinto1(memoryview(buffers.own)[:left])
            if keeps:
                kept.append(bytes(buffers.own[:count]))
            left -= count
        return b"".join(kept)

    def do_GET(self):
        key, query = self.asked()
        if "uploads" in query:
            self.xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>")
        elif "list-type" in query:
            found = "".join(
                f"<Contents><Key>{key.split('/', 2)[2]}</Key><Size>{size}</Size><ETag>\"e\"</ETag></Contents>"
                for key, (size, _, _) in sorted(objects.items())
            )
            self.xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{found}")
        elif key in objects:
            self.answer(body=objects[key][1], ETag='"e"')
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    def do_HEAD(self):
        key, _ = self.asked()
        if key not in objects:
            return self.answer(404)
        size, _, md5 = objects[key]
        self.answer(Content_Length=size, ETag='"e"', **({"x_amz_meta_md5": md5} if md5 else {}))

    def do_PUT(self):
        key, query = self.asked()
        body = self.swallow()
        size = int(self.headers["Content-Length"])
        if "partNumber" in query:
            uploads[query["uploadId"]][1] += size
        else:
            objects[key] = (size, body, None)
        self.answer(ETag='"e"')

    def do_POST(self):
        key, query = self.asked()
        self.swallow()
        if "uploads" in query:
            upload = f"upload-{len(uploads)}"
            uploads[upload] = [self.headers.get("x-amz-meta-md5"), 0]
            self.xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        else:
            md5, size = uploads[query["uploadId"]]
            objects[key] = (size, b"", md5)
            self.xml("CompleteMultipartUploadResult", '<ETag>"e"</ETag>')

    def do_DELETE(self):
        self.answer(204)


server = ThreadingHTTPServer(("127.0.0.1", 0), Bucket)
threading.Thread(target=server.serve_forever, daemon=True).start()
print(f"http://127.0.0.1:{server.server_port}", flush=True)
sys.stdin.read()
