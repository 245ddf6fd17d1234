"""Which changed operator, condition or result does no test notice?

    python3 -m venv target/mutants-venv
    target/mutants-venv/bin/pip install tree-sitter==0.25.2 tree-sitter-rust==0.24.2
    cargo install cargo-mutants --locked
    target/mutants-venv/bin/python tests/mutants.py [unit|integration [PATTERN]]

cargo-mutants lists the mutants of the files below; with PATTERN, those whose description it finds. They are all built into one
program, in a copy of the tree below target/mutants, each behind a number that an environment variable has: so a mutant costs
a run of tests and no build. `unit` tries the unit tests of each one's module, `integration` then those integration tests that
decide about snapshots, for what survived. Prints what survives, and keeps all results in target/mutants/results: what was
noticed is not tried again. SNAPWARDEN_JOBS (as many as there are cores) is how many are tried at a time.
"""
import hashlib
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import tree_sitter_rust
from tree_sitter import Language, Parser

TREE = pathlib.Path(__file__).resolve().parent.parent
COPY = TREE / "target" / "mutants" / "tree"
RESULTS = TREE / "target" / "mutants" / "results"
STAGE = sys.argv[1] if len(sys.argv) > 1 else "unit"
PATTERN = sys.argv[2] if len(sys.argv) > 2 else ""
JOBS = int(os.environ.get("SNAPWARDEN_JOBS", os.cpu_count()))
VARIABLE = "SNAPWARDEN_MUTANT"
FILES = [
    "src/retention/**/*.rs",
    "src/run/guard.rs",
    "src/run/delete.rs",
    "src/run/archive_prune.rs",
    "src/run/archive_retention.rs",
    "src/archive/proof.rs",
    "src/archive/verify.rs",
]
# What decides of snapshots, played as a whole.
INTEGRATION = ["prune", "guard", "years", "archive", "changes", "gate", "plan"]
LONGEST_S = 100
PARSER = Parser(Language(tree_sitter_rust.language()))
SWITCH = f"""
/// The mutant that is on.
pub fn mutant(number: u32) -> bool {{
    static ON: std::sync::OnceLock<u32> = std::sync::OnceLock::new();
    *ON.get_or_init(|| std::env::var("{VARIABLE}").ok().and_then(|on| on.parse().ok()).unwrap_or(u32::MAX)) == number
}}
"""


