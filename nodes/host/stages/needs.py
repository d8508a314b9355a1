"""How much VRAM a node takes beyond what was there before, learned from its runs.

A need is known by the node's class, the values chosen on it, and the shapes of the tensors on its
wires: not by its id, which is new in each round of a loop. For what a node has not been seen with,
that run counts which is most like it and no larger. Needs are kept on disk: a restart forgets
nothing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import comfy, meter
from ..guard import never_fails

log = logging.getLogger("qmove")

# Allocators fragment, and batches differ a little. ComfyUI adds the same to its own figures.
HEADROOM = 1.1
FORMAT = 1  # of the file
MOST_OF_A_CLASS = 32
MOST_CLASSES = 1000


@dataclass(frozen=True)
class Signature:
    """What a node's need depends on.

    Attributes:
        node_class: the name of its class.
        values: what was chosen on it, by the input's name: numbers, switches, files.
        shapes: of the tensors on its wires, with their dtypes, in the order of the wires.
    """

    node_class: str
    values: tuple[tuple[str, Any], ...] = ()
    shapes: tuple[str, ...] = ()

    def likeness(self, other: Signature) -> int:
        """How much is the same."""
        same_shapes = sum(a == b for a, b in zip(self.shapes, other.shapes, strict=False))
        return len(set(self.values) & set(other.values)) + same_shapes

    def is_no_larger_than(self, other: Signature) -> bool:
        """Whether no number and no tensor of it is larger than that of the other."""
        theirs = dict(other.values)
        numbers = [(n, v) for n, v in self.values if isinstance(v, (int, float))]
        return (
            all(isinstance(theirs.get(n), (int, float)) and v <= theirs[n] for n, v in numbers)
            and len(self.shapes) <= len(other.shapes)
            and all(map(_is_no_larger, self.shapes, other.shapes))
        )


def _is_no_larger(shape: str, other: str) -> bool:
    return _elements(shape) <= _elements(other)


def _elements(shape: str) -> int:
    sizes = shape.partition(" ")[0]
    return math.prod(map(int, sizes.split("x"))) if sizes else 1


@dataclass
class Need:
    """Bytes that a node took at its peak, by device, the most of all its runs.

    Attributes:
        first: in a process that runs the node for the first time.
        again: without what the node keeps for itself from its first run on (its own model).
        ran_before: whether this process has run the node, and it has what it keeps.
    """

    first: dict[torch.device, int] = field(default_factory=dict)
    again: dict[torch.device, int] = field(default_factory=dict)
    ran_before: bool = False

    def now(self) -> dict[torch.device, int]:
        """What it takes now, with some headroom."""
        taken = self.again if self.ran_before else self.first
        return {device: int(nbytes * HEADROOM) for device, nbytes in taken.items()}


@dataclass
class Measurement:
    """A node that runs, and the bytes that were allocated when it began, by device."""

    signature: Signature
    allocated: dict[torch.device, int] = field(default_factory=dict)


class Needs:
    """What is known of all nodes; it is read from its file when it is first asked."""

    def __init__(self, file: Path | None = None) -> None:
        """`file` is where needs are kept; None keeps them for this process only."""
        self._file = file
        self._lock = threading.Lock()
        self._classes: dict[str, dict[Signature, Need]] | None = None
        self._changed = False

    def known(self, signature: Signature) -> tuple[dict[torch.device, int], bool] | None:
        """Bytes that the node will take by device, and whether exactly this was seen before.

        What is like it was seen, and took so much; None for a class that never ran.
        """
        with self._lock:
            of_class = self._read().get(signature.node_class)
            if not of_class:
                return None
            exact = of_class.get(signature)
            if exact is not None:
                return exact.now(), True
            # A run of smaller things takes no more; one of larger things may have taken too much.
            smaller = [
                seen
                for seen, need in reversed(of_class.items())
                if any(need.first.values()) and seen.is_no_larger_than(signature)
            ]
            if not smaller:
                return {}, False
            return of_class[max(smaller, key=signature.likeness)].now(), False

    def learn(
        self,
        signature: Signature,
        peak: Mapping[torch.device, int],
        kept: Mapping[torch.device, int],
    ) -> None:
        """Takes what a run took at its peak, and what of that the node keeps for itself."""
        with self._lock:
            classes = self._read()
            of_class = classes.pop(signature.node_class, {})
            need = of_class.pop(signature, Need())
            for device, nbytes in peak.items():
                again = nbytes - kept.get(device, 0)
                self._raise(need.first, device, nbytes)
                self._raise(need.again, device, again)
            need.ran_before = True
            of_class[signature] = need  # the latest comes last
            classes[signature.node_class] = of_class
            for old in list(of_class)[:-MOST_OF_A_CLASS]:
                del of_class[old]
            for name in list(classes)[:-MOST_CLASSES]:
                del classes[name]

    def _raise(self, known: dict[torch.device, int], device: torch.device, nbytes: int) -> None:
        if nbytes > known.get(device, -1):
            known[device] = nbytes
            self._changed = True

    def save(self) -> None:
        """Writes the file if something was learned: beside it first, so that it is always whole."""
        with self._lock:
            if self._file is None or not self._changed:
                return
            classes = {
                name: [_to_json(signature, need) for signature, need in of_class.items()]
                for name, of_class in self._read().items()
            }
            self._changed = False
        self._file.parent.mkdir(parents=True, exist_ok=True)
        beside = self._file.with_suffix(f".{os.getpid()}.tmp")
        beside.write_text(json.dumps({"format": FORMAT, "classes": classes}), encoding="utf-8")
        beside.replace(self._file)

    def _read(self) -> dict[str, dict[Signature, Need]]:
        if self._classes is None:
            self._classes = {}
            if self._file is not None and self._file.is_file():
                try:
                    self._classes = _from_json(json.loads(self._file.read_text(encoding="utf-8")))
                except Exception as error:  # a file that anything may have happened to
                    log.warning("%s is not used: %s. Needs are learned anew.", self._file, error)
        return self._classes


def _to_json(signature: Signature, need: Need) -> dict[str, Any]:
    return {
        "values": signature.values,
        "shapes": signature.shapes,
        "first": {str(device): nbytes for device, nbytes in need.first.items()},
        "again": {str(device): nbytes for device, nbytes in need.again.items()},
    }


def _from_json(saved: Any) -> dict[str, dict[Signature, Need]]:
    if saved["format"] != FORMAT:
        return {}
    classes: dict[str, dict[Signature, Need]] = {}
    for name, entries in saved["classes"].items():
        of_class = classes[name] = {}
        for entry in entries:
            values = tuple((str(key), value) for key, value in entry["values"])
            signature = Signature(name, values, tuple(map(str, entry["shapes"])))
            of_class[signature] = Need(_by_device(entry["first"]), _by_device(entry["again"]))
    return classes


def _by_device(saved: Mapping[str, Any]) -> dict[torch.device, int]:
    return {torch.device(name): int(nbytes) for name, nbytes in saved.items()}


learned = Needs()


def use_file_of_host() -> None:
    """From now on needs are kept in ComfyUI's user folder."""
    global learned
    folder = comfy.own_directory()
    learned = Needs(None if folder is None else folder / "needs.json")


@never_fails("keep what it has learned of nodes", None)
def save() -> None:
    learned.save()


def begin(signature: Signature) -> Measurement:
    """Starts to measure. Each device has one peak counter, so measurements cannot overlap."""
    measurement = Measurement(signature)
    # Without counters (mps) needs stay unknown.
    for device, stats in meter.all_stats().items():
        if stats:
            torch.get_device_module(device).reset_peak_memory_stats(device)
        measurement.allocated[device] = meter.bytes_of(stats, "allocated", "current")
    return measurement


def taken(
    measurement: Measurement, stats: meter.Stats | None = None
) -> tuple[dict[torch.device, int], dict[torch.device, int]]:
    """Bytes beyond those of the beginning by device: at most, and still.

    Args:
        measurement: of the node.
        stats: the allocator's counters now, of whoever has read them.
    """
    stats = meter.all_stats() if stats is None else stats
    peak, left = {}, {}
    for device, before in measurement.allocated.items():
        peak[device] = max(0, meter.bytes_of(stats[device], "allocated", "peak") - before)
        left[device] = max(0, meter.bytes_of(stats[device], "allocated", "current") - before)
    return peak, left
