"""Lets a daemon take, export, verify and delete a snapshot every two seconds, and watches its memory and its open files.

    cargo build --release --bin snapwarden --example zone
    python3 tests/soak.py [MINUTES]

MINUTES is 30. Each minute it prints the memory (RSS), the open files, and how many exports were verified. It fails if the
memory grows by more than 2 MB after a third of the time, or if files are left open.
"""
import os
import re
import signal
import subprocess
import sys
import tempfile
import time

from measuring import UNIT, free_port, get, rss_mb

MINUTES = max(1, int(sys.argv[1])) if len(sys.argv) > 1 else 30
BIN = "target/release"


def exports(port):
    text = get(port, "/metrics").decode()
    found = re.search(r'snapwarden_exports_total\{policy="soak",result="done"\} (\d+)', text)
    failed = re.search(r'snapwarden_policy_runs_total\{policy="soak",result="failed"\} (\d+)', text)
    return int(found[1]), int(failed[1])


zone = subprocess.Popen([f"{BIN}/examples/zone", "1"], stdout=subprocess.PIPE, text=True)
of_zone = {}
while len(of_zone) < 3:
    of_zone |= dict(re.findall(r"(EXOSCALE_\w+)='([^']*)'", zone.stdout.readline()))
with tempfile.TemporaryDirectory() as folder:
    port = free_port()
    with open(f"{folder}/snapwarden.toml", "w") as file:
        file.write(f"""
[exoscale]
poll_interval = "20ms"
requests_per_second = 1000
[server]
listen = "127.0.0.1:{port}"
[state]
directory = "{folder}/state"
[archives.vault]
type = "local"
path = "{folder}/vault"
[archives.vault.retention]
keep_last = 5
[archives.vault.guard]
settle = "0s"
[policies.soak]
schedule = "*/2 * * * * *"
zones = ["ch-gva-2"]
create = true
[policies.soak.retention]
keep_last = 5
[policies.soak.guard]
settle = "0s"
[policies.soak.export]
archives = ["vault"]
""")
    log = open(f"{folder}/log", "w")
    daemon = subprocess.Popen([f"{BIN}/snapwarden", "--config", f"{folder}/snapwarden.toml", "run"], env=os.environ | UNIT | of_zone,
                              stdout=log, stderr=log)
    begun, memory, files = time.monotonic(), [], []
    for minute in range(1, MINUTES + 1):
        time.sleep(max(0.0, begun + minute * 60 - time.monotonic()))
        if daemon.poll() is not None:
            sys.exit(open(f"{folder}/log").read()[-2000:])
        memory.append(rss_mb(daemon.pid))
        files.append(len(os.listdir(f"/proc/{daemon.pid}/fd")))
        done, failed = exports(port)
        print(f"minute {minute:3}   RSS {memory[-1]:5.1f} MB   {files[-1]:3} open files   {done:4} exports   "
              f"{failed} runs failed", flush=True)
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(60)
    late = memory[MINUTES // 3:] or memory
    grown, opened = max(late) - late[0], max(files[MINUTES // 3:] or files) - files[MINUTES // 3 - 1]
    print(f"after minute {MINUTES // 3}: memory grew by {grown:.1f} MB, open files by {opened}")
    if "unverified" in open(f"{folder}/log").read() or grown > 2 or opened > 10:
        sys.exit(open(f"{folder}/log").read()[-2000:])
zone.terminate()
