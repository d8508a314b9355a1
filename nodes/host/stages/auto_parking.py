"""Auto-parking: what is parked before a node runs, and what is brought home.

With the switch off only one thing happens: parked models among a node's inputs come home. With it
on, models that appear on wires are adopted, and room is made for a node that will lack it, and no
more than it lacks: first the models go that no remaining node uses, then those that are used
farthest ahead. Where everything fits, nothing moves.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import qmove_core as qmove
from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from .. import comfy, graph, meter, settings
from ..contract import ExecutionList, HostEntry
from ..guard import never_fails
from ..models import finding, holders, managers, names, naming, residency, wires
from ..models.adopted import Adopted, adopted_models, adopted_of
from ..models.emptied import emptied_in
from ..models.residency import Model
from . import needs, second_try
from .needs import Measurement, Signature

log = logging.getLogger("qmove")

Needed = Mapping[torch.device, int]  # bytes by device

_OWN_NODES = __name__.rpartition(".host.")[0]
_NEVER = 1 << 30  # steps
_NEXT_ROUND = _NEVER - 1  # of a loop: after every node that is there already
_WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx")

# Models that nodes of a loop have used: the prompt, and the nodes that expand into the rounds.
_used_in_loops: weakref.WeakKeyDictionary[Adopted, Any] = weakref.WeakKeyDictionary()


@dataclass
class NodeInputs:
    """The models that a node was given: adopted ones, and ComfyUI's own."""

    models: list[Adopted] = field(default_factory=list)
    patchers: list[HostEntry] = field(default_factory=list)


in_use = NodeInputs()  # of the node that runs now


def has_nothing_to_do() -> bool:
    """Whether qmove can leave this node alone without a look at it."""
    if settings.auto_park() or not for_hosts.nothing_away():
        return False
    return all(adopted.only_shown for adopted in adopted_models())


def prepare(nodes: ExecutionList, node_id: str) -> Measurement | None:
    """Makes room for a node that is about to run, and brings home what it was given."""
    global in_use
    in_use = NodeInputs()
    # qmove's own nodes move models themselves, or only look at them.
    if getattr(graph.class_of(nodes, node_id), "__module__", "").startswith(_OWN_NODES):
        return None
    values = graph.inputs_of(nodes, node_id)
    in_use = inputs = _inputs(values)
    inputs.models += finding.taken_by(graph.class_of(nodes, node_id))
    if not settings.auto_park():
        residency.bring_home(inputs.models)
        return None
    _note_loop(nodes, node_id, inputs.models)
    is_custom = graph.is_custom(nodes, node_id)
    signature = _signature(nodes, node_id, values)
    known = needs.learned.known(signature)
    # For ComfyUI's own nodes no room is made: they ask ComfyUI for it.
    needed = _expected(nodes, node_id, known, inputs, signature) if is_custom else {}
    _make_room(nodes, node_id, inputs, needed)
    residency.bring_home(inputs.models, inputs.patchers)
    residency.register_woken()  # what moves from here on is the node's doing
    if known is not None and known[1]:
        _prefetch_next(nodes, node_id, inputs, known[0])
    return needs.begin(signature) if is_custom or adopted_models() else None


def _signature(nodes: ExecutionList, node_id: str, values: Sequence[Any]) -> Signature:
    chosen = tuple(sorted(graph.values_of(nodes, node_id).items()))
    return Signature(graph.class_name_of(nodes, node_id), chosen, graph.shapes_of(values))


def _expected(
    nodes: ExecutionList,
    node_id: str,
    known: tuple[Needed, bool] | None,
    inputs: NodeInputs,
    signature: Signature,
) -> Needed:
    """Bytes by device that a node will take, as far as anybody can say before it runs.

    What nobody knows is not made room for: where the node then runs out of memory, it gets room and
    runs again (`second_try`). Where it may not run again it gets what ComfyUI itself keeps free.
    """
    if known is not None and known[1]:
        return known[0]
    host = comfy.model_management()
    if host is None:
        return {}
    home, files = host.get_torch_device(), _file_bytes(signature)
    needed = dict(known[0]) if known is not None else {}
    needed[home] = max(needed.get(home, 0), files)
    is_heavy = bool(inputs.models or inputs.patchers or signature.shapes)
    if known is None and is_heavy and not second_try.is_allowed(graph.class_of(nodes, node_id)):
        needed[home] = max(needed[home], int(host.minimum_inference_memory()))
    return needed


