#!/usr/bin/env python3
"""A bucket for measurements: it speaks as much S3 as an upload needs, and keeps nothing of what is uploaded in parts.

    python3 tests/bucket.py [CERTIFICATE KEY]

It prints the address it listens on, over TLS with a certificate, and ends with its standard input: then it prints how many
requests and bytes there were. The `ETag` of a part is its MD5; the one that a part promises (`Content-MD5`) is taken at its word, so that
a measurement is not one of this program.
"""

import base64
import collections
import hashlib
import json
import ssl

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

objects = {}
uploads = {}
counts = collections.Counter()
PAGE = 1000
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
        what = "page" if "list-type" in parts.query else "part" if "partNumber" in parts.query else "object"
        counts[f"{self.command} {what}"] += 1
        return parts.path, {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}

    def swallow(self):
        """The body if it is small, and its MD5."""
        left, kept = int(self.headers.get("Content-Length", 0)), []
        keeps, promised, md5 = left <= 1 << 20, self.headers.get("Content-MD5"), hashlib.md5()
        while left:
            count = self.rfile.readinto1(memoryview(buffers.own)[:left])
            if not count:
                raise ConnectionError("the body ended early")
            if keeps:
                kept.append(bytes(buffers.own[:count]))
            if not promised:
                md5.update(memoryview(buffers.own)[:count])
            left -= count
            counts["bytes"] += count
        return b"".join(kept), base64.b64decode(promised).hex() if promised else md5.hexdigest()

    def do_GET(self):
        key, query = self.asked()
        if "uploads" in query:
            self.xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>")
        elif "list-type" in query:
            prefix, after = f"/bucket/{query.get('prefix', '')}", query.get("continuation-token", "")
            listed = sorted((key, one[0]) for key, one in objects.items() if key.startswith(prefix) and key > after)
            found = "".join(
                f"<Contents><Key>{key.split('/', 2)[2]}</Key><Size>{size}</Size><ETag>\"e\"</ETag></Contents>"
                for key, size in listed[:PAGE]
            )
            more = len(listed) > PAGE
            token = f"<NextContinuationToken>{listed[PAGE - 1][0]}</NextContinuationToken>" if more else ""
            self.xml("ListBucketResult", f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{found}")
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
        body, md5 = self.swallow()
        size = int(self.headers["Content-Length"])
        if "partNumber" in query:
            uploads[query["uploadId"]][1] += size
        else:
            objects[key] = (size, body, None)
        self.answer(ETag=f'"{md5}"')

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
        self.asked()
        self.answer(204)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def finish_request(self, request, address):
        # In the thread of the connection: a slow handshake keeps no other waiting.
        if tls:
            request = tls.wrap_socket(request, server_side=True)
        super().finish_request(request, address)

    def handle_error(self, *_):
        if not isinstance(sys.exception(), (ConnectionError, ssl.SSLError)):
            super().handle_error(*_)


tls = None
if len(sys.argv) > 2:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(sys.argv[1], sys.argv[2])
server = Server(("127.0.0.1", 0), Bucket)
threading.Thread(target=server.serve_forever, daemon=True).start()
scheme = "https" if tls else "http"
print(f"{scheme}://127.0.0.1:{server.server_port}", flush=True)
sys.stdin.read()
print(json.dumps(counts), flush=True)
