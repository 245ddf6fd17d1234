#!/usr/bin/env python3
"""Compares `snapwarden once` with what one would type instead, whole program against whole program.

    cargo build --release && cargo build --release --example zone && python3 tests/compare.py

An example zone on loopback exports one image (and four, for the last rows), which nginx serves from tmpfs; where that is
not installed, the zone serves it itself, at four times the CPU time. Each round runs every way once, in turn, on tmpfs and
on disk, so that whatever else the machine does strikes all of them alike; printed are the medians, and snapwarden's as
ratios of the others'. A way whose program is missing is named and left out.

    --mib 2048 --rounds 5 --tmpfs /dev/shm --disk /var/tmp --connections 1
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RELEASE = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"


def say(text=""):
    print(text, flush=True)


class Zone:
    """The example zone, the server of its images, and the environment that its clients need."""

    def __init__(self, mib, instances, folder):
        self.children = []
        command = [RELEASE / "examples/zone", str(mib), str(instances)]
        self.folder = tempfile.TemporaryDirectory(dir=folder, prefix="compare-images-")
        if shutil.which("nginx"):
            command += [self.folder.name, self.nginx()]
        zone = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.children.append(zone)
        self.environment = {}
        self.addresses = []
        while len(self.addresses) < instances:
            line = zone.stdout.readline()
            if not line:
                sys.exit("the example zone did not start")
            self.environment.update(re.findall(r"(EXOSCALE_API_\w+)='([^']*)'", line))
            self.addresses += re.findall(r"^image (\S+) (\S+)", line)

    def nginx(self):
        """Starts nginx over the folder, and gives its address."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        private = Path(self.folder.name, "nginx")
        private.mkdir()
        temporary = "".join(f"{kind}_temp_path {private}/{kind};" for kind in TEMPORARY)
        Path(private, "nginx.conf").write_text(f"""
            daemon off; pid {private}/pid; error_log {private}/errors; worker_processes 1; events {{}}
            http {{
                access_log off; sendfile on; tcp_nopush on; {temporary}
                server {{ listen 127.0.0.1:{port}; root {self.folder.name}; }}
            }}""")
        # Its workers must be able to read what this user made.
        os.chmod(self.folder.name, 0o755)
        self.children.append(subprocess.Popen(["nginx", "-p", private, "-c", private / "nginx.conf"]))
        return f"http://127.0.0.1:{port}"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for child in self.children:
            child.terminate()
            child.wait()
        self.folder.cleanup()


TEMPORARY = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]

CONFIGURATION = """
[exoscale]
poll_interval = "50ms"
requests_per_second = 100
[state]
directory = "{folder}/state"
[archives.vault]
{archive}
[policies.p]
zones = ["ch-gva-2"]
[policies.p.export]
archives = ["vault"]
concurrency = {concurrency}
connections = {connections}
"""


def run(command, folder, environment=None, shell=False):
    """Wall seconds, CPU seconds and, of what is no shell, the peak RSS in MiB."""
    with tempfile.TemporaryFile("w+") as output:
        before = time.monotonic()
        child = subprocess.Popen(
            command, cwd=folder, shell=shell, env={**os.environ, **(environment or {})},
            stdout=output, stderr=subprocess.STDOUT,
        )
        peak, ended = 0, 0
        while not ended:
            peak = max(peak, peak_kib(child.pid))
            time.sleep(0.005)
            ended, status, used = os.wait4(child.pid, os.WNOHANG)
        wall = time.monotonic() - before
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode != 0:
            output.seek(0)
            sys.exit(f"{command} ended with {child.returncode}:\n{output.read()}")
    # That of a shell includes its children's.
    return wall, used.ru_utime + used.ru_stime, None if shell else peak / 1024


