#!/usr/bin/env python3
"""Cuts the power of a virtual machine's disk while a run is at work, and looks whether anything was lost.

    apt-get install qemu-system-x86 seabios cpio kmod dmsetup busybox-static e2fsprogs
    cargo build --bin snapwarden --example zone
    python3 tests/power_cuts.py [CUTS [SEED [PROGRAM]]] [--without-sync]

The machine has Debian's kernel, a simulated zone on loopback, and a disk with an ext4 for state directory and archive, below which dm-flakey
stands. At a random moment of `snapwarden once`, which takes snapshots, exports all, deletes and prunes old ones, the program is
stopped, the disk loses everything that was not written to it until then, the program is killed, and the file system is mounted
anew. Then, after each of CUTS (50) cuts: what is not in the zone any more has a line in the audit log, and a copy or a line that it was pruned; the log's chain
is whole; each copy has the bytes that its manifest says; two runs end with success, and leave what they leave without a cut.

The machine is emulated, so that no access to /dev/kvm is needed. A round takes half a minute. `--without-sync` (`apt-get install
libeatmydata1`) lets each sync of the program do nothing: it shows that losses are found.
"""
import gzip
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from measuring import EVERYTHING

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
WORDS = [word for word in sys.argv[1:] if not word.startswith("--")]
CUTS = int(WORDS[0]) if WORDS else 50
SEED = int(WORDS[1]) if len(WORDS) > 1 else 1
PROGRAM = Path(WORDS[2]) if len(WORDS) > 2 else TARGET / "debug" / "snapwarden"
WITHOUT_SYNC = Path("/usr/lib/x86_64-linux-gnu/libeatmydata.so") if "--without-sync" in sys.argv else None
ZONE = TARGET / "debug" / "examples" / "zone"
# Parts of the kernel that Debian has as modules.
MODULES = ["virtio_pci", "virtio_blk", "dm_mod", "dm_flakey"]
DISK_MIB = 512

GUEST = r"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
modprobe -a @MODULES@
ip link set lo up
sectors=$(cat /sys/block/vda/size)
# The disk works, or what is written to it is lost without an error.
works="0 $sectors flakey /dev/vda 0 3600 0"
lost="0 $sectors flakey /dev/vda 0 0 3600 1 drop_writes"
becomes() { dmsetup suspend --noflush --nolockfs cut && dmsetup reload cut --table "$1" && dmsetup resume cut; }
dmsetup create cut --noudevsync --table "$works"; dmsetup mknodes
mkdir -p /disk; mount -t ext4 /dev/mapper/cut /disk || bad "no disk"
ZONE_SNAPSHOTS=4 zone 1 2 > /tmp/zone &
until [ "$(grep -c ^image /tmp/zone)" = 2 ]; do sleep 0.1; done
eval "$(grep ^export /tmp/zone)"
sw() { snapwarden --config /snapwarden.toml "$@"; }
bad() { echo "VIOLATION round $round, cut after $moment hundredths of a second: $*"; tail -n 20 /tmp/log; violations=$((violations + 1)); }
now() { cut -d' ' -f1 /proc/uptime | tr -d .; }
# The snapshots that are there. The plan's copies have ids as well.
ids() {
    sw plan --output json > /tmp/plan 2> /tmp/log || bad "no plan"
    awk '/"copies": \[/ { on = 0 } /"decisions": \[/ { on = 1 } on && $1 == "\"id\":" && $2 != "null,"' /tmp/plan | tr -d '", ' | cut -d: -f2 | sort -u
}
violations=0; round=0; moment=0
sw once > /tmp/log 2>&1 || bad "the first run"
begun=$(now); sw once > /tmp/log 2>&1 || bad "the second run"; lasts=$(($(now) - begun))
echo "a run without a cut takes $lasts hundredths of a second"
awk -v seed=@SEED@ -v cuts=@CUTS@ -v lasts=$lasts 'BEGIN { srand(seed); for (n = 0; n < cuts; n++) print int(rand() * lasts) }' > /tmp/moments
while read moment <&9; do
    round=$((round + 1))
    before=$(ids); [ -n "$before" ] || bad "no snapshots"
    LD_PRELOAD=@PRELOADED@ snapwarden --config /snapwarden.toml once > /tmp/log 2>&1 &
    program=$!
    usleep $((moment * 10000))
    kill -STOP $program 2>/dev/null && ended=no || ended=yes
    becomes "$lost"
    kill -KILL $program 2>/dev/null; wait $program 2>/dev/null
    lines=$(wc -l < /disk/state/audit.jsonl)
    umount /disk || bad "it is still in use"
    becomes "$works"
    echo 3 > /proc/sys/vm/drop_caches
    mount -t ext4 /dev/mapper/cut /disk || bad "not mounted"
    kept=$(wc -l < /disk/state/audit.jsonl)
    there=$(ids)
    for id in $before; do
        case "$there" in *$id*) continue;; esac
        grep "\"$id\"" /disk/state/audit.jsonl | grep -q '"action":"delete"' || bad "$id was deleted without a line"
        find /disk/vault -name "*$id.qcow2" | grep -q . || grep "\"$id\"" /disk/state/audit.jsonl | grep -q '"action":"prune' \
            || bad "$id was deleted without a copy"
    done
    sw archive verify vault > /tmp/log 2>&1 || bad "a copy is damaged"
    sw once > /tmp/log 2>&1 || bad "the next run"
    sw once > /tmp/log 2>&1 || bad "the one after"
    sw history --verify > /tmp/log 2>&1 || bad "the audit log"
    grep -q '"action":"\(unexplained\|vanished\)' /disk/state/audit.jsonl && bad "a deletion is not known to be ours"
    [ "$(ids | wc -l)" = 4 ] || bad "not two snapshots of each instance"
    [ "$(find /disk/vault -name '*.qcow2' | wc -l)" = 6 ] || bad "not three copies of each instance"
    [ -z "$(find /disk/vault -name '*.part*')" ] || bad "a part of an image is left"
    echo "round $round: cut after $moment, ended before: $ended, $kept of $lines lines of the audit log"
