"""Several threads use, move and look at the same models at once: right results or a reason, never a
deadlock, never a wrong byte."""

from __future__ import annotations

import faulthandler
import itertools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import torch

import qmove_core as qmove
from qmove_core.parking import streaming
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.snapshots import contents
from tests.faults.builders import runs

pytestmark = pytest.mark.simulated

HANGS = 120.0  # seconds after which all tracebacks are shown and the process ends
STEPS = 60  # of each thread in a normal run


@pytest.fixture(autouse=True)
def a_hang_shows_all_tracebacks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(copies, "SMALL", 0)
    limit = HANGS + (runs.seconds_for("threads") or 0)
    faulthandler.dump_traceback_later(limit, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


def _work(acts: dict[str, Callable[[], None]], number: int, until: float | None) -> Counter[str]:
    """Does what one thread does; returns how often what ended in which way."""
    chosen_by, ends = random.Random(f"{runs.SEED} {number}"), Counter[str]()
    for step in itertools.count():
        if step >= STEPS if until is None else time.monotonic() > until:
            return ends
        name = chosen_by.choice(sorted(acts))
        try:
            acts[name]()
            ends[f"{name}: done"] += 1
        except (qmove.QMoveError, RuntimeError) as error:
            _has_a_reason(error)
            ends[f"{name}: refused"] += 1
    return ends


def _has_a_reason(error: Exception) -> None:
    """A QMoveError, or PyTorch's word that a model was parked under a forward that had begun."""
    if not isinstance(error, qmove.QMoveError):
        assert "on the same device" in str(error) or "is on cpu" in str(error), error


@pytest.mark.parametrize("one_parks", [False, True], ids=["all only use", "others park"])
def test_forward_park_restore_swap_prefetch_and_stats_at_once(gpu: GPU, one_parks: bool) -> None:
    models = [layers(3), layers(4)]
    expected = [model(inputs()) for model in models]
    bytes_before = [contents(model) for model in models]
    wrong: list[str] = []

    def compute(number: int) -> Callable[[], None]:
        def forward() -> None:
            if not torch.equal(models[number](inputs()), expected[number]):
                wrong.append(f"model {number} computed something else")

        return forward

    def look() -> None:
        stats = qmove.stats()
        assert min(stats.arena_bytes, stats.mirror_bytes, stats.spare_bytes) >= 0
        qmove.parked_models()

    using = {"forward 0": compute(0), "forward 1": compute(1), "stats": look}
    using |= {
        "restore": lambda: qmove.restore(models[0], stream=True) and None,
        "prefetch": lambda: qmove.prefetch(models[1]) and None,
    }
    parking = {
        "park": lambda: qmove.park(models[0]) and None,
        "park 1": lambda: qmove.park(models[1]) and None,
        "swap": lambda: qmove.swap(models[0], models[1]) and None,
        "trim": lambda: qmove.trim() and None,
    }
    for model in models:
        qmove.park(model)
    acts = [using, using, using | parking if one_parks else using, {"stats": look}]
    seconds = runs.seconds_for("threads")
    until = None if seconds is None else time.monotonic() + seconds / 2
    problems: list[BaseException] = []
    ends: Counter[str] = Counter()

    def run(number: int) -> None:
        try:
            ends.update(_work(acts[number], number, until))
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(acts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    runs.note("threads", steps=ends.total(), ends=dict(ends))
    assert not problems and not wrong
    refused = [name for name in ends if name.endswith("refused")]
    assert one_parks or not refused, "nobody parks, so nothing is in the way"
    streaming.wait_for()
    for model in models:
        qmove.restore(model)
    assert [contents(model) for model in models] == bytes_before
