"""What a kept exception keeps alive: qmove's own frames drop their variables, other frames stay
whole."""

from __future__ import annotations

import contextlib
from types import TracebackType

_PACKAGE = __name__.partition(".")[0]


def clear_own_frames(error: BaseException, *, and_libraries: bool = False) -> None:
    """Clears the variables of qmove's frames that `error` left, so that it keeps no storage alive.

    Frames of others, such as the `progress` callback of a user, are left as they are.

    Args:
        and_libraries: clears all frames that have ended. Only where qmove called no user's code.
    """
    seen: set[int] = set()
    pending: list[BaseException | None] = [error]
    while pending:
        current = pending.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        pending += [current.__cause__, current.__context__]
        _clear(current.__traceback__, and_libraries)


def _clear(traceback: TracebackType | None, and_libraries: bool) -> None:
    while traceback is not None:
        frame = traceback.tb_frame
        if and_libraries or str(frame.f_globals.get("__name__", "")).partition(".")[0] == _PACKAGE:
            with contextlib.suppress(RuntimeError):  # it still runs
                frame.clear()
        traceback = traceback.tb_next
