#!/usr/bin/env python3
"""Lets the system calls of a run fail, one after the other, and looks whether anything was lost.

    apt-get install strace && cargo build --bin snapwarden --example zone
    python3 tests/system_calls.py [PROGRAM] [--only CALL] [--all]

The run takes snapshots, exports all, deletes and prunes old ones, over a simulated zone on loopback. It is played once for each of the first
calls of a kind that a thread makes on files, and for ever fewer of the later ones (`--all`: for each), with that call failing in each of
the ways below, or the program killed in it; calls on sockets and pipes do not count. After each: what was deleted may be deleted, was written to the audit log before, and has a copy whose bytes are right; no
temporary file is taken for a copy; the audit log's chain is whole; the program did not panic. Then two runs without faults end with
success, and what there is then is what there is without faults.
"""
import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from measuring import EVERYTHING

ROOT = Path(__file__).resolve().parent.parent
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "debug"

FAULTS = {
    "openat": ["error=EIO", "error=ENOSPC", "error=EACCES", "error=EMFILE"],
    "write": ["error=EIO", "error=ENOSPC", "retval=0", "signal=KILL"],
    "pwrite64": ["error=EIO", "error=ENOSPC", "retval=0", "signal=KILL"],
    "read": ["error=EIO"],
    "pread64": ["error=EIO"],
    "fsync": ["error=EIO", "error=EINVAL", "signal=KILL"],
    "fdatasync": ["error=EIO", "signal=KILL"],
    "rename": ["error=EIO", "error=EACCES", "signal=KILL"],
    "renameat2": ["error=EIO", "error=EINVAL", "signal=KILL"],
    "linkat": ["error=EPERM"],
    "unlink": ["error=EIO", "error=EPERM", "signal=KILL"],
    "unlinkat": ["error=EIO"],
    "mkdir": ["error=ENOSPC"],
    "flock": ["error=ENOLCK", "error=EINTR"],
    "fcntl": ["error=ENOLCK"],
    "statx": ["error=EIO"],
    "getdents64": ["error=EIO"],
    "ftruncate": ["error=ENOSPC", "error=EIO"],
    "fallocate": ["error=ENOSPC", "error=EOPNOTSUPP"],
    "statfs": ["error=EIO"],
}
# A thread also writes to wake others, and does not survive that it can't.
WRITTEN = ["audit.jsonl", "policy-nightly.1.jsonl", "policy-nightly.json.new", "runs-nightly.json.new", "archives.json.new"]

class Case:
    """A zone, a folder, and the program in it."""

    def __init__(self, program):
        self.program = program
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm", prefix="system-calls-"))
        Path(self.folder, "snapwarden.toml").write_text(EVERYTHING.replace("{folder}", str(self.folder)))
        zone = {**os.environ, "ZONE_SNAPSHOTS": "4"}
        self.zone = subprocess.Popen(
            [TARGET / "examples/zone", "1", "2"], stdout=subprocess.PIPE, text=True, env=zone, cwd=self.folder
        )
        self.environment = {"PATH": os.environ["PATH"], "MALLOC_ARENA_MAX": "2"}
        images = 0
        while images < 2:
            line = self.zone.stdout.readline()
            assert line, "the zone did not start"
            self.environment.update(re.findall(r"(EXOSCALE_API_\w+)='([^']*)'", line))
            images += line.startswith("image ")

    def close(self):
        self.zone.kill()
        self.zone.wait()
        shutil.rmtree(self.folder)

    def run(self, *words, under=()):
        command = [*under, self.program, "--config", "snapwarden.toml", *words]
        started = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        try:
            out, err = started.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGKILL)
            out, err = started.communicate()
            err += "\nit did not end within a minute"
        return started.returncode, out, err

    def snapshots(self):
        code, out, err = self.run("plan", "--output", "json")
        assert code == 0, f"{code} {err}"
        policy = json.loads(out)["policies"][0]
        rows = [decision["snapshot"] for decision in policy["decisions"]]
        return {row["id"]: row for row in rows if row["id"]}

    def copies(self):
        """The ids of the copies whose bytes are as their manifest says."""
        found = set()
        for path in Path(self.folder, "vault").rglob("*.json"):
            try:
                manifest = json.loads(path.read_text())
                image = Path(path.parent, manifest["image"]["file"])
                md5 = hashlib.md5(image.read_bytes()).hexdigest()
            except (KeyError, ValueError, TypeError, OSError):
                continue
            if md5 == manifest["image"]["md5"]:
                found.add(manifest["snapshot"]["id"])
        return found

    def audit(self):
        lines = []
        path = Path(self.folder, "state/audit.jsonl")
        for line in path.read_bytes().split(b"\n") if path.exists() else []:
            try:
                lines.append(json.loads(line))
            except ValueError:
                continue
        return lines


