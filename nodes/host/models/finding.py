"""Finds models that no wire carries: they hold the VRAM that no known model explains.

Packs keep them on a node's instance, in a global, a class, a closure, a cache. What is allocated on
a device, less what the known models, ComfyUI's own ones and the tensors on wires hold, is
unexplained. Only when it has grown are the tensors of this process looked through, and only then
who holds them. Modules are adopted whole; tensors outside of modules together with those beside
them.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.weak import TensorWeakRef

from qmove_core import for_hosts

from .. import comfy, graph, meter
from ..contract import ExecutionList
from ..guard import never_fails
from . import managers, residency, wires
from .adopted import Adopted, adopted_models, adopted_of
from .loose_tensors import LooseTensors, group_of, living_groups

log = logging.getLogger("qmove")

WORTH_A_LOOK = 1 << 20  # bytes; below it nothing is looked for
MOST_CLIMBS = 4  # of one look, each for a few of the largest tensors
# What flows on these wires is made anew by each run, and is no model.
_MEDIA = frozenset({"IMAGE", "MASK", "LATENT", "CONDITIONING", "AUDIO", "VIDEO", "SIGMAS", "NOISE"})

Bytes = dict[torch.device, int]


@dataclass(frozen=True)
class LeftAlone:
    """VRAM that was found and is left where it is.

    Attributes:
        name: what it is, and where it is kept.
        reason: why, or who moves it.
        found: bytes when it was found.
        module: what another manager moves; None for tensors.
    """

    name: str
    reason: str
    found: Bytes
    module: weakref.ReferenceType[nn.Module] | None = None

    @property
    def resident(self) -> Bytes:
        """Bytes now, as far as they can be counted."""
        if self.module is None:
            return self.found
        module = self.module()
        return _bytes(_storages_of(module)) if module is not None else {}


@dataclass
class _Books:
    """What was known after the last look.

    Attributes:
        allocated: bytes on each device, the least since then.
        unexplained: bytes that a look could not explain.
        on_wires: tensors among the outputs of nodes.
        left_alone: what was found then and is not ours.
    """

    allocated: Counter[torch.device] = field(default_factory=Counter)
    unexplained: Counter[torch.device] = field(default_factory=Counter)
    on_wires: dict[int, TensorWeakRef] = field(default_factory=dict)
    left_alone: list[LeftAlone] = field(default_factory=list)


_books = _Books()


_NOTHING: list[Adopted] = []


@never_fails("look for models that no wire carries", _NOTHING)
def look(
    nodes: ExecutionList | None = None, node_id: str | None = None, stats: meter.Stats | None = None
) -> list[Adopted]:
    """Adopts and registers the models that hold VRAM which no known model explains.

    After a node (which is then named) it costs a reading of the allocator unless more is allocated
    than at the last look, and not even that where `stats` has one. Without a node, where room is
    lacking, it always takes stock.
    """
    allocated = _allocated(stats)
    found: list[Adopted] = []
    if nodes is not None and node_id is not None:
        if not _grown(allocated, _books.allocated):
            _books.allocated &= allocated
            return []
        found = _take_outputs(nodes, node_id)
    with for_hosts.lock:
        unexplained = allocated - _explained()
        if _grown(unexplained, _books.unexplained):
            found += _look_through()
            unexplained = _allocated() - _explained()
            _books.unexplained = unexplained
        else:
            _books.unexplained &= unexplained
        _books.allocated = _allocated()
    return found


def taken_by(node_class: type | None) -> list[Adopted]:
    """The found models that a node uses without a wire: those on its instances or its class.

    They count as the node's inputs: they are not parked for it, and they are home before it runs.
    """
    if node_class is None:
        return []
    return [adopted for adopted in adopted_models() if node_class in adopted.users]


def groups_among(seen: set[int]) -> list[LooseTensors]:
    """The groups of which a tensor is among these objects, by `id`."""
    return [group for group in living_groups() if not seen.isdisjoint(group.ids())]


def left_alone() -> list[LeftAlone]:
    """What the last look found and left to others."""
    return list(_books.left_alone)


def on_wires() -> Bytes:
    """Bytes of images, latents and the like among the outputs of nodes."""
    return _bytes(s for tensor in _tensors_on_wires() if (s := _storage(tensor)) is not None)


def _bytes(storages: Iterable[torch.UntypedStorage]) -> Bytes:
    totals: Counter[torch.device] = Counter()
    for storage in {storage._cdata: storage for storage in storages}.values():
        totals[storage.device] += storage.nbytes()
    return dict(totals)


def forget_all() -> None:
    """Forgets what was known, as if nothing had been looked at."""
    global _books
    _books = _Books()


# The books ----------------------------------------------------------------------------------------


def _allocated(stats: meter.Stats | None = None) -> Counter[torch.device]:
    stats = meter.all_stats() if stats is None else stats
    return Counter(
        {d: meter.bytes_of(of_one, "allocated", "current") for d, of_one in stats.items()}
    )


def _grown(now: Counter[torch.device], before: Counter[torch.device]) -> bool:
    return any(nbytes - before[device] >= WORTH_A_LOOK for device, nbytes in now.items())


def _explained() -> Counter[torch.device]:
    """Bytes of the known models, of ComfyUI's own ones and of tensors on wires, by device."""
    explained: Counter[torch.device] = Counter(on_wires())
    for adopted in adopted_models():
        explained.update(adopted.resident)
    for entry in residency.hosts_own_entries():
        if not residency.is_dynamic(entry):
            explained[entry.load_device] += int(entry.loaded_size())
    for left in _books.left_alone:
        explained.update(left.resident if left.module is not None else {})
    return explained


