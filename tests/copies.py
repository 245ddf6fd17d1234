#!/usr/bin/env python3
"""Runs over archives with many copies: CPU time and memory.

    cargo build --release --bin snapwarden --example zone && python3 tests/copies.py [COPIES …]

For each number of COPIES (20000 200000) it makes a folder with so many, 400 of each instance, beside one that was exported, and
runs `once` over it twice: the second run finds the manifests that the first one has read.
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from compare import CONFIGURATION, RELEASE, Zone, run
from measuring import UNIT

COUNTS = [int(word) for word in sys.argv[1:]] or [20_000, 200_000]


def fill(vault, count):
    for number in range(count):
        instance, day, hour = number // 400, 1 + number // 24 % 28, number % 24
        of_instance = vault / f"ch-gva-2/9ee8cb98-ea6e-4d57-bdde-{instance:012x}"
        if number % 400 == 0:
            of_instance.mkdir(parents=True)
        stem = f"202510{day:02}T{hour:02}3000Z-b0c0ef2c-106a-4f3c-a5aa-{number:012x}"
        manifest = {
            "version": 1, "zone": "ch-gva-2",
            "snapshot": {
                "id": f"b0c0ef2c-106a-4f3c-a5aa-{number:012x}", "name": f"web-{instance}_ROOT-{instance}_{number}",
                "created_at": f"2025-10-{day:02}T{hour:02}:30:00Z", "state": "exported", "size_gib": 50,
            },
            "instance": {
                "id": f"9ee8cb98-ea6e-4d57-bdde-{instance:012x}", "name": f"web-{instance}", "labels": {"backup": "nightly"},
            },
            "image": {
                "file": f"{stem}.qcow2", "bytes": 0, "md5": f"{number:032x}", "qcow2_version": 3,
                "virtual_size_bytes": 50 << 30,
            },
            "exported_at": "2025-12-01T00:00:00Z", "verified_at": "2025-12-01T00:00:00Z", "policy": "nightly",
            "run_id": f"01912345-0000-7000-8000-{number:012x}", "program_version": "0.1.0",
            "template": {
                "id": "c19542b7-d269-4bd4-bf8c-36cae36109c5", "boot_mode": "uefi", "default_user": "debian",
                "password_enabled": False, "ssh_key_enabled": True, "application_consistent": True,
            },
            "warnings": [], "pruned_at": None, "corrupt_since": None,
        }
        Path(of_instance, f"{stem}.qcow2").touch()
        Path(of_instance, f"{stem}.json").write_text(json.dumps(manifest))


for count in COUNTS:
    with Zone(1, 1, "/dev/shm") as zone, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        text = CONFIGURATION.format(
            folder=folder, archive=f'type = "local"\npath = "{folder}/vault"', concurrency=1, connections=1
        )
        Path(folder, "snapwarden.toml").write_text(text)
        command = [RELEASE / "snapwarden", "--config", "snapwarden.toml", "once"]
        # A state directory that remembers no run holds back everything beside an archive with copies.
        run(command, folder, {**zone.environment, **UNIT})
        fill(Path(folder, "vault"), count)
        for nth in ["the first run", "the second run"]:
            wall, cpu, rss = run(command, folder, {**zone.environment, **UNIT})
            print(f"{count} copies, {nth}: {wall:.2f} s, {cpu:.2f} CPU s, {rss:.1f} MiB", flush=True)
        command = [RELEASE / "snapwarden", "--config", "snapwarden.toml", "archive", "list", "--output", "json"]
        listed = json.loads(subprocess.run(command, cwd=folder, capture_output=True, check=True).stdout)
        found = len(listed[0]["images"])
        assert found == count + 1, found
