"""docs/benchmark.md, from the results."""

from __future__ import annotations

from typing import Any

from . import rows

SIMULATED = """\
**The GPU is a simulated one.** Bytes, copies, what is left in VRAM, its peak and equality are exact. The seconds of "PCIe 4" and
"PCIe 5" are those of the simulator's link model (`simcuda/link.py` has its constants and their sources): copies, pinning and
launches take time there, while kernels, the host's own work and reading files take none. So qmove's digest, a read of the weights
at the device's bandwidth, is not in them, nor is the time that anybody's Python takes. "Wall here" is this machine, where a copy
over the link is one within host memory, and qmove's digests, matrix products made for GPUs, are most of its time. "PCIe 5" is
five times a swap there and back, as that clock repeats itself exactly. On a real GPU the same command gives real seconds.

A copy from or to pageable memory, as plain `.to()` makes it, has no rate of its own: others measured 6 to 12 GB/s to the device,
and from it 6 to 10 GB/s into pages that were touched before, 1.4 GB/s into fresh ones (`simcuda/link.py` has the sources). "PCIe 4"
and "PCIe 5" take the fast end, "PCIe 4, slow pageable" the slow one: fresh pages.
"""

READING = """\
Two models of the same kind take turns; only one of them is to be in VRAM. Each contender has a process of its own and does what
its documentation shows for that, with pinned memory and streams where it has them. The first two swaps are apart from the ten,
because some prepare things in them. One forward of the incoming model belongs to a swap. "Equal": the output is that of a fresh
model, and every byte is that of its file. "Keeps a change": a weight that was changed in place, as merging a LoRA does, is still
changed two swaps later. RAM is what the process had of its own at most, from its start on, sampled, without page cache and VRAM.
"""

REACHED = """\
Bold is what was not reached. "Link" and "pinning" are the bytes at the bare rate of one large pinned copy, and of locking memory
that was touched before. The second park copies none of the model; its digests, 32 bytes for each 512 KiB or smaller storage, do
cross the link. "Streaming" is a restore with `stream=True` and the first forward, whose kernels take so many times the transfer;
"compute" is that forward on a resident model, with its launches. "In a third of its VRAM" is a forward inside of
`resident(model, at_most=...)`, the second one there; "transfer" is then what the bytes that came in take.
"""


LITTLE_ROOM = """\
Two models of {} each in 120 tensors take turns ten times, the first of which copies out. "RAM for one": `ram_limit` is one model and
four times its largest storage. "VRAM for one": one model and 64 MiB. RAM is what qmove holds, mirrors and spare memory included.
"""


FORWARDS = """\
A restored model beside a twin that never moved: the shortest of many forwards of each, in turns, before a park and after the restore, in
{} rounds. On the simulated GPU it is CPU time of the thread, whose kernels run in it. "Operators" are those of one forward: the fast paths
are taken again.
"""


def page(results: dict[str, Any]) -> str:
    """The whole page, as Markdown."""
    parts = [
        "# Benchmark",
        "Made by `make bench`; do not edit.",
        READING,
        *([SIMULATED] if results["simulated"] else []),
    ]
    parts += [
        _machine(results["machine"]),
        "## Ten swaps of two models",
        "![Seconds of ten swaps](benchmark.svg)",
    ]
    for workload in results["workloads"]:
        parts += [
            f"### {workload['name']}, {rows.readable(workload['nbytes'])} each",
            _swaps(results, workload),
        ]
        parts += ["\n".join(f"- {remark}" for remark in rows.remarks(workload))]
    if results.get("little room"):
        nbytes = next((t["nbytes"] for t in results["little room"] if "error" not in t), 0)
        parts += [
            "## Swaps in little room",
            LITTLE_ROOM.format(rows.readable(nbytes)),
            _table(*_split(rows.little_room(results))),
        ]
    if results.get("forwards"):
        rounds = max(measured.get("rounds", 0) for measured in results["forwards"])
        parts += [
            "## A forward before a park and after a restore",
            FORWARDS.format(rounds),
            _table(*_split(rows.forwards(results))),
        ]
    parts += ["## What was to be reached", REACHED, _table(*_split(rows.reached_by_link(results)))]
    parts += ["Wall time of this machine:", _table(*_split(rows.reached_on_the_wall(results)))]
    parts += [
        "## As it grows",
        "![Seconds by tensors and by bytes](benchmark-growth.svg)",
        _missing(results),
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['date']}, {machine['device']}, {machine['system']}, {machine['processor']}, {machine['cores']} cores, "
        f"{machine['ram_bytes'] / 1e9:.0f} GB of RAM, Python {machine['python']}, {versions}."
    )


def _swaps(results: dict[str, Any], workload: dict[str, Any]) -> str:
    lines = [rows.row(results, name, figures) for name, figures in workload["contenders"].items()]
    return _table(rows.headings(results), lines)


def _split(lines: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    return lines[0], lines[1:]


def _missing(results: dict[str, Any]) -> str:
    points = [*results["by tensors"], *results["by bytes"]]
    return "\n".join(
        f"- {point['tensors']:,} tensors, {rows.readable(point['nbytes'])}: {point['error']}"
        for point in points
        if "error" in point
    )


def _table(headings: list[str], lines: list[list[str]]) -> str:
    marks = ["---" if index == 0 else "--:" for index in range(len(headings))]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headings, marks, *lines])
