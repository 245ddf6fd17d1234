"""Measures the HTTP port: scrapes of 10,000 and of 40,000 series, how long /livez takes meanwhile, and the page.

    cargo build --release
    python3 tests/port.py [target/release/snapwarden] [SECONDS]

Each time a daemon is started on a state directory in which policies remember instances.

1. Two policies of 625 instances, which are 10,000 series, are scraped 20 times, one after the other; then two of 2,500, which are 40,000.
2. With these, 60 clients scrape without a pause and 5,000 connections are opened that ask for nothing, and /livez is asked ten times a
   second for SECONDS (20).
3. With one policy of 10,000 instances, of which every hundredth lacks a copy, the page is asked 20 times, so is its last part, a search, and
   the page of an instance.
"""
import contextlib
import datetime
import json
import os
import resource
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from measuring import SECRETS, UNIT, cpu_seconds, free_port, get, rss_mb

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else "target/release/snapwarden"
SECONDS = max(1, int(sys.argv[2])) if len(sys.argv) > 2 else 20
SCRAPERS, IDLE, TIMES = 60, 5_000, 20
NOW = datetime.datetime.now(datetime.timezone.utc)


def before(hours):
    return (NOW - datetime.timedelta(hours=hours)).strftime("%Y-%m-%dT%H:%M:%SZ")


# The clients' connections are files of this process.
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * IDLE), hard))


def remembered(number_of_instances):
    instances = [
        {"id": instance_id(number), "name": f"web-{number}.example.org", "good": 14, "failed": 0, "in_flight": 0, "other": 0,
         "newest_at": before(6), "oldest_at": before(400), "newest_consistent_at": before(6),
         "newest_verified_at": {"vault": before(6 if number % 100 else 300)}, "is_listed": True}
        for number in range(number_of_instances)
    ]
    coverage = {"at": before(1), "covered": number_of_instances, "uncovered": 0, "exempt": 0}
    zone = {"last_run_at": before(1), "last_success_at": before(1), "result": "success", "coverage": coverage, "failure": None,
            "held": None, "gate_since": None, "plan": None, "accepted": None, "instances": instances}
    return json.dumps({"version": 1, "last": None, "zones": {"ch-gva-2": zone}})


def instance_id(number):
    return f"9ee8cb98-ea6e-4d57-bdde-{number:012x}"


@contextlib.contextmanager
def daemon(policies):
    """The port and the process of a daemon whose policies remember so many instances each."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        os.mkdir(f"{folder}/state", 0o700)
        text = (f'[server]\nlisten = "127.0.0.1:{port}"\n[state]\ndirectory = "{folder}/state"\n'
                f'[archives.vault]\ntype = "local"\npath = "{folder}/vault"\n')
        for policy, instances in policies.items():
            text += (f'[policies.{policy}]\nschedule = "0 3 * * *"\non_start = "wait"\nzones = ["ch-gva-2"]\ncreate = true\n'
                     f'[policies.{policy}.retention]\nkeep_last = 7\n[policies.{policy}.export]\narchives = ["vault"]\n')
            with open(f"{folder}/state/runs-{policy}.json", "w") as file:
                file.write(remembered(instances))
        with open(f"{folder}/snapwarden.toml", "w") as file:
            file.write(text)
        process = subprocess.Popen([PROGRAM, "--config", f"{folder}/snapwarden.toml", "run"], env=os.environ | UNIT | SECRETS,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                get(port, "/readyz")
                break
            except (OSError, AssertionError):
                if process.poll() is not None:
                    sys.exit("it does not start")
                time.sleep(0.05)
        try:
            yield port, process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)


def measure(name, port, process, path):
    """Asks some times, one after the other, and prints the length, the median of the times, the longest, and the CPU time."""
    took, length, cpu = [], 0, cpu_seconds(process.pid)
    for _ in range(TIMES):
        begun = time.perf_counter()
        length = len(get(port, path))
        took.append((time.perf_counter() - begun) * 1000)
    cpu = (cpu_seconds(process.pid) - cpu) / TIMES * 1000
    print(f"{name:32} {length / 1e3:7.0f} kB   median {statistics.median(took):5.1f} ms, longest {max(took):5.1f} ms, "
          f"{cpu:4.0f} ms of CPU   RSS {rss_mb(process.pid):.0f} MB", flush=True)


def crowd(port, process):
    """How long /livez takes while many scrape, and many more do nothing."""
    stop, scrapes = threading.Event(), []

    def scrape():
        while not stop.is_set():
            try:
                get(port, "/metrics")
                scrapes.append(1)
            except (OSError, AssertionError):
                time.sleep(0.01)

    for _ in range(SCRAPERS):
        threading.Thread(target=scrape, daemon=True).start()
    idle = []
    for _ in range(IDLE):
        connection = socket.socket()
        connection.settimeout(5)
        try:
            connection.connect(("127.0.0.1", port))
        except (OSError, AssertionError):
            pass
        idle.append(connection)
    took, failed, until = [], 0, time.monotonic() + SECONDS
    while time.monotonic() < until:
        begun = time.monotonic()
        try:
            get(port, "/livez", timeout=5)
            took.append(time.monotonic() - begun)
        except (OSError, AssertionError):
            failed += 1
        time.sleep(max(0.0, 0.1 - (time.monotonic() - begun)))
    stop.set()
    answered = f"median {statistics.median(took) * 1000:.0f} ms, longest {max(took) * 1000:.0f} ms" if took else "none"
    print(f"/livez under {SCRAPERS} scrapers: {len(took)} answers, {failed} failures, {answered}; "
          f"{len(scrapes)} scrapes meanwhile, RSS {rss_mb(process.pid):.0f} MB", flush=True)


with daemon({"nightly": 625, "weekly": 625}) as (port, process):
    measure("/metrics, 10,000 series", port, process, "/metrics")
with daemon({"nightly": 2_500, "weekly": 2_500}) as (port, process):
    measure("/metrics, 40,000 series", port, process, "/metrics")
    crowd(port, process)
with daemon({"nightly": 10_000}) as (port, process):
    print(f"{'10,000 instances, before a page':32} RSS {rss_mb(process.pid):.0f} MB")
    for path in ["/", "/?page=200", "/?q=web-77", f"/instance/ch-gva-2/{instance_id(77)}"]:
        measure(path if len(path) < 30 else "/instance/…", port, process, path)