done 9< /tmp/moments
echo "$round cuts, $violations violations"
poweroff -f
"""


def libraries(program):
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(/\S+) \(0x", listed)


def kernel(folder):
    """Debian's kernel for clouds, unpacked: its image, its modules."""
    depends = subprocess.run(["apt-cache", "depends", "linux-image-cloud-amd64"], capture_output=True, text=True, check=True)
    package = re.search(r"Depends: (\S+)", depends.stdout)[1]
    subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True, stderr=subprocess.DEVNULL)
    subprocess.run(["dpkg-deb", "-x", next(folder.glob("*.deb")), folder / "kernel"], check=True)
    return next((folder / "kernel/boot").glob("vmlinuz-*")), next((folder / "kernel/lib/modules").iterdir())


def memory_disk(folder, modules):
    """The root of the machine: busybox, the programs, their libraries, modules."""
    root = folder / "root"
    for name in ("bin", "proc", "sys", "dev", "tmp", "disk"):
        (root / name).mkdir(parents=True)
    shutil.copy2(shutil.which("busybox"), root / "bin/busybox")
    for program in (PROGRAM, ZONE, Path(shutil.which("dmsetup"))):
        subprocess.run(["strip", "-o", root / "bin" / program.name, program], check=True)
        for library in libraries(program):
            (root / library[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(library, root / library[1:])
    found = subprocess.run(
        ["modprobe", "-d", folder / "kernel", "-S", modules.name, "--show-depends", "-a", *MODULES],
        capture_output=True, text=True, check=True,
    )
    for module in re.findall(r"insmod (\S+)", found.stdout):
        place = root / Path(module).relative_to(folder / "kernel")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(module, place)
    subprocess.run(["depmod", "-b", root, modules.name], check=True, stderr=subprocess.DEVNULL)
    (root / "snapwarden.toml").write_text(EVERYTHING.replace("{folder}", "/disk"))
    if WITHOUT_SYNC:
        shutil.copy2(WITHOUT_SYNC, root / "bin")
    preloaded = f"/bin/{WITHOUT_SYNC.name}" if WITHOUT_SYNC else ""
    guest = GUEST
    for name, value in [("MODULES", " ".join(MODULES)), ("SEED", SEED), ("CUTS", CUTS), ("PRELOADED", preloaded)]:
        guest = guest.replace(f"@{name}@", str(value))
    (root / "init").write_text(guest)
    (root / "init").chmod(0o755)
    files = subprocess.run(["find", "."], cwd=root, capture_output=True, check=True).stdout
    packed = subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=files, capture_output=True, check=True)
    (folder / "root.gz").write_bytes(gzip.compress(packed.stdout, 1))
    return folder / "root.gz"


def main():
    with tempfile.TemporaryDirectory(prefix="power-cuts-") as folder:
        folder = Path(folder)
        image, modules = kernel(folder)
        subprocess.run(["depmod", "-b", folder / "kernel", modules.name], check=True)
        root = memory_disk(folder, modules)
        disk = folder / "disk"
        with disk.open("wb") as file:
            file.truncate(DISK_MIB << 20)
        subprocess.run(["mke2fs", "-q", "-t", "ext4", disk], check=True)
        machine = subprocess.Popen(
            [
                "qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "1536", "-nographic", "-no-reboot",
                "-drive", f"file={disk},if=virtio,format=raw", "-kernel", image, "-initrd", root, "-append", "console=ttyS0 quiet panic=-1",
            ],
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, errors="replace",
        )
        ended = None
        for line in machine.stdout:
            print(line.rstrip(), flush=True)
            ended = re.search(r"(\d+) cuts, (\d+) violations", line) or ended
        machine.wait()
        sys.exit(0 if ended and int(ended[1]) == CUTS and int(ended[2]) == 0 else 1)


main()
