"""The errors of qmove: what was asked, which figures are in the way, and what to do now."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path

import torch

from .actions import Action
from .base_errors import MissingDependency as MissingDependency
from .base_errors import QMoveError as QMoveError


def readable_bytes(nbytes: int) -> str:
    """`nbytes` in the unit a person would choose: "512 B", "1.50 KiB", "81.00 GiB"."""
    if abs(nbytes) < 1024:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if abs(size) < 1024:
            return f"{size:.2f} {unit}"
    return f"{size / 1024:.2f} TiB"


def counted(count: int, noun: str) -> str:
    """A number with its noun, which takes an s in the plural: "1 tensor", "3 tensors"."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def first_of(names: Sequence[str]) -> str:
    """The first names of a list that may be long: "a, b, c, d, e and 12 more"."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class NotEnoughMemory(QMoveError):
    """A move would not fit. Nothing was moved.

    Attributes:
        place: "cuda:0", "cpu", ...
        needed, free: bytes.
        limit: what decides how much is free ("free VRAM", "cgroup limit", ...).
    """

    def __init__(
        self, action: Action, place: str, needed: int, free: int, limit: str, advice: str
    ) -> None:
        self.place, self.needed, self.free, self.limit = place, needed, free, limit
        super().__init__(
            f"{action.gerund} needs {readable_bytes(needed)} ({counted(needed, 'byte')}) on "
            f"{place}. Free there: {readable_bytes(free)} ({counted(free, 'byte')}; limit: {limit}"
            f"). {action.nothing_done.capitalize()}. {advice}"
        )


class NotEnoughDeviceMemory(NotEnoughMemory, torch.OutOfMemoryError):
    """The same for an accelerator: also what programs catch that then free VRAM, or use tiles."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error, in any of its faces, says that an accelerator has no room. (That the host
    has none is another thing: parking makes that worse. See `is_out_of_host_memory`.)

    PyTorch raises `OutOfMemoryError` from its own allocator; what the driver refuses comes as an
    AcceleratorError (from 2.8) or a RuntimeError, and what a library of it refuses with its own
    words ("CUBLAS_STATUS_ALLOC_FAILED").
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, QMoveError):
        return False
    if getattr(error, "error_code", None) == _MEMORY_ALLOCATION:
        return True
    text = str(error).lower()
    return "out of memory" in text or "alloc_failed" in text


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether an error says that the system gives no more RAM: Python's own, that of a map, on
    Windows also that the commit limit is reached, and what PyTorch's CPU allocator raises."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM or getattr(error, "winerror", None) in _NO_RAM_ON_WINDOWS
    if isinstance(error, RuntimeError) and not isinstance(error, QMoveError):
        return "defaultcpuallocator" in str(error).lower()
    return isinstance(error, MemoryError)


# ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT ("the paging file is too ...")
_NO_RAM_ON_WINDOWS = (8, 14, 1455)
_MEMORY_ALLOCATION = 2  # cudaErrorMemoryAllocation, and HIP's of the same meaning


# What spoils a CUDA or HIP context for good, by number and by words (driver_types.h).
_SPOILING = {214, 700, 702, 709, 710, *range(714, 720)}
_SPOILING_WORDS = (
    "illegal memory access",
    "illegal address",
    "misaligned address",
    "illegal instruction",
    "device-side assert",
    "unspecified launch failure",
    "uncorrectable ecc",
    "hardware exception",
    "context is destroyed",
)


def may_spoil_the_device(error: BaseException) -> bool:
    """Whether after such an error every further call may fail, until the process is restarted."""
    if not isinstance(error, RuntimeError) or isinstance(error, QMoveError):
        return False
    if getattr(error, "error_code", None) in _SPOILING:
        return True
    text = str(error).lower()
    return any(words in text for words in _SPOILING_WORDS)


class DeviceLost(QMoveError):
    """The driver's context on `device` is spoilt: a kernel of anybody in this process has read or
    written where it must not, or the hardware failed. What is parked is whole."""

    def __init__(self, action: Action, device: str, error: BaseException) -> None:
        self.device = device
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        super().__init__(
            f"Cannot {action.infinitive}: this process can use {device} no more ({reason}). "
            f"{action.nothing_done.capitalize()}. What is parked is whole in RAM, where it can be "
            "saved; what is on the device is lost. Restart the program. The cause came earlier; "
            "with CUDA_LAUNCH_BLOCKING=1 in the environment the error comes where it is."
        )


class CapturingGraph(QMoveError):
    """The calling thread captures a graph (`torch.cuda.graph`), in which nothing can move."""

    def __init__(self, action: Action) -> None:
        super().__init__(
            f"Cannot {action.infinitive}: this thread captures a graph of the device's work, which "
            f"would replay the copies with the addresses of now. {action.nothing_done.capitalize()}"
            ". Restore the model before the capture begins, and keep it home while the graph is "
            "used (qmove.resident, qmove.pin)."
        )


