"""What a model of a pool can be, and what leads from one state to another: all of it is this table.

A model that rests (in VRAM, in RAM, on disk) may also be moved by others: by hand, by a host, or it
has woken by itself. The pool sees it before it decides anything (`Event.FOUND_...`).
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    """Where a model of a pool is. The values are for people."""

    NOT_LOADED = "not loaded"
    LOADING = "loading"
    HOME = "in VRAM"
    ON_LEASE = "in use"
    IN_RAM = "in RAM"
    ON_DISK = "on disk"
    COMING = "coming home"
    GOING = "leaving VRAM"
    SPILLING = "going to disk"

    @property
    def is_moving(self) -> bool:
        """Whether something is done with it just now."""
        return self in _MOVING

    @property
    def takes_vram(self) -> bool:
        return self in _IN_VRAM


class Event(Enum):
    """What happens to a model of a pool."""

    COME = "brought home"  # to load it, where it was not
    ARRIVED = "arrived"
    LEASE = "leased"
    RELEASE = "last lease ended"
    GO = "sent away"
    SPILL = "sent to disk"
    PARKED = "parked in RAM"
    ON_DISK = "parked on disk"
    LET_GO = "let go of"
    STAYED = "stayed in VRAM"  # what was sent away could not leave
    FOUND_HOME = "found in VRAM"
    FOUND_IN_RAM = "found in RAM"
    FOUND_ON_DISK = "found on disk"


_MOVING = frozenset({State.LOADING, State.COMING, State.GOING, State.SPILLING})
_IN_VRAM = frozenset({State.LOADING, State.HOME, State.ON_LEASE, State.COMING, State.GOING})
_FOUND = {
    Event.FOUND_HOME: State.HOME,
    Event.FOUND_IN_RAM: State.IN_RAM,
    Event.FOUND_ON_DISK: State.ON_DISK,
}

TRANSITIONS: dict[State, dict[Event, State]] = {
    State.NOT_LOADED: {Event.COME: State.LOADING},
    State.LOADING: {
        Event.ARRIVED: State.HOME,
        Event.LET_GO: State.NOT_LOADED,
        Event.PARKED: State.IN_RAM,  # it is larger than there was room for
        Event.ON_DISK: State.ON_DISK,
        Event.STAYED: State.HOME,
    },
    State.HOME: {
        Event.COME: State.COMING,  # nothing moves, unless somebody parks it just now
        Event.LEASE: State.ON_LEASE,
        Event.GO: State.GOING,
        Event.LET_GO: State.NOT_LOADED,
        **_FOUND,
    },
    State.ON_LEASE: {Event.LEASE: State.ON_LEASE, Event.RELEASE: State.HOME},
    State.IN_RAM: {
        Event.COME: State.COMING,
        Event.SPILL: State.SPILLING,
        Event.LET_GO: State.NOT_LOADED,
        **_FOUND,
    },
    State.ON_DISK: {Event.COME: State.COMING, Event.LET_GO: State.NOT_LOADED, **_FOUND},
    State.COMING: {
        Event.ARRIVED: State.HOME,
        Event.PARKED: State.IN_RAM,
        Event.ON_DISK: State.ON_DISK,
        Event.STAYED: State.HOME,
    },
    State.GOING: {
        Event.PARKED: State.IN_RAM,
        Event.ON_DISK: State.ON_DISK,
        Event.LET_GO: State.NOT_LOADED,
        Event.STAYED: State.HOME,
    },
    State.SPILLING: {
        Event.PARKED: State.IN_RAM,
        Event.ON_DISK: State.ON_DISK,
        Event.LET_GO: State.NOT_LOADED,
        Event.STAYED: State.HOME,  # it was used meanwhile, and woke
    },
}


def after(state: State, event: Event) -> State:
    """The state that an event leads to.

    Raises:
        RuntimeError: it cannot happen in this state.
    """
    following = TRANSITIONS[state].get(event)
    if following is None:
        raise RuntimeError(f"A model that is {state.value} cannot be {event.value}.")
    return following
