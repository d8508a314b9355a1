"""The process ends while a daemon thread moves a model: at once, and without a word."""

from __future__ import annotations

import pytest

from tests.faults.builders import runs
from tests.faults.builders.processes import run

pytestmark = pytest.mark.simulated

TIMES = 10 if runs.MINUTES else 2

MOVES = {
    "park and restore": "qmove.park(m); moving.set(); qmove.restore(m)",
    "stream": "qmove.park(m); moving.set(); qmove.restore(m, stream=True); qmove.stats()",
    "swap": "qmove.park(other); moving.set(); qmove.swap(m, other); qmove.swap(other, m)",
    "prepare": "qmove.prepare(m); moving.set(); qmove.trim()",
    "move": "qmove.move(m, 'cpu'); moving.set(); qmove.move(m, 'cuda:0')",
}


# Until 3.14, Python ends a daemon thread that asks for the GIL at exit by unwinding its stack. Where
# that is in C++ code that may not throw, as PyTorch's, the C++ runtime ends the process; with any
# library, now and then. (https://github.com/python/cpython/issues/87135)
_UNWOUND = "terminate called without an active exception"


def _ends(loop: str) -> None:
    for _attempt in range(3):
        ended = run(f"""
            import threading
            m, other, moving = layers(4), layers(4), threading.Event()
            def move():
                while True:
                    {loop}
            threading.Thread(target=move, daemon=True).start()
            moving.wait()
        """)
        if not ended.stderr.startswith(_UNWOUND):
            break
    assert (ended.returncode, ended.stderr) == (0, "")


@pytest.mark.parametrize("name", MOVES)
@pytest.mark.parametrize("time", range(TIMES))
def test_a_process_ends_while_a_thread_moves(name: str, time: int) -> None:
    _ends(MOVES[name])
    runs.note("exits", processes=1)


STUCK = {
    "park": "qmove.park(m, progress=stop)",
    "restore": "qmove.park(m); qmove.restore(m, progress=stop)",
}


@pytest.mark.parametrize("name", STUCK)
def test_no_move_is_waited_for(name: str) -> None:
    """It stands still in the middle, with the lock of moves: who waits for it hangs."""
    ended = run(f"""
        import threading
        m, moving = layers(4), threading.Event()
        def stop(*args):
            moving.set()
            threading.Event().wait()
        def move():
            {STUCK[name]}
        threading.Thread(target=move, daemon=True).start()
        moving.wait()
    """)
    assert (ended.returncode, ended.stderr) == (0, "")
    runs.note("exits", processes=1)
