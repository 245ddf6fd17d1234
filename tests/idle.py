"""Measures the daemon at rest with 20 policies, beside Prometheus' own node exporter, in one run.

    cargo build --release
    python3 tests/idle.py [target/release/snapwarden] [SECONDS]

For each: how long from its start until /metrics is answered (the median of 11 starts), the memory (RSS) after
a scrape, and the share of a core over SECONDS (60) without scrapes. `prometheus-node-exporter` is Debian's package;
without it the daemon is measured alone.
"""
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from measuring import SECRETS, cpu_seconds, free_port, get, rss_mb

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else "target/release/snapwarden"
SECONDS = max(1, int(sys.argv[2])) if len(sys.argv) > 2 else 60
STARTS = 11


def started(command, port, path, environment):
    begun = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        try:
            get(port, path)
            return process, time.perf_counter() - begun
        except (OSError, AssertionError):
            if process.poll() is not None or time.perf_counter() - begun > 10:
                sys.exit(f"it does not start: {command}")
            time.sleep(0.0005)


def stopped(process):
    process.send_signal(signal.SIGTERM)
    process.wait(10)


def measure(name, command, port, ready_path, environment):
    ready = []
    for start in range(STARTS):
        process, took = started(command, port, ready_path, environment)
        ready.append(took * 1000)
        if start + 1 < STARTS:
            stopped(process)
    size = len(get(port, "/metrics"))
    time.sleep(1)
    memory, before = rss_mb(process.pid), cpu_seconds(process.pid)
    time.sleep(SECONDS)
    share = (cpu_seconds(process.pid) - before) / SECONDS * 100
    stopped(process)
    print(f"{name:14} ready {statistics.median(ready):6.1f} ms   RSS {memory:5.1f} MB   "
          f"{share:5.2f} % of a core   /metrics {size / 1000:.0f} kB")


with tempfile.TemporaryDirectory() as folder:
    port = free_port()
    policies = "".join(
        f'[policies.policy-{number}]\nschedule = "{number} 2 * * *"\ntimezone = "Europe/Zurich"\n'
        'zones = ["ch-gva-2", "de-fra-1"]\n'
        f"[policies.policy-{number}.retention]\nkeep_last = 7\n"
        for number in range(20)
    )
    with open(f"{folder}/snapwarden.toml", "w") as file:
        file.write(f'[server]\nlisten = "127.0.0.1:{port}"\n[state]\ndirectory = "{folder}/state"\n{policies}')
    measure("snapwarden", [PROGRAM, "--config", f"{folder}/snapwarden.toml", "run"], port, "/readyz",
            os.environ | SECRETS)
exporter = shutil.which("prometheus-node-exporter")
if exporter:
    port = free_port()
    measure("node exporter", [exporter, f"--web.listen-address=127.0.0.1:{port}"], port, "/metrics", os.environ)
else:
    print("prometheus-node-exporter is not installed: nothing to compare with")