def _file_bytes(signature: Signature) -> int:
    """Bytes of the weights that a node names: files in ComfyUI's folders."""
    names = [v for _, v in signature.values if isinstance(v, str) and v.endswith(_WEIGHTS)]
    files = [file for name in names if (file := comfy.file_named(name)) is not None]
    return sum(file.stat().st_size for file in files)


@functools.cache  # so it is said once
def parks_on(device: torch.device) -> bool:
    """Whether parking gains room on a device: not where its memory is the machine's RAM."""
    if not for_hosts.shares_memory_with_host(device):
        return True
    log.warning(
        "%s shares its memory with the CPU: a parked model takes as much of it, and twice as much "
        "while it is copied. So nothing is parked there by itself; the nodes and buttons still do.",
        device,
    )
    return False


@never_fails("count what yields by itself", 0)
def yielding_bytes(device: torch.device) -> int:
    """What goes by itself when something is allocated; not what the running node computes with."""
    return residency.yielding_bytes(device, in_use.patchers)


@never_fails("ask ComfyUI for room", None)
def give_room(device: torch.device, nbytes: int) -> None:
    """For a model that wakes while a node runs: parks others, but none that the node was given."""
    if not parks_on(device):
        return
    wanted = nbytes + settings.vram_to_keep_free()
    residency.make_room(device, wanted, [*in_use.models, *in_use.patchers])


def finish(nodes: ExecutionList, node_id: str, measurement: Measurement | None) -> None:
    """After a node has run: what it gave is adopted, what it took is remembered."""
    moved = residency.register_woken()
    if not settings.auto_park():
        show(nodes, node_id)
        return
    outputs = graph.outputs_of(nodes, node_id)
    stats = meter.all_stats()  # read once: it is most of what qmove costs a node
    known = {adopted.number for adopted in adopted_models()}
    taken = residency.take_in(filter(_is_ours, wires.find_models(outputs).modules))
    found = finding.look(nodes, node_id, stats)  # what a node keeps it does not take again
    naming.note(nodes, node_id, [adopted.model for adopted in found])
    given = [adopted for adopted in taken if adopted.number not in known]
    if measurement is not None and measurement.allocated and not moved:
        peak, left = needs.taken(measurement, stats)
        kept = Counter(left)
        if any(left.values()):
            for adopted in given:
                kept.subtract(adopted.resident)
            kept.subtract(_bytes_of_tensors(outputs))
        needs.learned.learn(measurement.signature, peak, +kept)


def show(nodes: ExecutionList, node_id: str) -> None:
    """With auto-parking off: what a node gave is listed for the user, and stays where it is."""
    modules = wires.find_models(graph.outputs_of(nodes, node_id)).modules
    residency.take_in(m for m in modules if managers.manager_of(m) is None)
    naming.note(nodes, node_id)


def _bytes_of_tensors(outputs: Iterable[Any]) -> Needed:
    totals: Counter[torch.device] = Counter()
    for tensor in graph.tensors_in(outputs):
        totals[tensor.device] += tensor.untyped_storage().nbytes()
    return totals


def note_shortage(
    node_id: str, class_name: str, measurement: Measurement | None, error: BaseException
) -> None:
    """Says what a node lacked that ran out of memory, and remembers that it takes more."""
    reason = (str(error).strip() or repr(error)).splitlines()[0]
    lines = [f"Node {node_id} ({class_name}) ran out of memory: {reason}"]
    peak, left = needs.taken(measurement) if measurement is not None else ({}, {})
    for device in second_try.full_devices(error):
        if measurement is None or device not in peak:
            continue
        free = (meter.free_bytes(device) or 0) + left[device]
        lines.append(
            f"  {device}: {readable_bytes(free)} were free when the node began, and it had taken "
            f"{readable_bytes(peak[device])} when that was not enough."
        )
        needs.learned.learn(measurement.signature, {device: max(peak[device], free)}, {})
    for device in second_try.full_devices(error):
        lines += holders.pinned_on(device)
    log.error("\n".join(lines))


