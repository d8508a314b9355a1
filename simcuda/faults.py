"""Planned faults: the n-th allocation, pin or copy fails, a copy stops half way, a bit flips, a
callback watches."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from simcuda.library import NoticeFn, RawNotice, sim

KINDS = ("alloc", "pinned_alloc", "pin", "copy", "op")
_DIRECTIONS = ("h2d", "d2h", "d2d")


@dataclass(frozen=True)
class CopyNotice:
    """A copy over the link that is about to be made, or queued."""

    direction: str
    """"h2d", "d2h" or "d2d"."""
    nbytes: int
    device: int
    """The device whose stream carries it: the source for "d2d"."""
    stream: int
    """That stream's id; 0 is the default stream."""
    pinned: bool
    """The host's side starts in page-locked memory."""
    non_blocking: bool


class Fault:
    """A planned fault; ``fired`` says how often it has struck so far."""

    def __init__(self, identity: int) -> None:
        self._id = identity
        self._last = 0

    @property
    def fired(self) -> int:
        now = int(sim().sim_fault_fired(self._id))
        self._last = (
            now if now >= 0 else self._last
        )  # after the block the plan is gone and its count stays
        return self._last

    def _remove(self) -> None:
        _ = self.fired
        sim().sim_remove_fault(self._id)


def new_references(error: BaseException, times: int) -> tuple[int, int]:
    """Addresses of an exception's class and instance, with references counted for ``times`` raises
    from C++."""
    for _ in range(times):
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(type(error)))
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(error))
    return id(type(error)), id(error)


@contextmanager
def fail(
    kind: str,
    nth: int = 1,
    error: BaseException | type[BaseException] | None = None,
    after_bytes: int | None = None,
    times: int = 1,
    late: bool = False,
    min_rows: int = 0,
) -> Iterator[Fault]:
    """Inside the block, the ``nth`` event of a kind fails (counted from 1, from the block's start).

    Args:
        kind: "alloc" (device memory), "pinned_alloc" (PyTorch's pinned allocator), "pin"
            (cudaHostRegister), "copy" (over the link, in any direction), or "op:NAME" (an operator
            of PyTorch on a device, "op:_int_mm" for example).
        error: what to raise, an exception or its class, ``KeyboardInterrupt`` and other
            ``BaseException`` included. None for what CUDA does: ``torch.OutOfMemoryError``;
            ``torch.AcceleratorError`` for a pinned allocation or a copy; for a pin the code
            ``cudaErrorMemoryAllocation``, which also stays behind as the thread's last error; for
            an operator what cuBLAS raises for a shape that it lacks.
        after_bytes: for "copy": how many bytes reach the destination first; None for half of them.
        times: how many events in a row fail, from the ``nth`` on.
        late: for a "copy" that is queued: fail when it runs, at the call that waits, instead of
            when it is queued.
        min_rows: for an operator: fail only where its first tensor has so many rows at least.
    """
    kind, _, operator = kind.partition(":")
    if kind not in KINDS or bool(operator) != (kind == "op"):
        raise ValueError(f"cannot fail {kind!r}: use one of {', '.join(KINDS)}")
    if nth < 1 or times < 1:
        raise ValueError(f"nth and times count from 1 (nth={nth}, times={times})")
    if error is None and operator:
        error = RuntimeError(
            "CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmulAlgoGetHeuristic`"
        )
    raised = error() if isinstance(error, type) else error
    addresses = (None, None) if raised is None else new_references(raised, times)
    stop = -1 if after_bytes is None else after_bytes
    planned = (KINDS.index(kind), nth, times, stop, late, False, *addresses)
    fault = Fault(sim().sim_add_fault(*planned, operator.encode(), min_rows))
    try:
        yield fault
    finally:
        fault._remove()
        unused = 0 if raised is None else times - fault.fired
        for _ in range(unused):
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(type(raised)))
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(raised))


@contextmanager
def flip_bit(kind: str = "copy", nth: int = 1) -> Iterator[Fault]:
    """Inside the block, the ``nth`` copy over the link arrives with the lowest bit of its middle
    byte flipped."""
    if kind != "copy":
        raise ValueError(f"a bit can flip in a copy only, not in {kind!r}")
    if nth < 1:
        raise ValueError(f"nth counts from 1 (nth={nth})")
    planned = (KINDS.index("copy"), nth, 1, -1, False, True, None, None)
    fault = Fault(sim().sim_add_fault(*planned, b"", 0))
    try:
        yield fault
    finally:
        fault._remove()


_callback: Callable[[CopyNotice], object] | None = None


def _notify(raw: ctypes._Pointer[RawNotice], error: ctypes._Pointer[ctypes.c_void_p]) -> None:
    """Calls the callback, and hands what it raised to C++, which raises it again at the copy's
    caller."""
    callback = _callback
    if callback is None:
        return
    seen = raw.contents
    notice = CopyNotice(
        direction=_DIRECTIONS[seen.direction],
        nbytes=seen.nbytes,
        device=seen.device,
        stream=seen.stream,
        pinned=bool(seen.pinned),
        non_blocking=bool(seen.non_blocking),
    )
    try:
        callback(notice)
    except (
        BaseException
    ) as raised:  # not swallowed: it goes through C++ to whoever asked for the copy
        error[0], error[1] = new_references(raised, 1)


_trampoline = NoticeFn(_notify)


@contextmanager
def on_copy(callback: Callable[[CopyNotice], object]) -> Iterator[None]:
    """Inside the block, ``callback`` is called before each copy over the link; what it raises, the
    copy raises.

    The innermost block's callback is the one that is called.
    """
    global _callback
    before, _callback = _callback, callback
    sim().sim_on_copy(_trampoline)
    try:
        yield
    finally:
        _callback = before
        if before is None:
            sim().sim_on_copy(NoticeFn())
