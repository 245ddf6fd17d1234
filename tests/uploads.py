#!/usr/bin/env python3
"""Four uploads at once of images that say how large they are, up to 4 TiB, and the memory that they take.

    cargo build --release --bin snapwarden --example zone && python3 tests/uploads.py [SECONDS]

The images are sparse files that nginx serves; the bucket is `tests/bucket.py`, over TLS. Nothing of that size arrives in a test:
after SECONDS (60) the program is ended. By then each upload has sent parts of the size that it would have sent on. It prints the
peak of the memory (RSS), and fails if that is more than 96 MiB.
"""
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from compare import RELEASE, ROOT, Zone, bucket, peak_kib
from measuring import UNIT

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 60
LIMIT_MIB = 96
IMAGES = 4

CONFIGURATION = """
[exoscale]
poll_interval = "50ms"
requests_per_second = 100
[state]
directory = "{folder}/state"
[archives.offsite]
{archive}
[policies.p]
zones = ["ch-gva-2"]
[policies.p.export]
archives = ["offsite"]
concurrency = {images}
"""


def peak(gib, images=IMAGES):
    """The peak of `once` while it uploads images of so many GiB each, or of 2 GiB that are sent whole."""
    with Zone(16, images, "/dev/shm") as zone, tempfile.TemporaryDirectory() as folder:
        for number in range(1, images + 1):
            os.truncate(Path(zone.folder.name, f"big-{number}.qcow2"), gib << 30)
        with bucket(folder) as archive:
            text = CONFIGURATION.format(folder=folder, archive=archive, images=images)
            Path(folder, "snapwarden.toml").write_text(text)
            keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
            command = [RELEASE / "snapwarden", "--config", "snapwarden.toml", "once"]
            child = subprocess.Popen(
                command, cwd=folder, env={**os.environ, **zone.environment, **keys, **UNIT},
                stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT,
            )
            highest, until = 0, time.monotonic() + SECONDS
            while time.monotonic() < until and child.poll() is None:
                highest = max(highest, peak_kib(child.pid))
                time.sleep(0.1)
            child.send_signal(signal.SIGKILL)
            ended = child.wait()
            assert ended in (-signal.SIGKILL, 1), f"it ended with {ended}"
            return highest / 1024, time.monotonic() - until + SECONDS


def main():
    worst = 0
    for gib in [8, 100, 400, 1024, 4096]:
        mib, seconds = peak(gib)
        worst = max(worst, mib)
        print(f"{IMAGES} images of {gib} GiB at once, for {seconds:.0f} s: {mib:.1f} MiB", flush=True)
    if worst > LIMIT_MIB:
        sys.exit(f"{worst:.1f} MiB are more than {LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
