"""What an error says to somebody in a browser: no Python, and what helps there instead.

The errors of the core speak to programmers ("call qmove.restore(model)"). Such sentences are left
out, and `way_out` names what helps, for which the frontend has words in each language.
"""

from __future__ import annotations

import re

import qmove_core as qmove
from qmove_core import for_hosts

_PYTHON = re.compile(
    r"\b(?:qmove|torch|comfy)\.\w|\w\([^)]*\)|\b\w+=\w|`|\bpip install\b|\b__\w+__\b"
    r"|\b(?:PYTORCH|CUDA|HIP|OMP)_[A-Z_]+\b"
)
_IN_BRACKETS = re.compile(r"\s*\((?:[^()]|\([^()]*\))*\)")
_SENTENCE = re.compile(r"(?<=[.!?])\s+")

_WAYS_OUT: tuple[tuple[type[BaseException], str], ...] = (
    (qmove.Pinned, "unpin"),
    (qmove.InUse, "wait"),
    (qmove.DeviceLost, "restart"),
    (qmove.CorruptedCopy, "reload"),
    (qmove.MetaTensorsPresent, "materialize"),
    (qmove.LiveAutogradGraph, "graph"),
    (qmove.CapturingGraph, "graph"),
)


def for_people(error: BaseException) -> str:
    """The message of an error without what only a program can do; never empty."""
    lines = [_without_python(line) for line in str(error).strip().splitlines()]
    said = "\n".join(line for line in lines if line.strip())
    return said or f"{type(error).__name__}; the log says more."


def way_out(error: BaseException) -> str:
    """What helps: a key of the frontend's texts. Empty where nobody knows."""
    if isinstance(error, qmove.NotEnoughMemory):
        return "ram" if error.place == "cpu" else "vram"
    if for_hosts.is_out_of_memory(error):
        return "vram"
    return next((key for kind, key in _WAYS_OUT if isinstance(error, kind)), "")


def told(error: BaseException) -> dict[str, str]:
    """Both, as plain data for an answer."""
    helps = way_out(error)
    return {"error": for_people(error)} | ({"advice": helps} if helps else {})


def _without_python(line: str) -> str:
    line = _IN_BRACKETS.sub(
        lambda found: "" if _PYTHON.search(found[0].strip()[1:-1]) else found[0], line
    )
    indent = line[: len(line) - len(line.lstrip())]
    kept = [part for part in _SENTENCE.split(line.strip()) if not _PYTHON.search(part)]
    return indent + " ".join(kept) if kept else ""