def _tensors_on_wires() -> Iterator[torch.Tensor]:
    for key, reference in list(_books.on_wires.items()):
        tensor = reference()
        if tensor is None:
            _books.on_wires.pop(key, None)  # another thread may have looked too
        else:
            yield tensor


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage | None:
    with torch._C.DisableTorchFunction():
        if not torch._C._has_storage(tensor):
            return None
        storage = tensor.untyped_storage()
    return storage if storage.device.type not in ("cpu", "meta") else None


def _take_outputs(nodes: ExecutionList, node_id: str) -> list[Adopted]:
    """Notes the tensors that a node gave; those on wires of a pack's own kind are a model's."""
    types = getattr(graph.class_of(nodes, node_id), "RETURN_TYPES", ())
    found: list[Adopted] = []
    for index, values in enumerate(graph.outputs_of(nodes, node_id)):
        kind = types[index] if index < len(types) else "*"
        on_wire = wires.find_models([values])
        is_media = kind in _MEDIA or kind == "*" or any(isinstance(v, torch.Tensor) for v in values)
        if is_media:
            _books.on_wires.update((id(tensor), TensorWeakRef(tensor)) for tensor in on_wire.loose)
            continue
        models: list[Any] = list(on_wire.tensor_owners)
        if sum(tensor.nbytes for tensor in on_wire.loose) >= WORTH_A_LOOK:
            place = f"{kind} of {graph.class_name_of(nodes, node_id)}"
            models.append(group_of(place, on_wire.loose))
        found += residency.take_in(models)
    return found


# The look -----------------------------------------------------------------------------------------


def _look_through() -> list[Adopted]:
    patcher_class = comfy.model_patcher_class()
    classes = (patcher_class,) if patcher_class is not None else ()
    known = {cdata for adopted in adopted_models() for cdata in adopted.storages()}
    known |= {s._cdata for tensor in _tensors_on_wires() if (s := _storage(tensor)) is not None}
    heap = for_hosts.Heap(known, classes)
    roots = {id(patcher.model): patcher.model for patcher in heap.others}
    for root in roots.values():
        if isinstance(root, nn.Module):
            heap.claim([storage._cdata for storage in _storages_of(root)])
    _books.left_alone = []
    known_place = _Titles()
    found = _adopt_modules(heap, known_place)
    for _ in range(MOST_CLIMBS):
        largest = [t for t in heap.largest(for_hosts.AT_ONCE) if heap.is_unclaimed(t)]
        if sum(heap.unclaimed().values()) < WORTH_A_LOOK or not largest:
            break
        places = for_hosts.places(heap, largest, known_place)
        for tensor, place in zip(largest, places, strict=True):
            if heap.is_unclaimed(tensor):
                found += _adopt_tensors(heap, tensor, place)
    return found


def _storages_of(module: nn.Module) -> Iterator[torch.UntypedStorage]:
    for part in module.modules():
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None and (storage := _storage(tensor)) is not None:
                yield storage


def _adopt_modules(heap: for_hosts.Heap, known_place: _Titles) -> list[Adopted]:
    ours = heap.modules_with_unclaimed()
    for module in tuple(ours):
        manager = managers.manager_of(module)
        if manager is not None:
            storages = list(_storages_of(module))
            heap.claim([storage._cdata for storage in storages])
            left = (type(module).__name__, f"moved by {manager}", _bytes(storages))
            _books.left_alone.append(LeftAlone(*left, weakref.ref(module)))
            ours.remove(module)
    found = residency.take_in(ours)
    for adopted in found:
        heap.claim(adopted.storages())
    for module, place in zip(ours, for_hosts.places(heap, ours, known_place), strict=True):
        if (its := adopted_of(module)) is not None:
            _note_place(its, place)
    return found


def _adopt_tensors(
    heap: for_hosts.Heap, tensor: torch.Tensor, place: for_hosts.Place
) -> list[Adopted]:
    """Adopts a tensor that no module has registered, with those that are kept beside it."""
    if place.kind == "module":
        module = heap.outermost(place.holders[-1])  # type: ignore[arg-type]
        (adopted,) = residency.take_in([module])
        heap.claim(adopted.storages())
        if not heap.is_unclaimed(tensor):
            return [adopted]
    together = [tensor] if place.kind in ("C", "unknown", "module") else heap.below(place.base)
    together = together if any(other is tensor for other in together) else [tensor]
    storages = [s for other in together if (s := _storage(other)) is not None]
    heap.claim([storage._cdata for storage in storages])
    nbytes = _bytes(storages)
    if place.kind in ("C", "unknown", "module"):
        _books.left_alone.append(LeftAlone(str(place), "qmove cannot park it", nbytes))
        return []
    if sum(nbytes.values()) < WORTH_A_LOOK:
        return []
    (adopted,) = residency.take_in([group_of(str(place), together)])
    _note_place(adopted, place)
    return [adopted]


def _note_place(adopted: Adopted, place: for_hosts.Place) -> None:
    adopted.place = "" if place.kind in ("C", "unknown") else str(place)
    owner = place.holders[-1]
    if place.kind == "known":
        cls: type = owner if isinstance(owner, type) else type(owner)
        adopted.users.add(cls)
    log.info("found %s: %s", adopted.name, place)


class _Titles:
    """Names the node that an object is the instance or the class of, for one look."""

    def __init__(self) -> None:
        self._titles = comfy.names_of_node_classes()

    def __call__(self, obj: Any) -> str | None:
        cls = obj if isinstance(obj, type) else type(obj)
        # New ComfyUIs run a subclass of the class that a pack registered.
        title = next((self._titles[base] for base in cls.__mro__ if base in self._titles), None)
        return f"{title} node" if title is not None else None