def peak_kib(pid):
    """What the kernel tells when a process has ended also counts the one that started it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = re.search(r"VmHWM:\s*(\d+)", status)
    return int(found[1]) if found else 0


class Ways:
    """What is compared: a name, and how to run it in an empty folder."""

    def __init__(self, zone, connections):
        self.zone = zone
        self.connections = connections
        url, md5 = zone.addresses[0]
        self.all = {"snapwarden once": self.snapwarden}
        quoted = f"'{url}'"
        check = f'echo "{md5}  f" | md5sum -c --quiet -'
        self.shell("curl, md5sum, sync", ["curl", "md5sum"], f"curl -sSf -o f {quoted} && {check} && sync f")
        self.shell(
            "aria2c -x4 --checksum", ["aria2c"],
            f"aria2c -q -x4 -s4 --file-allocation=none --checksum=md5={md5} -o f {quoted} && sync f",
        )
        self.shell(
            "rclone copyurl, md5sum", ["rclone", "md5sum"],
            f"rclone --config /dev/null copyurl {quoted} f && {check} && sync f",
        )

    def shell(self, name, needs, command):
        missing = [program for program in needs if shutil.which(program) is None]
        if missing:
            say(f"left out: {name} ({', '.join(missing)} is not installed)")
        else:
            self.all[name] = lambda folder: run(command, folder, shell=True)

    def once(self, folder, archive, environment=None):
        text = CONFIGURATION.format(
            folder=folder, archive=archive, concurrency=len(self.zone.addresses), connections=self.connections
        )
        Path(folder, "snapwarden.toml").write_text(text)
        keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
        environment = {**self.zone.environment, **keys, **(environment or {})}
        return run([RELEASE / "snapwarden", "--config", "snapwarden.toml", "once"], folder, environment)

    def to_bucket(self, folder):
        """To S3, as a bucket that keeps nothing speaks it, over TLS."""
        with bucket(folder) as (archive, _):
            return self.once(folder, archive)

    def to_restic(self, folder):
        """To a repository of restic: how long the whole takes, and the backup in it, by restic's own times."""
        repository, times = restic_repository(folder), Path(folder, "times")
        beside = Path(folder, "bin/restic")
        beside.parent.mkdir()
        beside.write_text(
            f"""#!/bin/sh
begun=$(date +%s.%N)
{shutil.which("restic")} "$@"
status=$?
case "$*" in *backup*.qcow2*) echo "$begun $(date +%s.%N)" >> {times};; esac
exit $status
"""
        )
        beside.chmod(0o755)
        archive = f'type = "restic"\nrepository = "{repository}"\npassword_file = "{folder}/password"'
        whole = self.once(folder, archive, {"PATH": f"{beside.parent}:{os.environ['PATH']}"})[0]
        (begun, ended), = [map(float, line.split()) for line in times.read_text().splitlines()]
        return whole, ended - begun

    def restic_alone(self, folder):
        """`restic backup` of the same file."""
        repository = restic_repository(folder)
        run(["curl", "-sSf", "-o", "f", self.zone.addresses[0][0]], folder)
        settings = {"RESTIC_REPOSITORY": repository, "RESTIC_PASSWORD_FILE": f"{folder}/password"}
        return run(["restic", "--no-cache", "backup", "--quiet", "f"], folder, settings)[0]

    def snapwarden(self, folder):
        figures = self.once(folder, f'type = "local"\npath = "{folder}/vault"')
        manifests = Path(folder, "vault").glob("*/*/*.json")
        found = sorted(json.loads(path.read_text())["image"]["md5"] for path in manifests)
        assert found == sorted(md5 for _, md5 in self.zone.addresses), found
        return figures


@contextlib.contextmanager
def bucket(folder):
    """A bucket that keeps nothing, over TLS: its archive's settings, and in the end what it counted."""
    certificate = [Path(folder, name) for name in ("certificate.pem", "key.pem")]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "1",
         "-subj", "/CN=bucket", "-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE",
         "-out", certificate[0], "-keyout", certificate[1]],
        check=True, capture_output=True,
    )
    command = [sys.executable, ROOT / "tests/bucket.py", *certificate]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        endpoint = server.stdout.readline().strip()
        archive = f'type = "s3"\nendpoint = "{endpoint}"\nregion = "here"\nbucket = "bucket"\nca_file = "{certificate[0]}"'
        counts = {}
        yield archive, counts
        counts |= json.loads(server.communicate()[0])


def restic_repository(folder):
    Path(folder, "password").write_text("compare\n")
    Path(folder, "password").chmod(0o600)
    run(["restic", "--no-cache", "-r", f"{folder}/repository", "-p", f"{folder}/password", "init"], folder)
    return f"{folder}/repository"


def in_folder(place, way):
    with tempfile.TemporaryDirectory(dir=place, prefix="compare-") as folder:
        return way(folder)


def md5sum_alone(zone):
    """`md5sum` of the file alone, from the page cache: the least that any way needs."""

    def way(folder):
        url, _ = zone.addresses[0]
        run(["curl", "-sSf", "-o", "f", url], folder)
        return run(["md5sum", "f"], folder)

    return way


