"""Serves S3 on a free port of this machine, with the bucket `bucket`, until its standard input ends.

It is moto's server, or the one that the command in SNAPWARDEN_S3_SERVER starts, in which {port} and {folder} are filled in; it
takes the key EXO1 with the secret hush-hush-hush.

Prints its address. Each line that comes in asks what boto3 sees there, and is answered by a line of JSON.
"""

import hashlib
import json
import logging
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time

import boto3
from botocore.exceptions import ClientError
from moto.server import ThreadedMotoServer


def moto():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    return server.get_host_and_port()[1], server.stop


def other(command):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = tempfile.TemporaryDirectory()
    words = [word.format(port=port, folder=folder.name) for word in shlex.split(command)]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop():
        server.terminate()
        server.wait()
        folder.cleanup()

    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return port, stop
        except ConnectionRefusedError:
            time.sleep(0.05)
    sys.exit("the server does not listen")


command = os.environ.get("SNAPWARDEN_S3_SERVER")
port, stop = other(command) if command else moto()
endpoint = f"http://127.0.0.1:{port}"
s3 = boto3.client(
    "s3",
    endpoint_url=endpoint,
    region_name="us-east-1",
    aws_access_key_id="EXO1",
    aws_secret_access_key="hush-hush-hush",
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
                "etag": got["ETag"],
            }
    return found


def uploads():
    try:
        listed = s3.list_multipart_uploads(Bucket="bucket").get("Uploads", [])
    except ClientError as error:
        if error.response["Error"]["Code"] == "NotImplemented":
            return None
        raise
    return [upload["Key"] for upload in listed]


def versions():
    s3.put_bucket_versioning(Bucket="bucket", VersioningConfiguration={"Status": "Enabled"})


for line in sys.stdin:
    print(json.dumps({"objects": objects, "uploads": uploads, "versions": versions}[line.strip()]()), flush=True)
stop()