def copy():
    COPY.mkdir(parents=True, exist_ok=True)
    listed = subprocess.run(["git", "ls-files"], cwd=TREE, capture_output=True, text=True, check=True)
    for file in listed.stdout.splitlines():
        (COPY / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(TREE / file, COPY / file)
    manifest = COPY / "Cargo.toml"
    manifest.write_text(re.sub(r"(?ms)^\[lints[^\n]*\n.*?(?=^\[|\Z)", "", manifest.read_text()))
    library = COPY / "src" / "lib.rs"
    library.write_text(library.read_text() + SWITCH)


def list_mutants():
    files = [part for pattern in FILES for part in ("-f", pattern)]
    listed = subprocess.run(
        ["cargo", "mutants", "--list", "--json", *files], cwd=TREE, capture_output=True, text=True, check=True
    )
    return [mutant for mutant in json.loads(listed.stdout) if "/tests" not in mutant["file"]]


def name_of(mutant):
    return re.sub(r":\d+:\d+:", ":", mutant["name"])


def offset(starts, place):
    return starts[place["line"] - 1] + place["column"] - 1


def node_at(root, start, end, kinds):
    """The smallest node of one of these kinds that holds the span."""
    node = root.descendant_for_byte_range(start, end)
    while node is not None and node.type not in kinds:
        node = node.parent
    return node


def edits_of(text, root, mutant, number, starts):
    """Where the mutant goes, as (start, end, of the text there the new one)."""
    start, end = (offset(starts, mutant["span"][edge]) for edge in ("start", "end"))
    on, new = f"crate::mutant({number})", mutant["replacement"]
    source = lambda node: text[node.start_byte : node.end_byte].decode()
    if mutant["genre"] == "FnValue":
        block = node_at(root, start, end, {"block"})
        at = block.start_byte + 1
        return at, at, lambda _: f" if {on} {{ return {new}; }} "
    if mutant["genre"] in ("BinaryOperator", "UnaryOperator"):
        node = node_at(root, start, end, {"binary_expression", "unary_expression", "compound_assignment_expr"})
        if node is None:
            return None
        head, tail = text[node.start_byte : start].decode(), text[end : node.end_byte].decode()
        other = f"{head}{new}{tail}" if mutant["genre"] == "BinaryOperator" else tail
        return node.start_byte, node.end_byte, lambda old: f"(if {on} {{ {other} }} else {{ {old} }})"
    if mutant["genre"] == "MatchArmGuard":
        return start, end, lambda old: f"(if {on} {{ {new} }} else {{ {old} }})"
    if mutant["genre"] == "MatchArm":
        arm = node_at(root, start, end, {"match_arm"})
        pattern = arm.child_by_field_name("pattern") if arm else None
        if pattern is None:
            return None
        condition = pattern.child_by_field_name("condition")
        if condition is None:
            return pattern.end_byte, pattern.end_byte, lambda _: f" if !{on} "
        return condition.start_byte, condition.end_byte, lambda old: f"!{on} && ({old})"
    return None


def apply(text, edits):
    """Edits hold each other or are apart; the inner ones are made in what the outer ones keep."""

    def within(start, end, inside):
        inside, made, at = sorted(inside, key=lambda edit: (edit[0], -edit[1])), b"", start
        while inside:
            first = inside.pop(0)
            deeper = [edit for edit in inside if edit[1] <= first[1] and first[0] < first[1]]
            inside = [edit for edit in inside if edit not in deeper]
            made += text[at : first[0]] + first[2](within(first[0], first[1], deeper).decode()).encode()
            at = max(at, first[1])
        return made + text[at:end]

    return within(0, len(text), edits)


def write(mutants, left_out):
    by_file = {}
    for number, mutant in enumerate(mutants):
        by_file.setdefault(mutant["file"], []).append((number, mutant))
    lines = {}
    for file, group in by_file.items():
        text = (TREE / file).read_bytes()
        starts = [0]
        for line in text.split(b"\n"):
            starts.append(starts[-1] + len(line) + 1)
        root = PARSER.parse(text).root_node
        edits = []
        for number, mutant in group:
            if number in left_out:
                continue
            edit = edits_of(text, root, mutant, number, starts)
            if edit is None:
                left_out.add(number)
            else:
                edits.append(edit)
        (COPY / file).write_bytes(apply(text, edits))
        lines[file] = (COPY / file).read_text().split("\n")
    return lines


def build(mutants):
    """Without those that do not compile."""
    environment = {**os.environ, "RUSTFLAGS": "-A warnings", "CARGO_TARGET_DIR": str(TREE / "target" / "mutants" / "build")}
    environment.setdefault("CARGO_PROFILE_DEV_OPT_LEVEL", "1")
    left_out = set()
    while True:
        lines = write(mutants, left_out)
        command = ["cargo", "test", "--locked", "--lib", "--test", "all", "--no-run", "--message-format=json"]
        built = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)
        found, programs, errors = set(), {}, []
        for line in built.stdout.splitlines():
            message = json.loads(line)
            if message.get("executable") and message["profile"]["test"]:
                programs[message["target"]["name"]] = message["executable"]
            if message["reason"] != "compiler-message" or message["message"]["level"] != "error":
                continue
            errors.append(message["message"]["rendered"])
            for span in message["message"]["spans"]:
                if span["file_name"] in lines:
                    # An arm without which a match is not exhaustive is below what the error shows.
                    is_match = "non-exhaustive" in message["message"]["message"]
                    for line in lines[span["file_name"]][span["line_start"] - 1 : span["line_end"] + 15 * is_match]:
                        here = {int(number) for number in re.findall(r"mutant\((\d+)\)", line)}
                        found |= {number for number in here if not is_match or mutants[number]["genre"] == "MatchArm"}
        if built.returncode == 0:
            print(f"{len(mutants) - len(left_out)} of {len(mutants)} mutants compile", flush=True)
            return left_out, programs
        if not found:
            sys.exit("\n".join(errors) or built.stderr)
        print(f"{len(found)} do not compile", flush=True)
        left_out |= found


def notices(program, number, filters):
    environment = {**os.environ, VARIABLE: str(number), "RUST_BACKTRACE": "0", "SNAPWARDEN_SEEDS": "20"}
    command = [program, *filters, "--test-threads", "1"]
    try:
        played = subprocess.run(
            command, cwd=COPY, env=environment, capture_output=True, text=True, timeout=LONGEST_S, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return "a test that did not end"
    if played.returncode == 0:
        return None
    failed = re.search(r"(?m)^test (\S+) \.\.\. FAILED", played.stdout)
    return failed[1] if failed else "a test that ended the program"


def unit_tests(file):
    return {"retention": ["retention::"], "archive": ["archive::"]}.get(file.split("/")[1], ["run::"])


def main():
    copy()
    mutants = list_mutants()
    left_out, programs = build(mutants)
    RESULTS.mkdir(parents=True, exist_ok=True)

    def one(number):
        mutant = mutants[number]
        result = RESULTS / hashlib.sha256(mutant["name"].encode()).hexdigest()[:16]
        before = result.read_text().split("\n")[1] if result.exists() else ""
        if before not in ("", f"survived {STAGE}", "survived unit"):
            return
        if before != f"survived {STAGE}":
            tests = (programs["snapwarden"], unit_tests(mutant["file"])) if STAGE == "unit" else (programs["all"], INTEGRATION)
            before = notices(tests[0], number, tests[1]) or f"survived {STAGE}"
            result.write_text(f"{mutant['name']}\n{before}\n")
        if before.startswith("survived"):
            print(mutant["name"], flush=True)

    with ThreadPoolExecutor(JOBS) as pool:
        list(pool.map(one, [n for n in range(len(mutants)) if n not in left_out and re.search(PATTERN, mutants[n]["name"])]))


main()
