"""Measures the HTTP port with 40,000 series: CPU per scrape, and how long /livez takes meanwhile.

    cargo build --release
    python3 tests/port.py [target/release/snapwarden] [SECONDS]

A daemon is started on a state directory in which two policies remember 2,500 instances each. First it is scraped 20 times,
one after the other. Then 60 clients scrape without a pause and 5,000 connections are opened that ask for nothing, and
/livez is asked ten times a second for SECONDS (20).
"""
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

from measuring import SECRETS, cpu_seconds, free_port, get, rss_mb

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else "target/release/snapwarden"
SECONDS = max(1, int(sys.argv[2])) if len(sys.argv) > 2 else 20
INSTANCES, SCRAPERS, IDLE = 2_500, 60, 5_000
AT = "2026-11-14T02:30:07Z"

# The clients' connections are files of this process.
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * IDLE), hard))


def remembered():
    instances = [
        {"id": f"9ee8cb98-ea6e-4d57-bdde-{number:012x}", "name": f"web-{number}.example.org", "good": 14, "failed": 0,
         "in_flight": 0, "other": 0, "newest_at": AT, "oldest_at": AT, "newest_consistent_at": AT,
         "newest_verified_at": {"vault": AT}, "is_listed": True}
        for number in range(INSTANCES)
    ]
    zone = {"last_run_at": AT, "last_success_at": AT, "failure": None, "held": None, "gate_since": None, "plan": None,
            "accepted": None, "instances": instances}
    return json.dumps({"version": 1, "last": None, "zones": {"ch-gva-2": zone}})


with tempfile.TemporaryDirectory() as folder:
    port = free_port()
    os.mkdir(f"{folder}/state", 0o700)
    policies = ""
    for policy in ["nightly", "weekly"]:
        policies += f'[policies.{policy}]\nzones = ["ch-gva-2"]\n[policies.{policy}.retention]\nkeep_last = 7\n'
        with open(f"{folder}/state/runs-{policy}.json", "w") as file:
            file.write(remembered())
    with open(f"{folder}/snapwarden.toml", "w") as file:
        file.write(f'[server]\nlisten = "127.0.0.1:{port}"\n[state]\ndirectory = "{folder}/state"\n{policies}')
    daemon = subprocess.Popen([PROGRAM, "--config", f"{folder}/snapwarden.toml", "run"], env=os.environ | SECRETS,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            length = len(get(port, "/metrics"))
            break
        except (OSError, AssertionError):
            if daemon.poll() is not None:
                sys.exit("it does not start")
            time.sleep(0.05)

    before = cpu_seconds(daemon.pid)
    for _ in range(20):
        get(port, "/metrics")
    per_scrape = (cpu_seconds(daemon.pid) - before) / 20 * 1000
    print(f"{length / 1e6:.1f} MB, {per_scrape:.0f} ms of CPU a scrape, RSS {rss_mb(daemon.pid):.0f} MB")

    stop, scrapes = threading.Event(), []

    def scrape():
        while not stop.is_set():
            try:
                get(port, "/metrics")
                scrapes.append(1)
            except (OSError, AssertionError):
                time.sleep(0.01)

    threads = [threading.Thread(target=scrape, daemon=True) for _ in range(SCRAPERS)]
    for thread in threads:
        thread.start()
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
    print(f"/livez: {len(took)} answers, {failed} failures, {answered}; "
          f"{len(scrapes)} scrapes meanwhile, RSS {rss_mb(daemon.pid):.0f} MB")
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(20)