class CorruptedCopy(QMoveError):
    """Copies of the tensors in `names` differ from their sources. The model stays where it was."""

    def __init__(self, action: Action, names: Sequence[str]) -> None:
        self.names = list(names)
        super().__init__(
            f"{action.gerund} failed: the digest of the copy differs from that of the source, for "
            f"{first_of(self.names)}. The model stays where it was and keeps its bytes. Try again; "
            "if it happens again, suspect the hardware (memory, riser, overclocking) and reload "
            "the model."
        )


class UnknownDevice(QMoveError, ValueError):
    """A device that this machine does not have, or a name that is no device."""


class NoTensors(QMoveError, ValueError):
    """The object holds no tensor that qmove could find."""


class CannotMove(QMoveError):
    """Some storages cannot be moved; `reasons` has (name, reason) for each. Nothing was moved."""

    def __init__(self, action: Action, reasons: Sequence[tuple[str, str]]) -> None:
        self.reasons = list(reasons)
        super().__init__(
            f"Cannot {action.infinitive}, so {action.nothing_done}:\n{_lines(self.reasons)}"
        )


class MetaTensorsPresent(QMoveError):
    """The model has meta tensors: their data is not in memory, so there are no bytes to move."""

    def __init__(self, action: Action, why: str, advice: str) -> None:
        super().__init__(
            f"Cannot {action.infinitive}: {why}. {action.nothing_done.capitalize()}. {advice}"
        )


class OffloadedDataError(QMoveError):
    """The data of meta tensors is not where the dispatch says, or does not fit the model.

    `problems` has (name, problem) for each.
    """

    def __init__(self, action: Action, problems: Sequence[tuple[str, str]], advice: str) -> None:
        self.problems = list(problems)
        super().__init__(
            f"Cannot {action.infinitive}, so {action.nothing_done}:\n{_lines(self.problems)}\n"
            f"{advice}"
        )


class ChangesNotKept(QMoveError):
    """Weights were changed in a way that the dispatch cannot hold.

    The model stays materialized, with the changes. `reasons` has (name, reason) for each.
    """

    def __init__(self, action: Action, reasons: Sequence[tuple[str, str]]) -> None:
        self.reasons = list(reasons)
        super().__init__(
            f"Cannot {action.infinitive}, so the model stays as it is, in memory and without its "
            f"dispatch:\n{_lines(self.reasons)}"
        )


class LiveAutogradGraph(QMoveError):
    """A live autograd graph needs weights of the model.

    It would keep their bytes in VRAM, or find them on another device.
    """

    def __init__(self, action: Action, names: Sequence[str]) -> None:
        super().__init__(
            f"Cannot {action.infinitive}: a live autograd graph needs {len(names)} of its tensors, "
            f"the first is {names[0]!r}. {action.nothing_done.capitalize()}. Run the model under "
            "torch.no_grad() or delete its outputs and losses; or pass allow_live_graph=True: then "
            "what the graph has saved stays in VRAM, and its backward may find weights on another "
            "device."
        )


class InUse(QMoveError):
    """Another thread uses the model."""

    def __init__(self, action: Action, thread: str, how: str) -> None:
        super().__init__(
            f"Cannot {action.infinitive}: another thread, {thread!r}, {how}. "
            f"{action.nothing_done.capitalize()}. Try again when it has ended."
        )


class Pinned(QMoveError):
    """The model, or a part of it that would have to go along, is pinned where it is, or on lease
    from a pool; `holder` says who has it then."""

    def __init__(self, action: Action, name: str, holder: str | None = None) -> None:
        self.holder = holder
        what, way_out = "pin (qmove.pin)", f"To let it go, call qmove.unpin(model) with that {name}"
        if holder is not None:
            what, way_out = f"lease of {holder}", "Try again when that has ended"
        super().__init__(
            f"Cannot {action.infinitive}: a {what} keeps {name} where it is. "
            f"{action.nothing_done.capitalize()}. {way_out}{' first' * (holder is None)}."
        )


class CannotWriteToDisk(QMoveError):
    """A model cannot be parked on disk. It stays where it was, whole, and so do older files.

    Attributes:
        path: the file or the folder that is in the way; None if none was named.
    """

    def __init__(self, action: Action, path: Path | None, why: str, advice: str) -> None:
        self.path = path
        where = "" if path is None else f"{path}: "
        super().__init__(
            f"Cannot {action.infinitive}, so {action.nothing_done}: {where}{why}. The model stays "
            f"where it was, whole. {advice}"
        )


class CannotAttach(QMoveError):
    """What lies in a folder cannot be given to this model, which stays as it was.

    Attributes:
        path: the file or the folder.
        problems: (name of a tensor, problem) for each, where tensors are in the way.
    """

    def __init__(
        self,
        action: Action,
        path: Path,
        why: str,
        problems: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.path, self.problems = path, list(problems)
        lines = f":\n{_lines(self.problems)}" if self.problems else "."
        super().__init__(
            f"Cannot {action.infinitive}, so {action.nothing_done}: {path}: {why}{lines}"
        )


class DtypeCastRefused(QMoveError, TypeError):
    """A cast that would destroy quantized weights."""


def _lines(reasons: Sequence[tuple[str, str]]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in reasons[:20]]
    return "\n".join(lines + [f"  ... and {len(reasons) - 20} more"] * (len(reasons) > 20))
