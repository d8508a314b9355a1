"""What is parked before a node runs, and what is brought home.

With the switch off only one thing happens: parked models among a node's inputs come home. With it on, models that appear on wires
are adopted, and what a node lacks is freed: first what no remaining node uses, then what is used farthest ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

import qmove_core as qmove
from qmove_core.errors import readable_bytes

from .. import comfy, graph, settings
from ..contract import ExecutionList, HostEntry
from ..guard import never_fails
from ..models import residency, wires
from ..models.adopted import Adopted, adopted_models, adopted_of
from . import needs

log = logging.getLogger("qmove")

_OWN_NODES = __name__.rpartition(".host.")[0]


@dataclass
class Used:
    """What a node was given: adopted models, and ComfyUI's own."""

    models: list[Adopted] = field(default_factory=list)
    patchers: list[HostEntry] = field(default_factory=list)


in_use = Used()  # of the node that runs now


def has_nothing_to_do() -> bool:
    """Whether qmove can leave this node alone without a look at it."""
    return not settings.auto_park() and not adopted_models() and not qmove.parked_models()


def prepare(nodes: ExecutionList, node_id: str) -> needs.Measurement | None:
    """Makes room for a node that is about to run, and brings home what it was given."""
    global in_use
    in_use = Used()
    if _is_own(nodes, node_id):  # they move models themselves, or only look at them
        return None
    in_use = used = _used(graph.inputs_of(nodes, node_id))
    if not settings.auto_park():
        residency.bring_home(used.models)
        return None
    key = (graph.class_name_of(nodes, node_id), node_id)
    is_custom = graph.is_custom(nodes, node_id)
    choices = graph.choices_of(nodes, node_id) if is_custom else ()
    if settings.parks_each_stage():
        residency.park(residency.idle_models(used.models), residency.idle_patchers(used.patchers))
    else:
        _free_what_is_lacking(nodes, node_id, used, key, choices)
    residency.bring_home(used.models)
    _prefetch_next(nodes, node_id, needs.known(key, choices) if is_custom else {})
    return needs.begin(key, choices) if is_custom else None


@never_fails("ask ComfyUI for room", None)
def give_room(device: torch.device, nbytes: int) -> None:
    """A model wakes in the middle of a node and finds too little room: others go, but none that this node was given."""
    residency.make_room(
        device, nbytes + settings.vram_to_keep_free(), in_use.models, in_use.patchers
    )


def finish(nodes: ExecutionList, node_id: str, measurement: needs.Measurement | None) -> None:
    """After a node has run: what it gave is adopted, what it took is remembered."""
    if measurement is not None:
        needs.learn(measurement)
    residency.register_woken()
    if settings.auto_park():
        outputs = graph.outputs_of(nodes, node_id)
        residency.take_in(wires.find_models(outputs).modules if outputs else [])


def out_of_memory(
    node_id: str, class_name: str, measurement: needs.Measurement | None, error: BaseException
) -> None:
    """Parks all that is idle, so that the next try has the room, and logs what was lacking."""
    residency.park(residency.idle_models([]), residency.idle_patchers([]))
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    lines = [f"Node {node_id} ({class_name}) ran out of memory: {reason}"]
    if measurement is not None:
        took = needs.peak(measurement)
        lines += [
            f"  {device}: the node began with {readable_bytes(free)} free, and had taken {readable_bytes(took[device])} "
            f"when that was not enough. What is idle is parked: {readable_bytes(residency.free_bytes(device) or 0)} are free."
            for device, free in measurement.free.items()
            if took[device] or free != residency.free_bytes(device)
        ]
        needs.forget(measurement.key)
    log.error("\n".join(lines))


def order_to_park(
    nodes: ExecutionList | None, node_id: str | None, used: Used
) -> list[Adopted | HostEntry]:
    """All idle models, the least useful first: what no remaining node uses, then what is used farthest ahead.

    Among equals the one that was used longest ago comes first, then the bigger one.
    """
    idle: list[Adopted | HostEntry] = [
        *residency.idle_models(used.models),
        *residency.idle_patchers(used.patchers),
    ]
    if not idle:
        return idle
    uses = _next_uses(nodes, node_id) if nodes is not None and len(idle) > 1 else {}
    last_used = {_identity(model): model.last_used for model in idle if isinstance(model, Adopted)}

    def usefulness(model: Adopted | HostEntry) -> tuple[int, int, int]:
        identity = _identity(model)
        return -uses.get(identity, _NEVER), last_used.get(identity, 0), -_size(model)

    return sorted(idle, key=usefulness)


