"""The door of every operation: one at a time, and in the state that PyTorch has by default.

What the caller's thread has switched on (modes that catch functions or operators, a default device,
autocast, tracing, profiling, transforms, inference mode, gradients) is off in the body and on again
after it.
What holds for the whole process cannot be switched off for one thread: so every tensor that qmove
makes has its dtype and its device named, and is made by `storages.empty`.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.overrides
import torch.utils._python_dispatch

from .homes import lock
from .tracebacks import keeping_nothing

_C: Any = torch._C
_overrides: Any = torch.overrides
_dispatch: Any = torch.utils._python_dispatch

EXIT_SECONDS = 1.0  # how long the end of the process waits for a move of another thread

_process_ends = False


@contextmanager
def moving() -> Iterator[None]:
    """Holds the lock of all moves. The body sees PyTorch as a new thread does.

    Whoever keeps an exception of the body keeps none of the memory that the body had in use: so
    there is room to try again.

    Raises:
        SystemExit: in a thread that comes here while the process ends.
    """
    begins = not lock._is_owned()  # type: ignore[attr-defined]
    with lock:
        if _process_ends and begins and threading.current_thread() is not threading.main_thread():
            raise SystemExit
        with ordinary_state(), keeping_nothing():
            yield


def _at_exit() -> None:
    """Lets the move of another thread end, and no further one begin.

    The end of the interpreter kills daemon threads as soon as they come back from PyTorch, whose
    C++ then aborts the process.
    """
    global _process_ends
    _process_ends = True
    if lock.acquire(timeout=EXIT_SECONDS):
        lock.release()


atexit.register(_at_exit)


@contextmanager
def ordinary_state() -> Iterator[None]:
    """The same without the lock."""
    with ExitStack() as back:
        _set_aside_modes(back)
        if (tracing := _C._get_tracing_state()) is not None:
            back.callback(_C._set_tracing_state, tracing)
            _C._set_tracing_state(None)
        if _C._autograd._profiler_enabled() and not getattr(_not_recorded, "by_us", False):
            # It refers to what operators were given, and such tensors exchange nothing any more.
            back.callback(_record, True)
            _record(False)
        back.enter_context(_C._DisableAutocast())
        back.enter_context(torch.inference_mode(False))
        back.enter_context(torch.no_grad())
        yield


_not_recorded = threading.local()


def _record(switched_on: bool) -> None:
    _C._autograd._enable_record_function(switched_on)
    _not_recorded.by_us = not switched_on


def _set_aside_modes(back: ExitStack) -> None:
    """Of functions (`torch.device`, `set_default_device`), of operators (FakeTensorMode), and of
    transforms (`vmap`, `grad`)."""
    for _ in range(_overrides._len_torch_function_stack()):
        back.callback(_overrides._push_mode, _overrides._pop_mode())
    if _C._len_torch_dispatch_stack():
        back.enter_context(_dispatch._disable_current_modes())
    if _C._functorch.peek_interpreter_stack() is not None:
        from torch._functorch import pyfunctorch

        transforms: Any = pyfunctorch.temporarily_clear_interpreter_stack
        back.enter_context(transforms())