def drain(zone):
    """How fast the zone serves, so that it is not what is measured."""
    url, _ = zone.addresses[0]
    rates = []
    for _ in range(3):
        before, count = time.monotonic(), 0
        with urllib.request.urlopen(url) as answer:
            buffer = bytearray(1 << 20)
            while read := answer.readinto(buffer):
                count += read
        rates.append(count / (time.monotonic() - before) / 1e9)
    return max(rates)


def table(figures):
    say(f"| {'way':<24} | wall s | CPU s | RSS MiB | snapwarden's wall | snapwarden's CPU |")
    say(f"|{'-' * 26}|-------:|------:|--------:|------------------:|-----------------:|")
    ours = [statistics.median(column) for column in list(zip(*figures["snapwarden once"]))[:2]]
    for name, rounds in figures.items():
        wall, cpu = (statistics.median(column) for column in list(zip(*rounds))[:2])
        rss = max((round[2] for round in rounds if round[2]), default=None)
        # Each round's ratio, since rounds differ more than ways do.
        walls = statistics.median(mine[0] / theirs[0] for mine, theirs in zip(figures["snapwarden once"], rounds))
        rss = "" if rss is None else f"{rss:.1f}"
        say(f"| {name:<24} | {wall:6.2f} | {cpu:5.2f} | {rss:>7} | {walls:15.2f} × | {ours[1] / cpu:14.2f} × |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--tmpfs", default="/dev/shm")
    parser.add_argument("--disk", default="/var/tmp")
    options = parser.parse_args()
    for program in [RELEASE / "snapwarden", RELEASE / "examples/zone"]:
        if not program.exists():
            sys.exit(f"{program} is missing: cargo build --release --bin snapwarden --example zone")
    # Every process begins small: what this one has grown to is not what is measured.
    say(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.mib} MiB, median of {options.rounds}")
    with Zone(options.mib, 1, options.tmpfs) as zone:
        if shutil.which("curl") is None:
            sys.exit("curl is not installed")
        say(f"the images come at {drain(zone):.2f} GB/s to a plain reader")
        ways = Ways(zone, options.connections)
        ways.all["md5sum alone"] = md5sum_alone(zone)
        for kind, place in [("tmpfs", options.tmpfs), ("disk", options.disk)]:
            figures = {name: [] for name in ways.all}
            for _ in range(options.rounds):
                for name, way in ways.all.items():
                    figures[name].append(in_folder(place, way))
                    print(f"{kind}: {name}: {figures[name][-1][0]:.2f} s", file=sys.stderr, flush=True)
            say(f"\n### {kind} ({place})\n")
            table(figures)
        both = []
        for _ in range(options.rounds):
            here, there = in_folder(options.disk, ways.snapwarden), in_folder(options.disk, ways.to_bucket)
            both.append((there[0] / here[0], (there[1] - here[1]) * 1024 / options.mib, there[2]))
        ratio, cpu = (statistics.median(column) for column in list(zip(*both))[:2])
        rss = max(row[2] for row in both)
        if shutil.which("restic") is None:
            say("left out: a repository of restic (restic is not installed)")
        else:
            both = []
            for _ in range(options.rounds):
                alone = in_folder(options.disk, ways.restic_alone)
                both.append([seconds / alone for seconds in in_folder(options.disk, ways.to_restic)])
            whole, backup = (statistics.median(column) for column in zip(*both))
            say(
                f"\nTo a repository of restic: the backup in {backup:.2f} × the time of `restic backup` of the same file, "
                f"{whole:.2f} × with the reading back."
            )
        say(f"\nTo a bucket over TLS in {ratio:.2f} × the time to disk, {cpu:+.2f} CPU s a GiB, {rss:.1f} MiB RSS.")
    four = options.mib // 4
    say(f"\n### four images of {four} MiB at once, and one after the other's time\n")
    with Zone(four, 4, options.tmpfs) as zone, Zone(options.mib, 1, options.tmpfs) as one:
        both = []
        for _ in range(options.rounds):
            at_once = in_folder(options.tmpfs, Ways(zone, options.connections).snapwarden)
            alone = in_folder(options.tmpfs, Ways(one, options.connections).snapwarden)
            both.append((alone[0] / at_once[0], at_once[1], at_once[2]))
        throughput, cpu = (statistics.median(column) for column in list(zip(*both))[:2])
        rss = max(row[2] for row in both)
        say(f"throughput {throughput:.2f} × that of one image of the same bytes, {cpu:.2f} CPU s, {rss:.1f} MiB RSS")


if __name__ == "__main__":
    main()
