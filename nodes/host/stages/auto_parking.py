"""Auto-parking: what is parked before a node runs, and what is brought home.

With the switch off only one thing happens: parked models among a node's inputs come home. With it
on, models that appear on wires are adopted, and room is made for each node: first the models go
that no remaining node uses, then those that are used farthest ahead.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import qmove_core as qmove
from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from .. import comfy, graph, meter, settings
from ..contract import ExecutionList, HostEntry
from ..guard import never_fails
from ..models import finding, residency, wires
from ..models.adopted import Adopted, adopted_models, adopted_of
from ..models.residency import Model
from . import needs

log = logging.getLogger("qmove")

Needed = dict[torch.device, int] | None  # bytes by device, None for unknown

_OWN_NODES = __name__.rpartition(".host.")[0]
_NEVER = 1 << 30  # steps


@dataclass
class NodeInputs:
    """The models that a node was given: adopted ones, and ComfyUI's own."""

    models: list[Adopted] = field(default_factory=list)
    patchers: list[HostEntry] = field(default_factory=list)


in_use = NodeInputs()  # of the node that runs now


def has_nothing_to_do() -> bool:
    """Whether qmove can leave this node alone without a look at it."""
    return not settings.auto_park() and not adopted_models() and not qmove.parked_models()


def prepare(nodes: ExecutionList, node_id: str) -> needs.Measurement | None:
    """Makes room for a node that is about to run, and brings home what it was given."""
    global in_use
    in_use = NodeInputs()
    # qmove's own nodes move models themselves, or only look at them.
    if getattr(graph.class_of(nodes, node_id), "__module__", "").startswith(_OWN_NODES):
        return None
    in_use = inputs = _inputs(graph.inputs_of(nodes, node_id))
    inputs.models += finding.taken_by(graph.class_of(nodes, node_id))
    if not settings.auto_park():
        residency.bring_home(inputs.models)
        return None
    key = (graph.class_name_of(nodes, node_id), node_id)
    choices = graph.choices_of(nodes, node_id)
    needed, is_custom = needs.known(key, choices), graph.is_custom(nodes, node_id)
    # For ComfyUI's own nodes no room is made: they ask ComfyUI for it.
    _make_room(order_to_park(nodes, node_id, inputs), inputs, needed if is_custom else {})
    residency.bring_home(inputs.models)
    _prefetch_next(nodes, node_id, inputs, needed)
    return needs.begin(key, choices) if is_custom or adopted_models() else None


@never_fails("ask ComfyUI for room", None)
def give_room(device: torch.device, nbytes: int) -> None:
    """For a model that wakes while a node runs: parks others, but none that the node was given."""
    wanted = nbytes + settings.vram_to_keep_free()
    residency.make_room(device, wanted, [*in_use.models, *in_use.patchers])


def finish(nodes: ExecutionList, node_id: str, measurement: needs.Measurement | None) -> None:
    """After a node has run: what it gave is adopted, what it took is remembered."""
    if measurement is not None:
        needs.learn(measurement)
    residency.register_woken()
    if settings.auto_park():
        residency.take_in(wires.find_models(graph.outputs_of(nodes, node_id)).modules)
        finding.look()


def out_of_memory(
    node_id: str, class_name: str, measurement: needs.Measurement | None, error: BaseException
) -> None:
    """Parks all that is idle, so that the next try has the room, and logs what was lacking."""
    took: dict[torch.device, int] = {}
    if measurement is not None:
        took = needs.peak(measurement)
        needs.forget(measurement.key)
    try:
        finding.look()
        residency.park([*residency.idle_models([]), *residency.idle_patchers([])])
    finally:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        lines = [f"Node {node_id} ({class_name}) ran out of memory: {reason}"]
        for device, free in measurement.free.items() if measurement is not None else ():
            free_now = meter.free_bytes(device) or 0
            if took[device] or free != free_now:
                lines.append(
                    f"  {device}: the node began with {readable_bytes(free)} free, and had taken "
                    f"{readable_bytes(took[device])} when that was not enough. Idle models were "
                    f"parked: {readable_bytes(free_now)} are free now."
                )
        log.error("\n".join(lines))


def order_to_park(
    nodes: ExecutionList | None, node_id: str | None, inputs: NodeInputs
) -> list[Model]:
    """All idle models, the least useful first.

    First come those that no remaining node uses, then those used farthest ahead; among equals the
    least recently used one, then the bigger one.
    """
    patchers = residency.idle_patchers(inputs.patchers)
    idle: list[Model] = [*residency.idle_models(inputs.models), *patchers]
    uses = _next_uses(nodes, node_id) if nodes is not None and len(idle) > 1 else {}

    def usefulness(model: Model) -> tuple[int, int, int]:
        steps = uses.get(_identity(model), _NEVER)
        if isinstance(model, Adopted):
            return -steps, model.last_used, -sum(model.resident.values())
        return -steps, 0, -model.loaded_size()

    return sorted(idle, key=usefulness)


