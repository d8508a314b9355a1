"""What happens after a commit is no failure of the move; what interrupts one comes after it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import nn

import qmove_core as qmove
from qmove_core import devices, hosting, storages
from qmove_core.memory import mirrors
from qmove_core.model import kinds
from qmove_core.transfer import transaction
from tests.builders.device import GPU
from tests.builders.interrupts import Interrupted
from tests.builders.models import layers
from tests.builders.quantized_layers import quantized
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


class Scene:
    """Two models, one at home and one parked, and what the operations do with them."""

    def __init__(self) -> None:
        self.home, self.parked = layers(3), layers(3)
        self.home[1].weight = self.home[0].weight  # tied, and a view of a third one
        self.home.view = self.home[2].weight.data[:7]  # type: ignore[assignment]
        self.before = snapshot(self.home), snapshot(self.parked)
        qmove.park(self.parked)
        self.asleep = snapshot(self.parked)

    def act(self, name: str) -> Any:
        acts: dict[str, Callable[[], Any]] = {
            "park": lambda: qmove.park(self.home),
            "restore": lambda: qmove.restore(self.parked),
            "move": lambda: qmove.move(self.home, "cpu"),
            "swap": lambda: qmove.swap(self.home, self.parked),
        }
        return acts[name]()

    def moved(self, name: str) -> bool:
        """Whether all that the operation moves has moved; nothing is in between."""
        places = [set(qmove.inventory(m).by_device) for m in (self.home, self.parked)]
        went = [{"cpu"} if name in ("park", "move", "swap") else {"cuda:0"}]
        went.append({"cuda:0"} if name in ("restore", "swap") else {"cpu"})
        if places == went:
            return True
        assert places == [{"cuda:0"}, {"cpu"}]
        return False

    def require_whole(self) -> None:
        qmove.move(self.home, "cuda:0")
        qmove.restore(self.parked)
        assert (snapshot(self.home), snapshot(self.parked)) == self.before


ACTS = ["park", "restore", "move", "swap"]
AFTER = {
    "host copies": (mirrors, "keep"),
    "host copies in use": (transaction, "keep_as_mirrors"),
    "strangers": (transaction, "_take_outsiders_along"),
    "the driver": (devices, "release_cached"),
    "the host program": (hosting, "tell_moved"),
}


def fails(error: BaseException) -> Callable[..., Any]:
    def fail(*_args: Any, **_options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("what", AFTER)
def test_an_error_after_the_commit_is_logged_and_the_move_is_done(
    gpu: GPU, act: str, what: str, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    scene = Scene()
    monkeypatch.setattr(*AFTER[what], fails(ValueError("planted")))

    scene.act(act)

    assert scene.moved(act)
    is_asked = what != "host copies" or act in ("restore", "swap")
    assert ("planted" in caplog.text) == is_asked
    assert ("the move itself is done" in caplog.text) == is_asked
    monkeypatch.undo()
    scene.require_whole()


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("what", list(AFTER)[1:])
def test_an_interrupt_after_the_commit_is_delivered_when_all_is_done(
    gpu: GPU, act: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene()
    told: list[int] = []
    if what != "the host program":
        monkeypatch.setattr(hosting, "tell_moved", lambda: told.append(1))
    monkeypatch.setattr(*AFTER[what], fails(Interrupted()))

    with pytest.raises(Interrupted):
        scene.act(act)

    assert scene.moved(act)
    assert told or what == "the host program"  # what comes after it was done
    monkeypatch.undo()
    scene.require_whole()


@contextmanager
def a_signal_in(module: Any, name: str, number: int, nth: int) -> Iterator[list[int]]:
    """The nth call of a function is interrupted by a signal."""
    calls, function = [0], getattr(module, name)

    def interrupted(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth:
            signal.raise_signal(number)
        return function(*args, **options)

    setattr(module, name, interrupted)
    try:
        yield calls
    finally:
        setattr(module, name, function)


def _time_is_up(_number: int, _frame: Any) -> None:
    raise TimeoutError("planted")


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("nth", range(1, 7))
@pytest.mark.parametrize("which", ["SIGINT", "SIGALRM"])
def test_a_raising_signal_while_tensors_are_rebound_comes_after_the_commit(
    gpu: GPU, act: str, nth: int, which: str
) -> None:
    number = getattr(signal, which)
    scene, before = Scene(), signal.getsignal(number)
    if which == "SIGALRM":
        signal.signal(number, _time_is_up)
    try:
        with a_signal_in(storages, "_look_into", number, nth) as calls:
            with pytest.raises((KeyboardInterrupt, TimeoutError)):
                scene.act(act)
            if act != "swap":  # whose storages move one by one, which can be undone
                assert scene.moved(act)
        assert calls[0] >= nth
        scene.moved(act)  # wholly the one or the other
        assert signal.getsignal(number) is (_time_is_up if which == "SIGALRM" else before)
        scene.require_whole()
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("nth", range(1, 13))
def test_what_is_raised_between_two_tensors_of_a_storage_tears_nothing(
    gpu: GPU, act: str, nth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `PyThreadState_SetAsyncExc` does: at any line, whatever the signals are."""
    scene = Scene()
    calls, look_into = [0], storages._look_into

    def raising(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == nth:
            raise Interrupted
        look_into(*args)

    monkeypatch.setattr(storages, "_look_into", raising)
    try:
        scene.act(act)
    except Interrupted:  # the commit was begun anew, and is done
        assert scene.moved(act) or act == "swap"
    else:
        assert calls[0] < nth and scene.moved(act)
    monkeypatch.undo()

    scene.require_whole()


def test_ctrl_c_in_the_commit_of_a_swap_comes_when_both_have_moved(gpu: GPU) -> None:
    scene = Scene()

    with a_signal_in(kinds, "refresh", signal.SIGINT, 1), pytest.raises(KeyboardInterrupt):
        scene.act("swap")

    assert scene.moved("swap")
    scene.require_whole()


@pytest.mark.parametrize("where", ["refresh", "tell_moved"])
def test_ctrl_c_in_the_commit_of_dequantizing_keeps_the_recipes(gpu: GPU, where: str) -> None:
    model = nn.Sequential(*quantized("int8"), nn.Linear(64, 64).half().cuda()).eval()
    module = kinds if where == "refresh" else hosting

    with a_signal_in(module, where, signal.SIGINT, 1), pytest.raises(KeyboardInterrupt):
        qmove.dequantize_and_move(model, "cpu")

    assert set(qmove.inventory(model).by_device) == {"cpu"}
    with a_signal_in(module, where, signal.SIGINT, 1), pytest.raises(KeyboardInterrupt):
        qmove.move_and_requantize(model, "cuda:0")
    assert set(qmove.inventory(model).by_device) == {"cuda:0"}
    assert type(model[0]).__name__ == "Linear8bitLt"


@pytest.mark.parametrize("what", AFTER)
def test_an_error_after_the_commit_leaves_no_model_half_requantized(
    gpu: GPU, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(*quantized("int8"), nn.Linear(64, 64).half().cuda()).eval()
    qmove.dequantize_and_move(model, "cpu")
    monkeypatch.setattr(*AFTER[what], fails(ValueError("planted")))

    qmove.move_and_requantize(model, "cuda:0")

    assert set(qmove.inventory(model).by_device) == {"cuda:0"}
