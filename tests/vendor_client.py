"""Drives the simulated zone with the vendor's own Python client, as it is.

Every answer is held against the OpenAPI document that travels with that client. Started by
`tests/all/vendor_client.rs` with ENDPOINT (with `{zone}`), API_KEY and API_SECRET in the environment.
"""

import hashlib
import os
import re
import uuid
from datetime import datetime

import requests
from exoscale.api.exceptions import (
    ExoscaleAPIAuthException,
    ExoscaleAPIClientException,
    ExoscaleAPIServerException,
)
from exoscale.api.v2 import Client, api_spec

ENDPOINT = os.environ["ENDPOINT"]
ZONE, OTHER = "ch-gva-2", "de-fra-1"


def endpoint(zone):
    return ENDPOINT.replace("{zone}", zone)


def schema_of(operation_id):
    for path in api_spec["paths"].values():
        for operation in path.values():
            if operation["operationId"] == operation_id:
                return operation["responses"]["200"]["content"]["application/json"]["schema"]
    raise AssertionError(f"no operation {operation_id}")


def validate(value, schema, place):
    """Holds a value against a schema; a field that the schema does not know is an error too."""
    while "$ref" in schema:
        schema = api_spec["components"]["schemas"][schema["$ref"].rsplit("/", 1)[1]]
    types = {"object": dict, "array": list, "string": str, "integer": int, "boolean": bool}
    kind = schema.get("type", "object")
    assert isinstance(value, types[kind]), f"{place}: {value!r} is no {kind}"
    assert kind != "integer" or not isinstance(value, bool), f"{place}: {value!r} is no integer"
    if "enum" in schema:
        assert value in schema["enum"], f"{place}: {value!r} is none of {schema['enum']}"
    if kind == "string":
        assert schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 30), place
        if schema.get("format") == "uuid":
            assert str(uuid.UUID(value)) == value, place
        if schema.get("format") == "date-time":
            datetime.strptime(value, "%Y-%m-%dT%H:%M:%SZ")
    if kind == "integer":
        assert schema.get("minimum", value) <= value <= schema.get("maximum", value), f"{place}: {value}"
    if kind == "array":
        for number, entry in enumerate(value):
            validate(entry, schema["items"], f"{place}[{number}]")
    if kind == "object" and "properties" in schema:
        for name in schema.get("required", []):
            assert name in value, f"{place}: no {name}"
        for name, entry in value.items():
            assert name in schema["properties"], f"{place}: the schema has no {name}"
            validate(entry, schema["properties"][name], f"{place}.{name}")


def call(client, operation_id, **arguments):
    answer = getattr(client, operation_id.replace("-", "_"))(**arguments)
    validate(answer, schema_of(operation_id), operation_id)
    return answer


def finished(client, operation):
    done = client.wait(operation["id"], max_wait_time=60)
    validate(done, schema_of("get-operation"), "get-operation")
    assert done["state"] == "success", done
    return done["reference"]["id"]


def refused(kind, text, attempt):
    try:
        attempt()
    except kind as error:
        assert text in str(error), error
    else:
        raise AssertionError(f"not refused: {text}")


client = Client(os.environ["API_KEY"], os.environ["API_SECRET"], url=endpoint(ZONE))

zones = call(client, "list-zones")["zones"]
assert [zone["name"] for zone in zones] == [ZONE, OTHER], zones
assert zones[0]["api-endpoint"] == endpoint(ZONE), zones

[instance] = call(client, "list-instances")["instances"]
assert instance["labels"] == {"backup": "nightly"}, instance
got = call(client, "get-instance", id=instance["id"])
[listed] = call(client, "list-snapshots")["snapshots"]
assert got["snapshots"] == [{"id": listed["id"]}], got
assert listed["state"] == "exported" and listed["instance"] == {"id": instance["id"]}, listed
assert listed["application-consistent"] is False and "export" not in listed, listed
assert re.fullmatch(r"web-1_ROOT-\d+_\d{14}", listed["name"]), listed

operation = call(client, "export-snapshot", id=listed["id"])
assert operation["state"] == "pending", operation
assert finished(client, operation) == listed["id"]
export = call(client, "get-snapshot", id=listed["id"])["export"]
image = requests.get(export["presigned-url"], timeout=30)
assert image.status_code == 200 and image.content[:4] == b"QFI\xfb"
assert hashlib.md5(image.content).hexdigest() == export["md5sum"]
signed = client.http_client.get(export["presigned-url"], timeout=30)
assert signed.status_code == 400, "a second authorization was accepted"

operation = call(
    client,
    "promote-snapshot-to-template",
    id=listed["id"],
    name="café gold",
    description="made by a test",
    ssh_key_enabled=True,
)
template = finished(client, operation)
assert call(client, "get-template", id=template)["name"] == "café gold"
private = call(client, "list-templates", visibility="private")["templates"]
assert [one["id"] for one in private] == [template], private
public = call(client, "list-templates", visibility="public", family="ubuntu")["templates"]
assert len(public) == 1 and public[0]["visibility"] == "public", public

operation = call(
    client,
    "register-template",
    name="back again",
    url=export["presigned-url"],
    checksum=export["md5sum"],
    ssh_key_enabled=True,
    password_enabled=False,
    boot_mode="uefi",
)
registered = finished(client, operation)
assert call(client, "get-template", id=registered)["checksum"] == export["md5sum"]
finished(client, call(client, "delete-template", id=registered))

made = finished(client, call(client, "create-snapshot", id=instance["id"]))
assert call(client, "get-snapshot", id=made)["state"] == "exported"
quotas = {one["resource"]: one for one in call(client, "list-quotas")["quotas"]}
assert quotas["snapshot"] == {"resource": "snapshot", "usage": 2, "limit": 2}, quotas
assert call(client, "get-quota", entity="template")["usage"] == 1
refused(
    ExoscaleAPIClientException,
    "Client error 409",
    lambda: client.create_snapshot(id=instance["id"]),
)

finished(client, call(client, "delete-snapshot", id=listed["id"]))
assert [one["id"] for one in call(client, "list-snapshots")["snapshots"]] == [made]
refused(ExoscaleAPIClientException, "not found", lambda: client.get_snapshot(id=listed["id"]))

elsewhere = Client(os.environ["API_KEY"], os.environ["API_SECRET"], url=endpoint(OTHER))
refused(ExoscaleAPIClientException, "not found", lambda: elsewhere.get_snapshot(id=made))
stranger = Client(os.environ["API_KEY"], "another secret", url=endpoint(ZONE))
refused(ExoscaleAPIAuthException, "Invalid request signature", stranger.list_snapshots)
# The test struck the second deletion of all: its operation fails.
refused(
    ExoscaleAPIServerException,
    "Operation error: failure, busy",
    lambda: finished(client, client.delete_snapshot(id=made)),
)
print("the vendor's client is content")
