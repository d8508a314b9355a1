"""What a kept exception keeps alive: the frames of qmove, and of the libraries that it calls, drop
their variables; frames of others stay whole."""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Iterator, Set
from types import CodeType, FrameType, FunctionType, TracebackType

_PACKAGES = frozenset(
    [
        __name__.partition(".")[0],
        "contextlib",
        "concurrent",
        "threading",
        "torch",
        "numpy",
        "safetensors",
    ]
    + ["bitsandbytes", "torchao", "accelerate", "diffusers"]
)


@contextlib.contextmanager
def keeping_nothing() -> Iterator[None]:
    """What the body raises keeps nothing that frames of qmove below it had."""
    try:
        yield
    except BaseException as error:
        clear_own_frames(error)
        raise


def clear_own_frames(error: BaseException) -> None:
    """Clears the variables of qmove's frames that `error` left, so that it keeps no storage alive.

    Frames of others, such as the `progress` callback of a user, are left as they are.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        pending += [current.__cause__, current.__context__]
        _clear(current.__traceback__)


def _clear(traceback: TracebackType | None) -> None:
    ended: list[FrameType] = []
    for frame in _frames(traceback):
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] in _PACKAGES:
            with contextlib.suppress(RuntimeError):  # it still runs
                frame.clear()
                ended.append(frame)
    for frame in ended:
        _empty_cells(frame, {ended_one.f_code for ended_one in ended})


def _frames(traceback: TracebackType | None) -> Iterator[FrameType]:
    """Those of a traceback, and those that called them, which they keep. An error that was raised
    later than it came has the first only from where it was caught."""
    innermost: FrameType | None = None
    while traceback is not None:
        innermost = traceback.tb_frame
        yield innermost
        traceback = traceback.tb_next
    while innermost is not None:
        innermost = innermost.f_back
        # A generator may have been left where it is to go on.
        if innermost is not None and not innermost.f_code.co_flags & inspect.CO_GENERATOR:
            yield innermost


def _empty_cells(frame: FrameType, ended: Set[CodeType]) -> None:
    """A cleared frame still has its function, and that the variables of functions around it: a
    comprehension all that it was made of. Those of functions that have ended are emptied."""
    around = {inner: code for code in ended for inner in code.co_consts if inner in ended}
    for function in gc.get_referents(frame):
        if isinstance(function, FunctionType) and function.__code__ is frame.f_code:
            names = frame.f_code.co_freevars
            for name, cell in zip(names, function.__closure__ or (), strict=True):
                owner = around.get(frame.f_code)
                while owner is not None and name not in owner.co_cellvars:
                    owner = around.get(owner)
                if owner is not None:
                    with contextlib.suppress(ValueError):  # it is empty
                        del cell.cell_contents
