"""Two models that share a storage, and everything that can be asked of them in any order.

The state of a storage and what each call makes of it is a table (`transfer/README.md`, and `STEPS`
here). All sequences of up to six calls are gone through, each state once: what a call does depends
on the state alone. After each call the places are those of the table, the tie holds, every byte is
as it was, and the device holds each storage once.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core import homes
from qmove_core.parking import streaming
from tests.builders.device import GPU, requested_bytes
from tests.builders.models import layers

pytestmark = pytest.mark.simulated

HOME, PARKED = "home", "parked"
OWN = {"first": ("first's own", "shared"), "second": ("second's own", "shared")}
# Of each storage: home, parked, "arriving for first", or "come for first" where the restore that
# brought it still brings others.
State = dict[str, str]

# What a call makes of each storage of the model that it is given; the others stay as they are.
STEPS: dict[str, dict[str, str]] = {
    "park": {HOME: PARKED, PARKED: PARKED},
    "restore": {HOME: HOME, PARKED: HOME},
    "use": {HOME: HOME, PARKED: HOME},
    "prefetch": {HOME: HOME, PARKED: "arriving for {}"},
}
CALLS = [(what, name) for what in (*STEPS, "park in part", "swap") for name in OWN]
BODY = [("roll", "first"), ("end", "first")]
SIZE = 64 * 64 * 4  # bytes of a storage


def expected(state: State, call: tuple[str, str]) -> State:
    """The table."""
    what, name = call
    if what == "swap":  # the model with this name leaves
        other = next(o for o in OWN if o != name)
        return expected(expected(state, ("park", name)), ("restore", other))
    if what in ("roll", "end") or (what == "use" and state.get("body")):
        return in_the_body(state, what, name)
    return outside(state, what, name)


def in_the_body(state: State, what: str, name: str) -> State:
    """Of `resident(first, at_most=...)`, with room for one of its layers: what uses the one lets
    the other go. It notes what is to be parked after it."""
    own, other, away = state["first's own"], state["second's own"], state["shared"] == PARKED
    if what == "roll":
        parked = [state[storage] == PARKED for storage in OWN[name]]
        after = PARKED if all(parked) else "in part" if any(parked) else HOME
        return outside(state, "park", name) | {"body": after}
    if what == "end":
        ended = outside(state, "wait", name) | {"body": ""}
        if state["body"] != "in part":
            return outside(ended, "park" if state["body"] == PARKED else "restore", name)
        is_free = PARKED in (ended[storage] for storage in OWN[name])
        return ended if is_free else outside(ended, "park in part", name)
    if name == "second":
        left = {"first's own": PARKED} if other != PARKED and away and own == HOME else {}
        return outside(state, what, name) | left
    if own == PARKED or (own != HOME and away):  # the shared one comes first, and goes for it
        return outside(state, "wait", name) | {"first's own": HOME, "shared": PARKED}
    if own == HOME and state["shared"].startswith("arriving"):
        return outside(state, "wait", name)
    return state if own == HOME else outside(state, what, name)


def outside(state: State, what: str, name: str) -> State:
    """What it makes of them otherwise."""
    own = state[OWN[name][0]]
    if what == "use" and own != PARKED:  # nothing is looked for: each layer waits for its own bytes
        state = {
            storage: place.replace("arriving", "come") if storage in OWN[name] else place
            for storage, place in state.items()
        }
        ended = {_restore(place) for place in state.values() if place.startswith("come")}
        ended -= {_restore(place) for place in state.values() if place.startswith("arriving")}
    else:  # what is under way is waited for first, and with it all that the same restore brings
        ended = {_restore(state[storage]) for storage in OWN[name]}
    state = {
        storage: HOME if place not in (HOME, PARKED) and _restore(place) in ended else place
        for storage, place in state.items()
    }
    if what == "park in part":  # the last of its layers that is home
        there = [storage for storage in OWN[name] if state[storage] == HOME]
        return state | dict.fromkeys(there[:1], PARKED)
    steps = STEPS.get(what, {})
    return state | {s: steps.get(state[s], state[s]).format(name) for s in OWN[name]}


def _restore(place: str) -> str:
    """Whose restore brings or brought it: of "arriving for first" and "come for first"."""
    return place.rpartition(" ")[2]


def shared(kind: str, weight: nn.Parameter) -> nn.Parameter:
    """How the second model has the weight of the first."""
    if kind == "one parameter":
        return weight
    if kind == "another parameter":
        return nn.Parameter(weight.data, requires_grad=False)
    if kind == "a view":
        return nn.Parameter(weight.data.t(), requires_grad=False)
    loaded = nn.Linear(64, 64, bias=False, device="cuda:0").requires_grad_(False)
    loaded.load_state_dict({"weight": weight.data}, assign=True)
    return loaded.weight


class World:
    """The two models, and what they gave before anything moved."""

    def __init__(self, kind: str) -> None:
        self.models = {name: layers(2).requires_grad_(False) for name in OWN}
        for model in self.models.values():
            model[0].bias = model[1].bias = None  # type: ignore[assignment]
        self.models["second"][0].weight = shared(kind, self.models["first"][0].weight)
        first, second = self.models["first"], self.models["second"]
        self.tensors = {
            "first's own": [first[1].weight],
            "shared": [first[0].weight, second[0].weight],
            "second's own": [second[1].weight],
        }
        self.arrivals: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
        self.body: Any = None
        self.x = torch.linspace(-1, 1, 64, device="cuda:0").reshape(1, 64)
        self.gave = {name: model(self.x).cpu() for name, model in self.models.items()}
        self.bytes = {name: self._bytes(name) for name in OWN}

    def call(self, call: tuple[str, str]) -> None:
        what, name = call
        model, self.newest = self.models[name], f"arriving for {name}"
        if what == "use":
            assert torch.equal(model(self.x).cpu(), self.gave[name]), call
        elif what == "roll":
            self.body = qmove.resident(model, at_most=SIZE + SIZE // 2)
            self.body.__enter__()
        elif what == "end":
            self.end()
        elif what == "swap":
            qmove.swap(model, next(m for m in self.models.values() if m is not model))
        else:
            acts: dict[str, Callable[[Any], Any]] = {
                "park": qmove.park, "restore": qmove.restore, "prefetch": qmove.prefetch,
                "park in part": lambda model: qmove.park(model, free=1),
            }  # fmt: skip
            acts[what](model)

    def end(self) -> None:
        """Ends the body."""
        body, self.body = self.body, None
        if body is not None:
            body.__exit__(None, None, None)

    def state(self) -> State:
        found = {}
        for name, tensors in self.tensors.items():
            origins = [homes.origin_of_tensor(tensor) for tensor in tensors]
            places = {homes.place_of(tensor).type for tensor in tensors}
            assert len(places) == 1, (name, places)
            arrival: Any = origins[0].arrival if origins[0] is not None else None
            if arrival is not None:
                found[name] = self.arrivals.setdefault(arrival.func.__self__, self.newest)
            elif (bringing := self._bringing(tensors[0])) is not None:
                found[name] = self.arrivals[bringing].replace("arriving", "come")
            else:
                found[name] = PARKED if origins[0] is not None and origins[0].is_parked else HOME
                assert places == {"cpu" if found[name] == PARKED else "cuda"}, (name, places)
        return found

    def _bringing(self, tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            cdata = tensor.untyped_storage()._cdata
        for restore in streaming._under_way:
            if any(part.came_to == cdata for part in restore._parts):
                return restore
        return None

    def require_tied(self) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            storages = {t.untyped_storage()._cdata for t in self.tensors["shared"]}
        assert len(storages) == 1

    def require_exact(self) -> None:
        """Every byte, and use of both. It ends what arrives."""
        for name in OWN:
            assert self._bytes(name) == self.bytes[name]

    def _bytes(self, name: str) -> list[bytes]:
        return [p.detach().cpu().numpy().tobytes() for p in self.models[name].parameters()]


def play(kind: str, sequence: tuple[tuple[str, str], ...]) -> World:
    world = World(kind)
    for call in sequence:
        world.call(call)
        world.state()
    return world


@pytest.mark.parametrize("kind", ["one parameter", "another parameter", "a view", "assigned"])
def test_all_sequences_of_six_calls_keep_the_tie_and_every_byte(gpu: GPU, kind: str) -> None:
    go_through(gpu, kind, CALLS)


def test_so_do_all_of_eight_where_the_first_one_runs_in_less_vram_than_it_takes(gpu: GPU) -> None:
    calls = [(what, name) for what in STEPS for name in OWN]
    go_through(gpu, "another parameter", [*calls, *BODY], length=9)


def go_through(gpu: GPU, kind: str, calls: list[tuple[str, str]], length: int = 6) -> None:
    """All sequences of so many of these calls."""
    start: State = dict.fromkeys(("first's own", "shared", "second's own"), HOME)
    start |= {"body": ""} if calls != CALLS else {}
    known: dict[tuple[str, ...], tuple[tuple[str, str], ...]] = {tuple(start.values()): ()}
    newest, tried = [((), start)], 0
    for _length in range(length):
        following = []
        for sequence, state in newest:
            for call in calls:
                if call in BODY and (call == BODY[0]) == bool(state["body"]):
                    continue
                world, now = play(kind, sequence), expected(state, call)
                world.call(call)
                tried += 1
                places = {storage: now[storage] for storage in world.tensors}
                assert world.state() == places, (sequence, call)
                world.require_tied()
                there = sum(place != PARKED for place in places.values())
                assert requested_bytes(gpu.device) - gpu.before <= there * SIZE + 4096, call
                world.require_exact()
                world.require_tied()
                world.end()
                if tuple(now.values()) not in known:
                    known[tuple(now.values())] = (*sequence, call)
                    following.append(((*sequence, call), now))
        newest = following

    assert newest == []  # so many calls reach every state
    assert tried >= len(calls) * len(known) / 2 > 80
