"""How much of a series of images restic stores: a disk of which a part changes each day, exported whole each day.

    python3 tests/restic_series.py [MIB [DAYS]]

MIB is 1536, the data on the disk; DAYS is 30. Each day 2.6 % of it changes: once in whole files of 4 MiB, and once in blocks of
4 KiB all over the disk. Needs restic and qemu-img. Printed is what the repository takes beside the sum of all images.
"""
import os
import pathlib
import random
import subprocess
import sys
import tempfile

MIB = int(sys.argv[1]) if len(sys.argv) > 1 else 1536
DAYS = int(sys.argv[2]) if len(sys.argv) > 2 else 30
CHANGED_BYTES = MIB * 1024 * 1024 * 40 // 1536
NAME = "ch-gva-2/9ee8cb98-ea6e-4d57-bdde-b85d8bc959ec/image.qcow2"


def run(*command, **more):
    return subprocess.run(command, check=True, capture_output=True, **more)


def bytes_in(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def series(folder, block):
    raw, image, repository = folder / "disk.raw", folder / "image.qcow2", folder / "repository"
    (folder / "password").write_text("series\n")
    environment = {
        **os.environ,
        "RESTIC_REPOSITORY": str(repository),
        "RESTIC_PASSWORD_FILE": str(folder / "password"),
        "RESTIC_CACHE_DIR": str(folder / "cache"),
    }
    run("restic", "init", "--quiet", env=environment)
    chance = random.Random(block)
    with open(raw, "wb") as disk:
        for _ in range(MIB):
            disk.write(chance.randbytes(1 << 20))
        # As much again is free.
        disk.truncate(2 * MIB << 20)
    images = 0
    for _ in range(DAYS):
        with open(raw, "r+b") as disk:
            for _ in range(max(1, CHANGED_BYTES // block)):
                disk.seek(chance.randrange((MIB << 20) // block) * block)
                disk.write(chance.randbytes(block))
        run("qemu-img", "convert", "-O", "qcow2", str(raw), str(image))
        images += image.stat().st_size
        with open(image, "rb") as exported:
            run("restic", "backup", "--quiet", "--stdin", "--stdin-filename", NAME, stdin=exported, env=environment)
    return images, bytes_in(repository)


for what, block in [("whole files of 4 MiB", 4 << 20), ("blocks of 4 KiB", 4 << 10)]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        images, stored = series(pathlib.Path(folder), block)
    print(f"{what}: {DAYS} images of {images / DAYS / 2**20:.0f} MiB, {stored / 2**20:.0f} MiB stored: {100 * stored / images:.1f} %", flush=True)
