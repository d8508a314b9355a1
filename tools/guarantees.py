"""Writes docs/guarantees.md: each promise, the tests of it, how many cases they have, and what the
long runs tried.

    python -m tools.guarantees

The promises and their files are in `PROMISES` below; the cases are those that pytest collects, the
long runs what `docs/results/faults.json` says of them (`make test-faults`).
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "guarantees.md"
RESULTS = ROOT / "docs" / "results"
LONG_RUNS = "## Long runs"
COUNTED = "Counted on {date}, at commit {commit}."


@dataclass(frozen=True)
class Promise:
    """What is promised, and the files that test it, from the repository's root."""

    name: str
    text: str
    files: tuple[str, ...]


def _files(room: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/{room}/test_{name}.py" for name in names)


PROMISES = (
    Promise(
        "Released",
        "After `park` the device holds 0 bytes of the model; what could not be released is reported with "
        "who holds it, also what `gc.freeze()` hides.",
        (
            *_files("guarantees", "released", "odd_parts", "odd_defaults"),
            *_files("model", "any_object", "places", "frozen_objects"),
            *_files("parking", "nothing_left"),
        ),
    ),
    Promise(
        "Exact",
        "After `restore` every byte, dtype, shape, stride, alias, subclass and attribute is as before.",
        (
            *_files("guarantees", "exact", "same_objects", "shared_storages"),
            *_files("model", "wrapper_subclasses", "bitsandbytes"),
            *_files("transfer", "verify", "copies"),
            *_files("parking", "histories", "changed_while_parked"),
        ),
    ),
    Promise(
        "Atomic",
        "An error, an out-of-memory, Ctrl-C or a host's interrupt at any point: the model is wholly where it "
        "was, or wholly where it was going; what fails after the commit is no failure of the move.",
        (
            *_files("guarantees", "atomic"),
            *_files("faults", "every_point", "the_faults_themselves"),
            *_files("transfer", "after_commit"),
            *_files("parking", "streaming_failures"),
            *_files("materialize", "materialize_failures"),
            *_files("requantize", "requantize_failures"),
        ),
    ),
    Promise(
        "Bounded",
        "A fixed staging size of VRAM and RAM beyond the model's own bytes. RAM, a cgroup, `ulimit` and free VRAM "
        "are checked before the first byte moves: what does not fit is refused, and no process is killed.",
        (
            *_files("guarantees", "bounded"),
            *_files("memory", "budget", "system_limits", "pressure", "mirror_ram"),
            *_files("parking", "swap_without_room_for_both"),
        ),
    ),
    Promise(
        "Idempotent",
        "Parking a parked model or restoring a resident one does nothing.",
        _files("guarantees", "idempotent"),
    ),
    Promise(
        "Quiet",
        "A resident model carries no hook and runs at full speed.",
        (*_files("guarantees", "quiet"), *_files("integrations", "same_hooks")),
    ),
    Promise(
        "Harmless",
        "Where everything fits, a ComfyUI with the pack moves not one byte more than without it, and ends in the "
        "same outputs.",
        (
            *_files("nodes/stages", "harmless"),
            *_files("nodes/real", "harmless", "real_comfyui"),
            *_files("nodes", "being_a_guest"),
        ),
    ),
    Promise(
        "Never wrong",
        "Whatever is used while it arrives, in any order of calls, gives what it gives on a model that never moved.",
        (
            *_files("faults", "histories"),
            *_files(
                "parking",
                "streaming_generations",
                "moves_while_arriving",
                "use_while_arriving",
                "use_without_a_call",
                "waking",
                "waking_kinds",
                "ordinary_pytorch",
                "same_weights_histories",
                "same_weights_twice",
                "same_weights_writes",
                "resized_storages",
                "park_in_part",
                "rolling",
                "rolling_kinds",
            ),
        ),
    ),
    Promise(
        "Threads and processes",
        "Moves, forwards and questions at once: right, or refused with a reason; no deadlock. Forks, children, copies "
        "and pickles of a model in any state; the end of a process waits for no move.",
        (
            *_files("faults", "threads", "processes", "exit_while_moving"),
            *_files("parking", "in_use"),
        ),
    ),
    Promise(
        "Memory",
        "Over many cycles VRAM, RAM, descriptors, maps and qmove's own books are flat, and RAM goes back to the system.",
        (
            *_files("faults", "memory"),
            *_files("memory", "arena", "arena_pinning", "refused_pins", "unlocking"),
        ),
    ),
    Promise(
        "Files",
        "A file that was changed or cut is an error, never wrong bytes and no crash; headers and offload "
        "indexes are checked, whatever they say.",
        (
            *_files("parking", "file_mirrors", "file_mirror_changes", "file_mirror_matching"),
            *_files("integrations", "weights_map", "hostile_files"),
            *_files("cli", "inspect_saved"),
            *_files("materialize", "reading", "files_cut_while_read"),
        ),
    ),
    Promise(
        "Parked on disk",
        "Killed at any write, on a full disk, in a harmed folder: the model is whole where it was, or an error names "
        "what is wrong; what comes back is what was parked, byte for byte.",
        (*_files("parking", "disk", "disk_killed", "attach"), *_files("memory", "disk_files")),
    ),
    Promise(
        "Loaded once",
        "In ComfyUI a loader with equal inputs and unchanged files does not run again, in any workflow, within a budget "
        "of RAM.",
        (
            *_files("nodes/pool", "staying_loaded", "budget", "contract"),
            *_files("nodes/real", "models_stay_loaded"),
        ),
    ),
    Promise(
        "On lease",
        "A model of a `ModelPool` that is on lease is parked by nobody; budgets hold; first come, first served; a pool is whole "
        "after whatever fails.",
        _files("pool", "model_pool", "leases", "states"),
    ),
    Promise(
        "Under other libraries' hooks",
        "Models under the offload hooks of accelerate and diffusers, and those that transformers loads into RAM, keep every "
        "promise above.",
        _files("integrations", "accelerate_hook", "components_manager", "from_pretrained"),
    ),
    Promise(
        "Every kind",
        "What cannot be parked rightly is refused or rebuilt by name; all other kinds of quantized models pass the same checks "
        "([which](kinds.md)).",
        _files("kinds", "kinds"),
    ),
    Promise(
        "Hostile requests",
        "Whatever is sent to a route of the pack is answered or refused in JSON, with a reason; no page of another "
        "site and no GET changes anything; waiting requests take nothing from others.",
        _files(
            "nodes/routes", "hostile_requests", "other_sites", "waiting_requests", "lending_routes"
        ),
    ),
    Promise(
        "No foreign code",
        "Nothing that is shipped unpickles or evaluates what it is given.",
        (*_files("nodes", "what_is_shipped"), "tests/test_no_foreign_code.py"),
    ),
)


def main() -> None:
    """Counts the cases, and writes the document."""
    git = ["git", "describe", "--always", "--abbrev=12", "--exclude=*"]
    commit = subprocess.run(git, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    today = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    text = render(collected(), today, commit.strip()) + long_runs()
    DOCUMENT.write_text(text, encoding="utf-8")
    print(f"wrote {DOCUMENT.relative_to(ROOT)}")


def collected() -> dict[str, int]:
    """How many cases pytest collects of each file that is named."""
    files = sorted({file for promise in PROMISES for file in promise.files})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider"]
    ended = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(ended.stdout[-4000:] + ended.stderr[-4000:])
    return {file: int(n) for file, n in re.findall(r"^(\S+\.py): (\d+)$", ended.stdout, re.M)}


def render(cases: Mapping[str, int], date: str, commit: str) -> str:
    """The document without its long runs.

    Args:
        cases: by file.
        date, commit: when they were counted, and of which version.
    """
    total = sum(cases[file] for file in sorted({f for p in PROMISES for f in p.files}))
    lines = [
        "# What is promised, and how it is tested",
        "",
        "Written by `python -m tools.guarantees`; the promises stand there. A case is one that pytest counts; many of them",
        "try hundreds of points, bodies or steps each. All run in `make test`, on a real GPU or the simulated one; those in",
        "`tests/nodes/real` need a ComfyUI. What only many tries find is tried longer by `make test-faults`: see below.",
        "",
        COUNTED.format(date=date, commit=commit) + f" All in all {total:,} cases.",
        "",
        "| promise | what holds | tested in | cases |",
        "|---|---|---|---|",
    ]
    for promise in PROMISES:
        files = "<br>".join(f"[{file[6:]}](../{file})" for file in promise.files)
        counts = "<br>".join(f"{cases[file]:,}" for file in promise.files)
        lines.append(f"| **{promise.name}** | {promise.text} | {files} | {counts} |")
    return "\n".join(lines) + "\n\n"


def counts_in(text: str) -> tuple[dict[str, int], str, str]:
    """The cases of each file, the date and the commit that a document names."""
    cases: dict[str, int] = {}
    for row in re.findall(r"^\| \*\*.*$", text, re.M):
        files, counts = row.split(" | ")[2:4]
        named = re.findall(r"\(\.\./([^)]*)\)", files)
        numbers = [int(n.replace(",", "")) for n in counts.rstrip(" |").split("<br>")]
        cases |= dict(zip(named, numbers, strict=True))
    pattern = re.escape(COUNTED).replace(r"\{date\}", r"(\S+)").replace(r"\{commit\}", r"(\S+)")
    found = re.search(pattern, text)
    if found is None:
        raise ValueError("it does not say when its cases were counted")
    return cases, found[1], found[2]


def long_runs() -> str:
    """What docs/results says of the newest long runs. (Its other files have pages of their own.)"""
    lines = [LONG_RUNS, ""]
    path = RESULTS / "faults.json"
    tried = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [
        f"| {suite} | {_figures(what)} | {what.get('date', '')} | {what.get('commit', '')} "
        f"| {what.get('minutes', '')} |"
        for suite, what in sorted(tried.items())
    ]
    if not rows:
        lines.append("`make test-faults` writes its results to `docs/results`; none are there yet.")
    else:
        lines += ["| suite | tried | when | commit | minutes |", "|---|---|---|---|---|", *rows]
    return "\n".join(lines) + "\n"


def _figures(what: Mapping[str, Any]) -> str:
    numbers = {k: v for k, v in what.items() if type(v) is int and k not in ("seed", "minutes")}
    if isinstance(what.get("failures"), list):
        numbers["failures"] = len(what["failures"])
    return ", ".join(f"{value:,} {name}" for name, value in numbers.items())


if __name__ == "__main__":
    main()
