"""Measures the daemon at rest with 20 policies and 2,000 snapshots, beside Prometheus' own node exporter, in one run.

    cargo build --release --bin snapwarden && cargo build --example zone
    python3 tests/idle.py [target/release/snapwarden] [SECONDS]

20 policies first run once each over a simulated zone of 100 instances with 20 snapshots each, which leaves the state directory that a
daemon would have. For each line: how long from its start until it is ready (the median of 11 starts), the memory (RSS) after a scrape,
and the share of a core over SECONDS (60) without scrapes. The first line is a daemon that was started on that state, the second one
that ran the policies itself. `prometheus-node-exporter` is Debian's package; without it the daemon is measured alone.
"""
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from measuring import UNIT, cpu_seconds, free_port, get, rss_mb

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


def at_rest(name, process, port, ready):
    size = len(get(port, "/metrics"))
    time.sleep(1)
    memory, before = rss_mb(process.pid), cpu_seconds(process.pid)
    time.sleep(SECONDS)
    share = (cpu_seconds(process.pid) - before) / SECONDS * 100
    stopped(process)
    print(f"{name:20} {ready}   RSS {memory:5.1f} MB   {share:5.2f} % of a core   /metrics {size / 1000:.0f} kB", flush=True)


def measure(name, command, port, ready_path, environment):
    ready = []
    for start in range(STARTS):
        process, took = started(command, port, ready_path, environment)
        ready.append(took * 1000)
        if start + 1 < STARTS:
            stopped(process)
    at_rest(name, process, port, f"ready {statistics.median(ready):6.1f} ms")


def policies(on_start):
    text = ""
    for number in range(20):
        names = ", ".join(f'"big-{5 * number + nth}"' for nth in range(1, 6))
        text += (f'[policies.policy-{number}]\nschedule = "{number} 2 1 1 *"\ntimezone = "Europe/Zurich"\non_start = "{on_start}"\n'
                 f'zones = ["ch-gva-2"]\n[policies.policy-{number}.select]\ninstances = [{names}]\n'
                 f"[policies.policy-{number}.retention]\nkeep_last = 30\n")
    return text


def configure(folder, port, on_start):
    with open(f"{folder}/snapwarden.toml", "w") as file:
        file.write(f'[server]\nlisten = "127.0.0.1:{port}"\n[state]\ndirectory = "{folder}/state"\n{policies(on_start)}')


def runs_ended(port):
    lines = get(port, "/metrics").decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith("snapwarden_policy_runs_total"))


zone = subprocess.Popen(["target/debug/examples/zone", "0", "100"], stdout=subprocess.PIPE, text=True,
                        env=os.environ | {"ZONE_SNAPSHOTS": "20"})
environment = {key: value for key, value in os.environ.items() if not key.startswith("EXOSCALE_")} | UNIT
while "EXOSCALE_API_SECRET" not in environment:
    line = zone.stdout.readline() or sys.exit("the simulated zone does not start")
    if line.startswith("export "):
        environment |= dict(word.split("=", 1) for word in shlex.split(line)[1:])
# What else it prints is not needed, but must not fill the pipe.
threading.Thread(target=zone.stdout.read, daemon=True).start()
try:
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [PROGRAM, "--config", f"{folder}/snapwarden.toml", "run"]
        configure(folder, port, "now")
        process, _ = started(command, port, "/readyz", environment)
        until = time.monotonic() + 120
        while runs_ended(port) < 20:
            if time.monotonic() > until:
                sys.exit("the runs do not end")
            time.sleep(0.2)
        stopped(process)
        configure(folder, port, "wait")
        measure("snapwarden", command, port, "/readyz", environment)
        configure(folder, port, "now")
        process, _ = started(command, port, "/readyz", environment)
        while runs_ended(port) < 20:
            time.sleep(0.2)
        at_rest("… after 20 runs", process, port, " " * 15)
finally:
    zone.kill()
exporter = shutil.which("prometheus-node-exporter")
if exporter:
    port = free_port()
    measure("node exporter", [exporter, f"--web.listen-address=127.0.0.1:{port}"], port, "/metrics", os.environ)
else:
    print("prometheus-node-exporter is not installed: nothing to compare with")