def lost_by(inputs: NodeInputs) -> list[tuple[str, list[str]]]:
    """For each of these models of which somebody has emptied storages: its name, and theirs."""
    lost = [(model.name, model.lost) for model in inputs.models]
    lost += [(names.of(p.model), emptied_in(p.model)) for p in inputs.patchers]
    return [(name, tensors) for name, tensors in lost if tensors]


def lost_in_words(lost: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A line for each model that has lost bytes."""
    return [
        f"{len(tensors)} of the tensors of {name} have no bytes any more "
        f"({for_hosts.first_of(tensors)}): another node has emptied them (resize_(0)). Load the "
        "model again: change an input of its loader, or use ComfyUI's Unload Models and Clear "
        "Cache."
        for name, tensors in lost
    ]


def say_who_holds(full: Sequence[torch.device]) -> None:
    """After an out-of-memory that parking cannot help: who holds the devices, and what frees it."""
    for device in full:
        lines = [f"Nothing idle is left to park on {device}. Who holds it now:"]
        log.error("\n".join([*lines, *holders.table(device)]))


def make_room_again(full: Sequence[torch.device]) -> None:
    """Parks all that is idle on the devices that were full: how much would do, nobody knows."""
    with for_hosts.released_once():
        for model in idle_on(full):
            try:
                residency.park([model])
            except qmove.QMoveError as error:  # RAM is short, or it cannot be moved
                log.warning("%s", error)


def idle_on(devices: Sequence[torch.device]) -> list[Model]:
    """Idle models on any of these devices, the least useful first, also those of no wire."""
    finding.look()
    gaining = list(filter(parks_on, devices))
    return [m for m in order_to_park(None, None, in_use) if any(is_on(m, d) for d in gaining)]


def order_to_park(
    nodes: ExecutionList | None, node_id: str | None, inputs: NodeInputs
) -> list[Model]:
    """All idle models, the least useful first.

    First come those that no remaining node uses, then those used farthest ahead; among equals the
    least recently used one, then the bigger one.
    """
    patchers = residency.idle_patchers(inputs.patchers)
    idle: list[Model] = [*residency.evictable_models(inputs.models), *patchers]
    uses = _next_uses(nodes, node_id) if nodes is not None and len(idle) > 1 else {}

    def usefulness(model: Model) -> tuple[int, int, int]:
        steps = uses.get(_identity(model), _NEVER)
        if isinstance(model, Adopted):
            if steps == _NEVER and nodes is not None and _runs_on(nodes, model):
                steps = _NEXT_ROUND
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
    wanted += [m for m in found.modules if _is_ours(m)]
    wanted += [owner for owner in found.tensor_owners if adopted_of(owner) is not None]
    models = residency.take_in([*wanted, *finding.groups_among(found.seen)])
    for adopted in models:
        adopted.note_use()
    return NodeInputs(models, found.patchers)


def _is_ours(module: nn.Module) -> bool:
    """Whether it is adopted, or auto-parking adopts it: not what another manager moves."""
    return adopted_of(module) is not None or (
        settings.auto_park() and managers.manager_of(module) is None
    )


def _parked_objects() -> list[Any]:
    """What is parked, by us or by another pack; of a dict or list, the models in it."""
    objects: list[Any] = []
    if for_hosts.nothing_away():
        return objects
    for model in qmove.parked_models():
        is_container = isinstance(model, (dict, list, tuple))
        objects += wires.find_models([model]).modules if is_container else [model]
    return objects


def _make_room(nodes: ExecutionList, node_id: str, inputs: NodeInputs, needed: Needed) -> None:
    """Parks idle models, the least useful first, where the node and its models lack room."""
    coming: Counter[torch.device] = Counter()
    for adopted in inputs.models:
        coming.update(adopted.parked)
    order: list[Model] | None = None
    for device in filter(parks_on, meter.devices()):
        wanted: float = _room_for(device, coming[device], needed)
        if settings.parks_each_stage() and _computes_on(device, inputs, needed):
            wanted = residency.EVERYTHING
        if not wanted or (free := meter.free_bytes(device)) is None or free >= wanted:
            continue
        wanted -= residency.yielding_bytes(device, inputs.patchers)
        if free >= wanted:
            continue
        if order is None:
            finding.look()
            order = order_to_park(nodes, node_id, inputs)
        there = [model for model in order if is_on(model, device)]
        if there and not _swap(device, there, inputs.models, wanted):
            residency.park_until_free(there, device, wanted)


def _computes_on(device: torch.device, inputs: NodeInputs, needed: Needed) -> bool:
    """Whether a node uses a device, as far as one can see: its models are there, or it took VRAM
    there before. One that shows nothing uses ComfyUI's own."""
    places = {device for device, nbytes in needed.items() if nbytes}
    for adopted in inputs.models:
        places.update(adopted.resident, adopted.parked)
    places.update(patcher.load_device for patcher in inputs.patchers)
    host = comfy.model_management()
    return device in places or (
        not places and host is not None and device == host.get_torch_device()
    )


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
    away = [adopted for adopted in adopted_models() if adopted.parked and not adopted.left_alone]
    parked = {_identity(adopted): adopted for adopted in away}
    if not parked:
        return
    uses = _next_uses(nodes, node_id)
    soonest = min(parked.keys() & uses.keys(), key=lambda identity: uses[identity], default=None)
    if soonest is None:
        return
    model, room = parked[soonest], Counter(needed)
    for patcher in inputs.patchers:  # it may have been loaded when the need was measured
        room[patcher.load_device] += max(0, patcher.model_size() - int(patcher.loaded_size()))
    for device, nbytes in model.parked.items():
        yields = residency.yielding_bytes(device, inputs.patchers)
        if (meter.free_bytes(device) or 0) + yields < _room_for(device, nbytes, room):
            return
    if qmove.prefetch(model.movable) is not None:
        log.info("%s begins to come home: it is needed next", model.name)
        residency.register([model])


def _room_for(device: torch.device, coming: int, needed: Needed) -> int:
    """Bytes that should be free on `device` before the node's models come home and it runs."""
    return coming + needed.get(device, 0) + settings.vram_to_keep_free()


def _note_loop(nodes: ExecutionList, node_id: str, models: Iterable[Adopted]) -> None:
    """Notes that a loop uses these models: its next round has nodes that are not there yet."""
    loops = graph.expanded_from(nodes, node_id)
    for adopted in models if loops else ():
        _used_in_loops[adopted] = weakref.ref(nodes), frozenset(loops)


def _runs_on(nodes: ExecutionList, model: Adopted) -> bool:
    """Whether a loop that has used a model still runs."""
    of_nodes, loops = _used_in_loops.get(model, (None, frozenset()))
    return of_nodes is not None and of_nodes() is nodes and not loops.isdisjoint(nodes.pendingNodes)


def _next_uses(nodes: ExecutionList, node_id: str | None) -> dict[int, int]:
    """For each model on a wire of a remaining node: how many nodes run before its next use."""
    uses: dict[int, int] = {}
    on_wire: dict[int, tuple[Any, set[int]]] = {}  # many nodes wait for the same wire
    for waiting, steps in graph.steps_ahead(nodes).items():
        for value in graph.inputs_of(nodes, waiting) if waiting != node_id else ():
            if id(value) not in on_wire:
                on_wire[id(value)] = value, _identities_in(value)
            for identity in on_wire[id(value)][1]:
                uses[identity] = min(steps, uses.get(identity, _NEVER))
    return uses


def _identities_in(value: Any) -> set[int]:
    found = wires.find_models([value])
    own = [adopted_of(model) for model in (*found.modules, *found.tensor_owners)]
    return {_identity(model) for model in (*own, *found.patchers) if model is not None}


def _identity(model: Model) -> int:
    return id(model) if isinstance(model, Adopted) else id(model.model)  # clones share the model