def _used(values: Iterable[Any]) -> Used:
    values = list(values)
    if not values:
        return Used()
    found = wires.find_models(values)
    wanted: list[Any] = [model for model in _parked_objects() if id(model) in found.seen]
    wanted += [
        model for model in found.modules if settings.auto_park() or adopted_of(model) is not None
    ]
    wanted += [keeper for keeper in found.keepers if adopted_of(keeper) is not None]
    models = residency.take_in(wanted)
    for adopted in models:
        adopted.note_use()
    return Used(models, found.patchers)


def _parked_objects() -> list[Any]:
    """What is parked, by us or by another pack; of a dict or list, the models in it."""
    models = qmove.parked_models()
    if not models:
        return []
    containers = [model for model in models if isinstance(model, (dict, list, tuple))]
    return [
        model for model in models if not isinstance(model, (dict, list, tuple))
    ] + wires.find_models(containers).modules


def _free_what_is_lacking(
    nodes: ExecutionList, node_id: str, used: Used, key: tuple[str, str], choices: tuple[Any, ...]
) -> None:
    order = order_to_park(nodes, node_id, used)
    if not order:
        return
    coming: dict[torch.device, int] = {}
    for adopted in used.models:
        for device, nbytes in adopted.parked.items():
            coming[device] = coming.get(device, 0) + nbytes
    known = needs.known(key, choices) if graph.is_custom(nodes, node_id) else {}
    for device in residency.devices():
        wanted = _room_for(device, coming.get(device, 0), known)
        residency.park_until_free(
            [model for model in order if is_on(model, device)], device, wanted
        )


@never_fails("bring a model home ahead of its use", None)
def _prefetch_next(
    nodes: ExecutionList, node_id: str, known: dict[torch.device, int] | None
) -> None:
    """While this node computes, the model that is needed next begins to come home, if both have room."""
    parked = {_identity(adopted): adopted for adopted in adopted_models() if adopted.parked}
    if not parked or known is None:
        return
    uses = {
        identity: steps
        for identity, steps in _next_uses(nodes, node_id).items()
        if identity in parked
    }
    soonest = parked[min(uses, key=lambda identity: uses[identity])] if uses else None
    if soonest is None:
        return
    for device, nbytes in soonest.parked.items():
        if (residency.free_bytes(device) or 0) < _room_for(device, nbytes, known):
            return
    if soonest.begin_to_come_home():
        log.info("%s begins to come home: it is needed next", soonest.name)
        residency.register([soonest])


_NEVER = 1 << 30


def _room_for(device: torch.device, coming: int, known: dict[torch.device, int] | None) -> float:
    """Bytes that should be free on `device` before the node's models come home and it runs."""
    if known is None or (known and device not in known):  # may need anything
        return residency.EVERYTHING
    host = comfy.model_management()
    spared = settings.vram_to_keep_free()
    if not coming or host is None:
        return known.get(device, 0) + coming + spared
    # What the host itself will ask for when the models come home: so that our order decides, not its own.
    return (
        coming + spared + max(known.get(device, 0), 0.1 * coming + host.minimum_inference_memory())
    )


def _next_uses(nodes: ExecutionList, node_id: str | None) -> dict[int, int]:
    """For models that remaining nodes have on their wires: how many nodes run before the next of these."""
    uses: dict[int, int] = {}
    for waiting, steps in graph.steps_ahead(nodes).items():
        if waiting == node_id:
            continue
        found = wires.find_models(graph.inputs_of(nodes, waiting))
        models: list[Adopted | HostEntry | None] = [
            adopted_of(model) for model in (*found.modules, *found.keepers)
        ]
        for model in (*models, *found.patchers):
            if model is not None:
                identity = _identity(model)
                uses[identity] = min(steps, uses.get(identity, _NEVER))
    return uses


def _identity(model: Adopted | HostEntry) -> int:
    return (
        id(model) if isinstance(model, Adopted) else id(model.model)
    )  # clones of a patcher share its model


def is_on(model: Adopted | HostEntry, device: torch.device) -> bool:
    return device in model.resident if isinstance(model, Adopted) else model.load_device == device


def _size(model: Adopted | HostEntry) -> int:
    return sum(model.resident.values()) if isinstance(model, Adopted) else model.loaded_size()


def _is_own(nodes: ExecutionList, node_id: str) -> bool:
    return getattr(graph.class_of(nodes, node_id), "__module__", "").startswith(_OWN_NODES)
