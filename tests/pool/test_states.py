"""The table of states, and every short sequence of what can happen to models of a pool."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

import qmove_core as qmove
import simcuda
from qmove_core.pool import ModelPool, State, pooled
from qmove_core.pool.states import TRANSITIONS, Event, after
from qmove_core.settings import settings
from tests.builders.pooled_models import SIZE, Loaders, is_right

pytestmark = pytest.mark.simulated  # copies fail when they are told to

seen: set[tuple[State, Event]] = set()
RESTING = (State.NOT_LOADED, State.HOME, State.IN_RAM, State.ON_DISK)


class Told(Exception):
    """What a loader raises in a test."""


def use(pool: ModelPool, loaders: Loaders, name: str) -> None:
    with pool.use(name, timeout=0) as model:
        assert pool.state(name) is State.ON_LEASE
        with pool.use(name, timeout=0) as again:
            assert again is model
        assert is_right(model, name)


def with_failing_loader(pool: ModelPool, loaders: Loaders, name: str) -> None:
    def fail(_name: str) -> None:
        raise Told

    loaders.fail = fail
    try:
        use(pool, loaders, name)
    except Told:
        assert pool.state(name) is State.NOT_LOADED
    finally:
        loaders.fail = lambda _name: None


def with_a_failing_copy(pool: ModelPool, loaders: Loaders, name: str) -> None:
    with simcuda.fail("copy", error=Told):
        try:
            use(pool, loaders, name)
        except Told:
            assert pool.state(name) is not State.ON_LEASE


def by_hand(pool: ModelPool, name: str, move: Callable[[object], object]) -> None:
    model = pool._pooled(name).model
    if model is not None:
        move(model)


EVENTS: dict[str, Callable[[ModelPool, Loaders], None]] = {
    "use a": lambda pool, loaders: use(pool, loaders, "a"),
    "use b": lambda pool, loaders: use(pool, loaders, "b"),
    "use c": lambda pool, loaders: use(pool, loaders, "c"),
    "park a": lambda pool, loaders: (pool.park("a"), None)[1],
    "a by hand": lambda pool, loaders: by_hand(pool, "a", qmove.park),
    "a to disk by hand": lambda pool, loaders: by_hand(
        pool, "a", lambda model: qmove.park(model, to="disk" if settings.disk_folder else "ram")
    ),
    "a wakes": lambda pool, loaders: by_hand(pool, "a", qmove.restore),
    "RAM is short": lambda pool, loaders: pool._give_up(SIZE),
    "loader of a fails": lambda pool, loaders: with_failing_loader(pool, loaders, "a"),
    "a copy fails": lambda pool, loaders: with_a_failing_copy(pool, loaders, "a"),
    "sleep": lambda pool, loaders: (pool.sleep(timeout=0), pool.wake_up(restore=False))[1],
}
# Room for so many models in VRAM and in RAM, whether there is a disk, and how every sequence begins.
SETTINGS = {
    "plenty": (2, 9, False, ()),
    "drops": (1, 1, False, ("use a",)),
    "disk": (1, 1, True, ("use a",)),
    "disk only": (1, 0, True, ()),
}
BY_HAND = {"a by hand", "a to disk by hand", "a wakes"}


@pytest.fixture(autouse=True)
def _note(monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(state: State, event: Event) -> State:
        seen.add((state, event))
        return after(state, event)

    monkeypatch.setattr(pooled, "after", noted)


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_short_sequence_keeps_models_right_and_budgets(
    make: Callable[..., ModelPool], tmp_path: Path, loaders: Loaders, setting: str
) -> None:
    vram, ram, has_disk, beginning = SETTINGS[setting]
    qmove.configure(disk_folder=tmp_path if has_disk else None)
    for following in itertools.product(EVENTS, repeat=2):
        sequence = (*beginning, *following)
        pool = make("abc", vram=vram, ram=ram)
        for event in sequence:
            EVENTS[event](pool, loaders)
            states = {name: pool.state(name) for name in "abc"}
            assert set(states.values()) <= set(RESTING), (sequence, event)
            figures = pool.figures()
            if BY_HAND.isdisjoint(sequence):  # what others do to a model heeds no budget
                assert figures["in_vram"].get("cuda:0", 0) <= vram * SIZE, (sequence, event)
                assert figures["in_ram"] <= ram * SIZE, (sequence, event)
            for name, about in figures["by_name"].items():
                where = {"vram": State.HOME, "ram": State.IN_RAM, "disk": State.ON_DISK}
                held = [where[kind] for kind in where if about[kind]]
                assert held in ([states[name]], []), (sequence, event, name)
                assert bool(held) == (states[name] is not State.NOT_LOADED)
        pool.close()
    gc.collect()


def test_every_row_of_the_table_was_seen() -> None:
    """Those that only other threads, or failures, lead to have tests of their own."""
    rows = {(state, event) for state, row in TRANSITIONS.items() for event in row}
    assert seen <= rows
    missing = {f"{state.name} {event.name}" for state, event in rows - seen}
    assert missing <= ELSEWHERE, missing - ELSEWHERE


ELSEWHERE = {
    "COMING PARKED", "COMING ON_DISK", "COMING STAYED", "GOING STAYED", "LOADING PARKED",
    "LOADING ON_DISK", "LOADING STAYED", "SPILLING PARKED", "SPILLING LET_GO", "SPILLING STAYED",
    "ON_DISK LET_GO", "HOME LET_GO", "IN_RAM LET_GO", "ON_DISK FOUND_IN_RAM", "GOING LET_GO",
}  # fmt: skip


@pytest.mark.parametrize("state", State)
def test_what_is_not_in_the_table_is_refused(state: State) -> None:
    for event in set(Event) - set(TRANSITIONS[state]):
        with pytest.raises(RuntimeError, match="cannot be"):
            after(state, event)


def test_each_state_leads_on_and_is_led_to() -> None:
    reached = {following for row in TRANSITIONS.values() for following in row.values()}
    assert reached == set(State) == set(TRANSITIONS)
    assert all(TRANSITIONS.values())
