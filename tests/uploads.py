#!/usr/bin/env python3
"""Four uploads at once of images that say how large they are, up to 4 TiB, and the memory that they take.

    cargo build --release --bin snapwarden --example zone && python3 tests/uploads.py [SECONDS [GIB …]]

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

from compare import CONFIGURATION, RELEASE, Zone, bucket, peak_kib
from measuring import UNIT

SECONDS = float(sys.argv[1]) if len(sys.argv) > 1 else 60
LIMIT_MIB = 96
IMAGES = 4
GIB = [int(word) for word in sys.argv[2:]] or [50, 120, 1024, 4096]

def peak(gib):
    """The peak of `once` while it uploads images of so many GiB each, the GiB that arrived, and in how many parts."""
    with Zone(16, IMAGES, "/dev/shm") as zone, tempfile.TemporaryDirectory() as folder:
        for number in range(1, IMAGES + 1):
            os.truncate(Path(zone.folder.name, f"big-{number}.qcow2"), gib << 30)
        with bucket(folder) as (archive, counts):
            text = CONFIGURATION.format(folder=folder, archive=archive, concurrency=IMAGES, connections=1)
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
        return highest / 1024, counts["bytes"] / (1 << 30), counts["PUT part"]


def main():
    worst = 0
    for gib in GIB:
        mib, sent, parts = peak(gib)
        worst = max(worst, mib)
        print(f"{IMAGES} images of {gib} GiB, {sent:.1f} GiB in {parts} parts were sent: {mib:.1f} MiB", flush=True)
        assert sent > 0.5, "that is too little to measure anything"
    if worst > LIMIT_MIB:
        sys.exit(f"{worst:.1f} MiB are more than {LIMIT_MIB} MiB")


if __name__ == "__main__":
    main()
