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
import socket
import statistics
import subprocess
import sys
import tempfile
import time

PROGRAM = sys.argv[1] if len(sys.argv) > 1 else "target/release/snapwarden"
SECONDS = max(1, int(sys.argv[2])) if len(sys.argv) > 2 else 60
STARTS = 11


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(port, path):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while chunk := connection.recv(1 << 16):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200"), answer[:200]
    return answer


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


def rss_mb(pid):
    with open(f"/proc/{pid}/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return kib * 1024 / 1e6


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


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
    secrets = {"EXOSCALE_API_KEY": "EXO0123456789abcdef01234567", "EXOSCALE_API_SECRET": "s" * 43}
    measure("snapwarden", [PROGRAM, "--config", f"{folder}/snapwarden.toml", "run"], port, "/readyz",
            os.environ | secrets)
exporter = shutil.which("prometheus-node-exporter")
if exporter:
    port = free_port()
    measure("node exporter", [exporter, f"--web.listen-address=127.0.0.1:{port}"], port, "/metrics", os.environ)
else:
    print("prometheus-node-exporter is not installed: nothing to compare with")
