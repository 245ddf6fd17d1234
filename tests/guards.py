"""Switches off each guard of tests/guards.toml, one after the other, and plays a campaign, the fortnights of
tests/all/wide_crashes.rs or the years of tests/all/years: which seed finds it?

    python3 tests/guards.py [SEEDS [WORD [fortnights|years]]]

SEEDS (24) is how many seeds are tried at most; with WORD, only guards whose names have it. The program is built once, in a
copy of the tree below target/guards, with all guards in it that an environment variable then switches off; with
CARGO_PROFILE_DEV_OPT_LEVEL=2 that takes longer, and many seeds less long. Of years the first SNAPWARDEN_NIGHTS (3) nights of
each seed are played, by as many threads as there are cores, until the first violation.
"""
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor

TREE = pathlib.Path(__file__).resolve().parent.parent
COPY = TREE / "target" / "guards"
SEEDS = int(sys.argv[1]) if len(sys.argv) > 1 else 24
WORD = sys.argv[2] if len(sys.argv) > 2 else ""
CAMPAIGNS = {
    "fortnights": ("wide_crashes", "tests/all/wide_crashes.rs"),
    "years": ("years", "tests/all/years/mod.rs"),
}
MODULE, SOURCE = CAMPAIGNS[sys.argv[3] if len(sys.argv) > 3 else "fortnights"]
VARIABLE = "SNAPWARDEN_GUARD_OFF"


def copy():
    shutil.rmtree(COPY, ignore_errors=True)
    listed = subprocess.run(["git", "ls-files"], cwd=TREE, capture_output=True, text=True, check=True)
    for file in listed.stdout.splitlines():
        (COPY / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TREE / file, COPY / file)


def switch(guards, judge):
    """Two guards may have the same line. Without any of them, the second judge is off as well."""
    by_code = {}
    for number, guard in enumerate(guards):
        by_code.setdefault((judge["file"], judge["code"]), []).append((number, judge["off"]))
        for edit in guard["edit"]:
            by_code.setdefault((edit["file"], edit["code"]), []).append((number, edit["off"]))
    for (file, code), edits in by_code.items():
        path = COPY / file
        text = path.read_text()
        if text.count(code) != 1:
            sys.exit(f"{file}: not once: {code}")
        numbers = " | ".join(f'"{number}"' for number, _ in edits)
        if len({off for _, off in edits}) != 1:
            sys.exit(f"{file}: two ways to switch off: {code}")
        off = f'std::env::var("{VARIABLE}").is_ok_and(|off| matches!(&*off, {numbers}))'
        path.write_text(text.replace(code, re.sub(r"\bOFF\b", lambda _: off, edits[0][1])))


def build():
    # Its own: in the tree's, cargo would take these builds for those of the tree.
    environment = {**os.environ, "CARGO_TARGET_DIR": str(TREE / "target" / "guards-build")}
    command = ["cargo", "test", "--locked", "--test", "all", "--no-run"]
    built = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)
    found = re.search(r"Executable .*\((.*)\)", built.stderr)
    if built.returncode or not found:
        sys.exit(built.stderr)
    program = COPY / "campaign"
    shutil.copy2(found[1] if found[1].startswith("/") else COPY / found[1], program)
    return program


def found_in_years(program, number):
    environment = {
        "SNAPWARDEN_NIGHTS": "3",
        **os.environ,
        "SNAPWARDEN_SEEDS": str(SEEDS),
        "SNAPWARDEN_VIOLATIONS": "1",
        VARIABLE: str(number),
    }
    played = subprocess.run([program, "--exact", f"{MODULE}::{CAMPAIGN}"], env=environment, capture_output=True, text=True)
    violation = re.search(r"^seed (\d+): (.*)$", played.stdout, re.MULTILINE)
    if violation:
        return int(violation[1]), violation[2][:120].replace("|", "/")
    if played.returncode and "something never happened" not in played.stdout:
        raise RuntimeError(f"{guards[number]['name']}: status {played.returncode}: {played.stdout}")
    return None, ""


def found_in_fortnights(program, number):
    for seed in range(SEEDS):
        environment = {**os.environ, "SNAPWARDEN_SEED": str(seed), VARIABLE: str(number)}
        command = [program, "--exact", f"{MODULE}::{CAMPAIGN}"]
        played = subprocess.run(command, env=environment, capture_output=True, text=True)
        lines = [line for line in played.stdout.splitlines() if line and line[0] not in " ]["]
        if "to repeat: " in played.stdout + played.stderr:
            day = next((line for line in lines if "seed " in line), "")
            last = next((place for place, line in enumerate(lines) if line.startswith("stack backtrace")), 0) - 1
            return seed, f"{day}: {lines[last][:90]}"
        if played.returncode:
            # Killed, or it did not begin: that finds nothing.
            raise RuntimeError(f"{guards[number]['name']}, seed {seed}: status {played.returncode}: {played.stdout}")
    return None, ""


CAMPAIGN = re.search(r"fn (whatever_goes_wrong_\w*)", (TREE / SOURCE).read_text())[1]
table = tomllib.loads((TREE / "tests" / "guards.toml").read_text())
guards = table["guard"]
copy()
switch(guards, table["judge"])
program = build()
meant = [number for number, guard in enumerate(guards) if WORD in guard["name"]]
missed = 0
# One campaign of years has every core busy.
found_by, at_once = (found_in_years, 1) if MODULE == "years" else (found_in_fortnights, os.cpu_count())
with ThreadPoolExecutor(at_once) as pool:
    for number, (seed, how) in zip(meant, pool.map(lambda number: found_by(program, number), meant)):
        missed += seed is None
        print(f"| {guards[number]['name']} | {'—' if seed is None else seed} | {how} |", flush=True)
sys.exit(f"without {missed} guards nothing went wrong" if missed else 0)
