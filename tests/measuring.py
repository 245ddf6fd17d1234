"""What the measurements of the daemon share: its memory, its CPU time, its port, and keys for it."""
import os
import socket

# As in the systemd unit.
UNIT = {"MALLOC_ARENA_MAX": "2"}
SECRETS = {"EXOSCALE_API_KEY": "EXO0123456789abcdef01234567", "EXOSCALE_API_SECRET": "s" * 43}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(port, path, timeout=60):
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = bytearray()
        while chunk := connection.recv(1 << 18):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 200"), bytes(answer[:200])
    return answer


def rss_mb(pid):
    with open(f"/proc/{pid}/status") as status:
        kib = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    return kib * 1024 / 1e6


def cpu_seconds(pid):
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

# Takes snapshots, exports all, deletes and prunes old ones; `{folder}` is where state and archive are.
EVERYTHING = """
[exoscale]
poll_interval = "50ms"
requests_per_second = 1000
[state]
directory = "{folder}/state"
[archives.vault]
type = "local"
path = "{folder}/vault"
[archives.vault.retention]
keep_last = 3
[policies.nightly]
create = true
zones = ["ch-gva-2"]
[policies.nightly.select]
ownership = "all"
[policies.nightly.export]
archives = ["vault"]
required = true
snapshots = "all"
[policies.nightly.retention]
keep_last = 2
[policies.nightly.guard]
max_delete_percent = 100
settle = "0s"
"""
