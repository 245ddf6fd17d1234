"""Serves S3 on a free port of this machine, with the bucket `bucket`, until its standard input ends.

It is moto's server, or the one that the command in SNAPWARDEN_S3_SERVER starts, in which {port} and {folder} are filled in; it
takes the key EXO1 with the secret hush-hush-hush. Or it is one that runs already: SNAPWARDEN_S3_ENDPOINT has its address, a key,
its secret and a region, with blanks between. There the bucket is made, and removed in the end with all that is in it: one that is
there before is left alone, and nothing begins.

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


endpoint, key, secret, region = None, "EXO1", "hush-hush-hush", "us-east-1"
running = os.environ.get("SNAPWARDEN_S3_ENDPOINT")
command = os.environ.get("SNAPWARDEN_S3_SERVER")
if running:
    endpoint, key, secret, region = running.split()
    stop = lambda: remove_bucket()
else:
    port, stop = other(command) if command else moto()
    endpoint = f"http://127.0.0.1:{port}"
s3 = boto3.client(
    "s3",
    endpoint_url=endpoint,
    region_name=region,
    aws_access_key_id=key,
    aws_secret_access_key=secret,
)
if running and "bucket" in [bucket["Name"] for bucket in s3.list_buckets()["Buckets"]]:
    sys.exit("there is a bucket `bucket` already")
s3.create_bucket(Bucket="bucket")
print(endpoint, flush=True)


def remove_bucket():
    for page in s3.get_paginator("list_object_versions").paginate(Bucket="bucket"):
        for listed in page.get("Versions", []) + page.get("DeleteMarkers", []):
            s3.delete_object(Bucket="bucket", Key=listed["Key"], VersionId=listed["VersionId"])
    for upload in s3.list_multipart_uploads(Bucket="bucket").get("Uploads", []):
        s3.abort_multipart_upload(Bucket="bucket", Key=upload["Key"], UploadId=upload["UploadId"])
    s3.delete_bucket(Bucket="bucket")


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


# The bucket of the last `locked`.
locked_bucket = None


def locked():
    """A new bucket in which objects can be locked."""
    global locked_bucket
    locked_bucket = f"locked-{time.time_ns()}"
    s3.create_bucket(Bucket=locked_bucket, ObjectLockEnabledForBucket=True)
    return {"bucket": locked_bucket, "key": key, "secret": secret, "region": region}


def every_version():
    for page in s3.get_paginator("list_object_versions").paginate(Bucket=locked_bucket):
        for listed in page.get("Versions", []):
            yield listed, True
        for listed in page.get("DeleteMarkers", []):
            yield listed, False


def kept():
    """Every version that has bytes, with their MD5 and its lock."""
    found = {}
    for listed, has_bytes in every_version():
        if has_bytes:
            of = {"Bucket": locked_bucket, "Key": listed["Key"], "VersionId": listed["VersionId"]}
            got = s3.get_object(**of)
            until = got.get("ObjectLockRetainUntilDate")
            found[f"{listed['Key']} {listed['VersionId']}"] = {
                "md5": hashlib.md5(got["Body"].read()).hexdigest(),
                "bytes": listed["Size"],
                "mode": got.get("ObjectLockMode"),
                "until": until and until.timestamp(),
                "is_latest": listed["IsLatest"],
            }
    return found


def enemy():
    """What somebody does who has the program's key: shortens and deletes every version, then hides and overwrites every object.
    How many of each the store let pass."""
    done = {"shortened": 0, "deleted": 0, "hidden": 0, "overwritten": 0}

    def attempt(name, call, **arguments):
        try:
            call(Bucket=locked_bucket, **arguments)
            done[name] += 1
        except ClientError:
            pass

    keys = set()
    for listed, _ in list(every_version()):
        of = {"Key": listed["Key"], "VersionId": listed["VersionId"]}
        keys.add(listed["Key"])
        soon = {"RetainUntilDate": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 5))}
        for bypass in [False, True]:
            for mode in ["GOVERNANCE", "COMPLIANCE"]:
                retention = {"Mode": mode} | soon
                attempt("shortened", s3.put_object_retention, Retention=retention, BypassGovernanceRetention=bypass, **of)
            attempt("deleted", s3.delete_object, BypassGovernanceRetention=bypass, **of)
    for name in keys:
        attempt("overwritten", s3.put_object, Key=name, Body=b"overwritten")
        attempt("hidden", s3.delete_object, Key=name)
    return done


def mend():
    """Deletes what the enemy put above the versions that are locked, as the owner of the bucket does."""
    for listed, has_bytes in list(every_version()):
        of = {"Bucket": locked_bucket, "Key": listed["Key"], "VersionId": listed["VersionId"]}
        if not has_bytes or listed["Size"] == len(b"overwritten"):
            s3.delete_object(**of)


answers = [objects, uploads, versions, locked, kept, enemy, mend]
for line in sys.stdin:
    print(json.dumps({answer.__name__: answer for answer in answers}[line.strip()]()), flush=True)
stop()
