"""Every error qmove raises: what was asked, the figures that stand in the way, and what to do now."""

from __future__ import annotations

from collections.abc import Sequence


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


class QMoveError(RuntimeError):
    """Base of all errors of qmove. The model is whole when one arrives: where it was, or where it was going."""


class NotEnoughMemory(QMoveError):
    """A move would not fit. Nothing was moved.

    Attributes:
        place: "cuda:0", "cpu", ...
        needed, free: bytes.
        limit: the bound that decided ("free VRAM", "cgroup limit", "ram_limit of qmove.configure").
    """

    def __init__(
        self, action: str, place: str, needed: int, free: int, limit: str, advice: str
    ) -> None:
        self.place, self.needed, self.free, self.limit = place, needed, free, limit
        super().__init__(
            f"{action} needs {readable_bytes(needed)} ({needed} bytes) on {place}, but {readable_bytes(free)} "
            f"({free} bytes) are free there ({limit}). Nothing was moved. {advice}"
        )


class CorruptedCopy(QMoveError):
    """What arrived is not what was sent, for the tensors named in `names`. The model stays where it was."""

    def __init__(self, action: str, names: Sequence[str]) -> None:
        self.names = list(names)
        shown = ", ".join(self.names[:5]) + (
            f" and {len(self.names) - 5} more" if len(self.names) > 5 else ""
        )
        super().__init__(
            f"{action}: the digest of what arrived differs from what was sent, for {shown}. The model stays where it was and "
            "keeps its bytes. Try again; if it happens again, suspect the hardware (memory, riser, overclocking) and reload."
        )


class DigestUnavailable(QMoveError):
    """This device computes no exact digests. Compare the bytes themselves, or copy them."""


class UnknownDevice(QMoveError, ValueError):
    """A device that this machine does not have, or that is none at all."""


class NoTensors(QMoveError, ValueError):
    """The object holds no tensor that qmove could find."""


class CannotMove(QMoveError):
    """Some storages cannot be moved; `reasons` says which and why."""

    def __init__(self, action: str, reasons: Sequence[tuple[str, str]]) -> None:
        self.reasons = list(reasons)
        super().__init__(f"Cannot {action}: nothing was moved, because of\n{_listed(self.reasons)}")


class MetaTensorsPresent(QMoveError):
    """The model has meta tensors: their data is not in memory, so there are no bytes to move."""


class OffloadedDataError(QMoveError):
    """The data of meta tensors is not where a dispatch says, or is not what the model needs; `problems` says which and why."""

    def __init__(self, action: str, problems: Sequence[tuple[str, str]], advice: str) -> None:
        self.problems = list(problems)
        super().__init__(
            f"{action}: nothing was changed, because of\n{_listed(self.problems)}\n{advice}"
        )


class ChangesNotKept(QMoveError):
    """Weights were changed in a way that the dispatch cannot hold; the model stays materialized, with the changes."""

    def __init__(self, action: str, reasons: Sequence[tuple[str, str]]) -> None:
        self.reasons = list(reasons)
        super().__init__(
            f"{action}: the model stays as it is, in memory and without its dispatch, because of\n{_listed(self.reasons)}"
        )


class LiveAutogradGraph(QMoveError):
    """A live autograd graph needs weights of the model: it would keep their bytes, or meet them on another device."""


class DtypeCastRefused(QMoveError, TypeError):
    """A cast that would destroy quantized weights."""


class MissingDependency(QMoveError, ImportError):
    """An optional package is needed for what was asked."""


def _listed(reasons: Sequence[tuple[str, str]]) -> str:
    lines = [f"  {name}: {reason}" for name, reason in reasons[:20]]
    return "\n".join(lines + [f"  ... and {len(reasons) - 20} more"] * (len(reasons) > 20))