def check(case, before, outcome, context):
    """What must hold after a run, whatever failed in it."""
    code, _, err = outcome
    assert code in (0, 1, 2, 3, 4, 75, 78, -signal.SIGKILL, 128 + signal.SIGKILL), f"{context}: ended with {code}: {err[-2000:]}"
    for word in ("panicked", "did not end"):
        assert word not in err, f"{context}: {err[-1500:]}"
    there, copies, lines = case.snapshots(), case.copies(), case.audit()
    gone = before.keys() - there.keys()
    ends = [line for line in lines if line.get("action") == "delete"]
    for id in gone:
        assert any(line["snapshot"]["id"] == id for line in ends), f"{context}: {id} was deleted without a line"
        pruned = any(str(line.get("action")).startswith("prune") and line["snapshot"]["id"] == id for line in lines)
        assert id in copies or pruned, f"{context}: {id} was deleted without a copy"
    return there


def rest(case, context):
    """Runs without faults, until there is nothing to do."""
    for nth in ("next", "one after"):
        code, out, err = case.run("once")
        assert code == 0, f"{context}: the {nth} run ended with {code}: {out[-1500:]} {err[-2500:]}"
    code, out, err = case.run("history", "--verify")
    assert code == 0, f"{context}: {out} {err}"
    code, out, err = case.run("archive", "verify", "vault")
    assert code == 0, f"{context}: {out} {err}"
    names = Counter(row["name"].split("_")[0] for row in case.snapshots().values())
    copies = len(case.copies())
    left = [str(path.relative_to(case.folder)) for path in Path(case.folder, "vault").rglob("*.part*")]
    return names, copies, left


def play(program, call, fault, nth):
    """What one failing call comes to: nothing was injected, or how the run ended."""
    case = Case(program)
    try:
        before = case.snapshots()
        log = Path(case.folder, "strace.log")
        # A signal is sent at the first call alone where the others don't stop.
        fast = [] if fault.startswith("signal=") else ["--seccomp-bpf"]
        inject = f"inject={call}:{fault}:when={nth}"
        only = [f"-P{case.folder}/state/{name}" for name in WRITTEN] if call == "write" else []
        under = ["strace", "-f", *fast, *only, "-qq", "-y", "-o", log, "-e", f"trace={call}", "-e", inject]
        outcome = case.run("once", under=under)
        text = log.read_text(errors="replace")
        hits = [line for line in text.splitlines() if "INJECTED" in line or "DELAYED" in line]
        if fault.startswith("signal="):
            hits = [line for line in text.splitlines() if call in line][-1:] if outcome[0] < 0 or outcome[0] > 128 else []
        if not hits:
            return None, ""
        # Each thread counts for itself, so several calls may have failed; of one that was resumed the file is not known.
        if any(re.search(r"<(anon_inode|socket|pipe|TCP|UDP|/usr/lib|/lib|\.\.\. )|resumed>", line) for line in hits):
            return "no file", ""
        context = f"{call} {fault} {nth}: {hits[0][:200]}"
        check(case, before, outcome, context)
        names, copies, left = rest(case, context)
        assert names == {"big-1": 2, "big-2": 2}, f"{context}: {names}"
        assert copies == 6, f"{context}: {copies} copies"
        assert not left, f"{context}: {left}"
        return outcome[0], context
    finally:
        case.close()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program", nargs="?", default=str(TARGET / "snapwarden"))
    parser.add_argument("--only", default="")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--fault", default="", help="only faults with this in their names, such as `signal`")
    options = parser.parse_args()
    program = str(Path(options.program).resolve())
    failures = []
    for call, faults in FAULTS.items():
        if options.only and call != options.only:
            continue
        for fault in faults:
            if options.fault not in fault:
                continue
            ends, nth, misses = Counter(), 1, 0
            # The number counts the calls of a thread, and which thread does what is not the same each time.
            while misses < 3:
                try:
                    end, _ = play(program, call, fault, nth)
                except AssertionError as violation:
                    failures.append(str(violation))
                    print(f"VIOLATION {violation}", flush=True)
                    end = "violation"
                misses = misses + 1 if end is None else 0
                if end is not None:
                    ends[end] += 1
                nth = nth + 1 if options.all else max(nth + 1, nth * 5 // 4)
            print(f"{call:11} {fault:16} " + ", ".join(f"{end}: {count}" for end, count in sorted(ends.items(), key=str)), flush=True)
    sys.exit(1 if failures else 0)


main()
