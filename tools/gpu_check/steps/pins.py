"""Page-locking: how fast memory is locked and unlocked in pieces of 64 MiB, and what a thread that
launches kernels notices of it."""

from __future__ import annotations

import mmap
import threading
import time

import torch

from ..checks import Checks
from ..machine import MIB, Sizes

PIECE = 64 * MIB
PORTABLE = 1  # cudaHostRegisterPortable


def run(checks: Checks, sizes: Sizes) -> None:
    torch.zeros(1, device="cuda:0")
    for name, touched in (("memory touched before", True), ("memory never touched", False)):
        with _Kernels() as kernels:
            lock, unlock, worst = _lock_pieces(checks, sizes.pins, touched)
        if lock:
            checks.figure(f"locking, {name}, GB/s", round(sizes.pins / lock / 1e9, 2))
            checks.figure(f"slowest piece of 64 MiB, {name}, ms", round(worst * 1e3, 1))
            checks.figure(f"unlocking, {name}, GB/s", round(sizes.pins / unlock / 1e9, 2))
            checks.figure(f"longest gap between kernel launches, {name}, ms", kernels.worst_ms())


def _lock_pieces(checks: Checks, nbytes: int, touched: bool) -> tuple[float, float, float]:
    """Seconds to lock, to unlock, and of the slowest piece; zeros where it was refused."""
    runtime = torch.cuda.cudart()
    pieces: list[tuple[mmap.mmap, torch.Tensor]] = []
    worst = locked = 0.0
    for _ in range(max(1, nbytes // PIECE)):
        memory = mmap.mmap(-1, PIECE)
        view = torch.frombuffer(memory, dtype=torch.uint8)
        if touched:
            view.fill_(1)
        started = time.perf_counter()
        code = int(runtime.cudaHostRegister(view.data_ptr(), PIECE, PORTABLE))
        seconds = time.perf_counter() - started
        if code != 0:
            checks.figure("locking stopped", f"after {len(pieces) * PIECE} bytes, error {code}")
            break
        pieces.append((memory, view))
        worst, locked = max(worst, seconds), locked + seconds
    started = time.perf_counter()
    codes = [int(runtime.cudaHostUnregister(view.data_ptr())) for _, view in pieces]
    unlocked = time.perf_counter() - started
    checks.expect(
        "all locked memory is unlocked again", not any(codes), codes if any(codes) else "", "pins"
    )
    whole = len(pieces) == max(1, nbytes // PIECE)
    return (locked, unlocked, worst) if whole else (0.0, 0.0, 0.0)


class _Kernels:
    """A thread that launches small kernels all the time, and notes the longest gap between two."""

    def __enter__(self) -> _Kernels:
        self._stop, self._worst = threading.Event(), 0.0
        self._thread = threading.Thread(target=self._launch)
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def worst_ms(self) -> float:
        return round(self._worst * 1e3, 2)

    def _launch(self) -> None:
        target = torch.zeros(1, device="cuda:0")
        torch.cuda.synchronize(0)
        last = time.perf_counter()
        while not self._stop.is_set():
            target.add_(1)
            now = time.perf_counter()
            self._worst, last = max(self._worst, now - last), now
        torch.cuda.synchronize(0)