def is_on(model: Model, device: torch.device) -> bool:
    return device in model.resident if isinstance(model, Adopted) else model.load_device == device


def _inputs(values: Iterable[Any]) -> NodeInputs:
    values = list(values)
    if not values:
        return NodeInputs()
    found = wires.find_models(values)
    wanted: list[Any] = [model for model in _parked_objects() if id(model) in found.seen]
    wanted += [m for m in found.modules if settings.auto_park() or adopted_of(m) is not None]
    wanted += [owner for owner in found.tensor_owners if adopted_of(owner) is not None]
    models = residency.take_in(wanted)
    for adopted in models:
        adopted.note_use()
    return NodeInputs(models, found.patchers)


def _parked_objects() -> list[Any]:
    """What is parked, by us or by another pack; of a dict or list, the models in it."""
    objects: list[Any] = []
    for model in qmove.parked_models():
        is_container = isinstance(model, (dict, list, tuple))
        objects += wires.find_models([model]).modules if is_container else [model]
    return objects


def _make_room(order: list[Model], inputs: NodeInputs, needed: Needed) -> None:
    """Parks idle models, in this order, until the node and what it was given have room."""
    if not order:
        return
    coming: Counter[torch.device] = Counter()
    for adopted in inputs.models:
        coming.update(adopted.parked)
    if settings.parks_each_stage():
        needed = None
    for device in meter.devices():
        there = [model for model in order if is_on(model, device)]
        if not there:
            continue
        wanted = _room_for(device, coming[device], needed)
        if not _swap(device, there, inputs.models, wanted):
            residency.park_until_free(there, device, wanted)


def _swap(
    device: torch.device,
    there: Sequence[Model],
    used: Sequence[Adopted],
    wanted: float,
) -> bool:
    """Where one model must leave and one comes home, and RAM has no room for both: swaps them.

    Returns:
        Whether it did.
    """
    away = [adopted for adopted in used if adopted.parked]
    if len(away) != 1 or not there or not isinstance(there[0], Adopted):
        return False
    leaving, coming, free = there[0], away[0], meter.free_bytes(device) or 0
    nbytes = leaving.resident[device]
    one_is_enough = len(there) == 1 or free + nbytes >= wanted
    on_one_device = set(leaving.resident) == set(coming.parked) == {device}
    if free >= wanted or not one_is_enough or not on_one_device:
        return False
    if settings.keep_mirrors() and for_hosts.has_room_on_host(nbytes):
        return False  # parking first is as fast
    try:
        residency.swap(leaving, coming)
    except (qmove.QMoveError, torch.OutOfMemoryError) as error:
        log.debug("could not swap %s for %s: %s", leaving.name, coming.name, str(error))
    return not coming.parked


@never_fails("bring a model home ahead of its use", None)
def _prefetch_next(nodes: ExecutionList, node_id: str, inputs: NodeInputs, needed: Needed) -> None:
    """Starts to bring home the model that is needed next, while this node computes, if both fit."""
    parked = {_identity(adopted): adopted for adopted in adopted_models() if adopted.parked}
    if not parked or needed is None:
        return
    uses = _next_uses(nodes, node_id)
    soonest = min(parked.keys() & uses.keys(), key=lambda identity: uses[identity], default=None)
    if soonest is None:
        return
    model, room = parked[soonest], Counter(needed)
    for patcher in inputs.patchers:  # it may have been loaded when the need was measured
        room[patcher.load_device] += max(0, patcher.model_size() - int(patcher.loaded_size()))
    for device, nbytes in model.parked.items():
        if (meter.free_bytes(device) or 0) < _room_for(device, nbytes, room):
            return
    if qmove.prefetch(model.model) is not None:
        log.info("%s begins to come home: it is needed next", model.name)
        residency.register([model])


def _room_for(device: torch.device, coming: int, needed: Needed) -> float:
    """Bytes that should be free on `device` before the node's models come home and it runs."""
    if needed is None or (needed and device not in needed):  # it may need anything
        return residency.EVERYTHING
    host = comfy.model_management()
    node = needed.get(device, 0)
    if coming and host is not None:
        # What ComfyUI asks for when the models come home, so that our order decides, not its own.
        node = max(node, int(0.1 * coming + host.minimum_inference_memory()))
    return coming + node + settings.vram_to_keep_free()


def _next_uses(nodes: ExecutionList, node_id: str | None) -> dict[int, int]:
    """For each model on a wire of a remaining node: how many nodes run before its next use."""
    uses: dict[int, int] = {}
    for waiting, steps in graph.steps_ahead(nodes).items():
        if waiting == node_id:
            continue
        found = wires.find_models(graph.inputs_of(nodes, waiting))
        own = [adopted_of(model) for model in (*found.modules, *found.tensor_owners)]
        for model in (*own, *found.patchers):
            if model is not None:
                identity = _identity(model)
                uses[identity] = min(steps, uses.get(identity, _NEVER))
    return uses


def _identity(model: Model) -> int:
    return id(model) if isinstance(model, Adopted) else id(model.model)  # clones share the model
