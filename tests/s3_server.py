"""Serves moto's S3 on a free port of this machine, with the bucket `bucket`, until its standard input ends.

Prints its address. Each line that comes in asks what boto3 sees there, and is answered by a line of JSON.
"""

import hashlib
import json
import logging
import sys

import boto3
from moto.server import ThreadedMotoServer

logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
host, port = server.get_host_and_port()
endpoint = f"http://{host}:{port}"
s3 = boto3.client(
    "s3",
    endpoint_url=endpoint,
    region_name="us-east-1",
    aws_access_key_id="EXO1",
    aws_secret_access_key="hush",
)
s3.create_bucket(Bucket="bucket")
print(endpoint, flush=True)


def objects():
    found = {}
    for page in s3.get_paginator("list_objects_v2").paginate(Bucket="bucket"):
        for listed in page.get("Contents", []):
            got = s3.get_object(Bucket="bucket", Key=listed["Key"])
            md5 = hashlib.md5()
            for chunk in got["Body"].iter_chunks(1 << 20):
                md5.update(chunk)
            found[listed["Key"]] = {
                "bytes": listed["Size"],
                "md5": md5.hexdigest(),
                "metadata": got["Metadata"],
                "etag": listed["ETag"],
            }
    return found


def uploads():
    listed = s3.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    return [upload["Key"] for upload in listed]


for line in sys.stdin:
    print(json.dumps({"objects": objects, "uploads": uploads}[line.strip()]()), flush=True)
server.stop()
