"""Meta tensors to real ones: a model that accelerate spread over devices, RAM and disk becomes an ordinary one again.

A transaction: find the data of every meta tensor, check it and the budget, read, commit. Before the commit nothing of the
model has changed. A meta Parameter stays the same object: it exchanges its implementation with a real tensor's.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import arena, budget, devices, kinds, registry
from .digest import digest_of
from .dispatch import Dispatch, Slot, is_dispatched, slots, take_off
from .errors import MetaTensorsPresent, NotEnoughMemory, OffloadedDataError, readable_bytes
from .interrupts import interrupts_deferred
from .inventory import Inventory, inventory
from .offloaded import Source, Sources, Unusable
from .reading import Read, read
from .rebinding import exchange, stand_in, tensor_over
from .settings import settings
from .ties import find_ties
from .transfer import Progress

log = logging.getLogger("qmove")

Device = str | int | torch.device
DeviceMap = Mapping[str, Device]


def materialize_meta_tensors(
    model: Any, target_device: Device | DeviceMap = "cpu", *, progress: Progress | None = None
) -> Any:
    """Gives every meta tensor its real data, and takes accelerate's dispatch off. Materializing a whole model does nothing.

    What was real stays where it is. To the CPU nothing goes through VRAM. Weights that lie in RAM are used where they lie, those
    in safetensors files through private memory maps: the files are never written, and must not be overwritten in place.

    Args:
        model: a module, a pipeline, or anything that holds them.
        target_device: for the meta tensors: a device, or a device_map from name prefixes ("" for the rest) to devices.
        progress: called as `progress(bytes_done, bytes_in_all)`; what it raises stops everything with nothing changed.

    Returns:
        `model`, the same object with the same Parameter objects. It moves as any model does.

    Raises:
        OffloadedDataError: data is missing, truncated, or not what the model needs; file and tensor are named.
        MetaTensorsPresent: nobody has data for some meta tensors.
        NotEnoughMemory: RAM, a cgroup, `ram_limit` or VRAM; nothing was changed.
    """
    materialize(model, target_device, progress)
    return model


@dataclass
class Piece:
    """One tensor to materialize.

    Attributes:
        slots: every place in the model that it takes; tied weights have several.
        tensor: the object that stands in all of them afterwards. A meta tensor, or a real one that others are tied to.
        source: where its data lies.
        device: where it goes.
        dtype, shape: of the tensor, which may change them later.
        opened: the source's own tensor.
        joins_real: the tensor was real before, and needs no data.
        real: what the tensor gets to look into.
        digest: of the bytes it has at first, where asked for.
    """

    slots: list[Slot]
    tensor: torch.Tensor
    source: Source
    device: torch.device
    dtype: torch.dtype
    shape: torch.Size
    opened: torch.Tensor
    joins_real: bool
    real: torch.Tensor | None = None
    digest: int | None = None

    @property
    def name(self) -> str:
        return self.slots[0].full_name

    @property
    def is_shared(self) -> bool:
        """Whether the model is to look into the source's own memory."""
        return self.source.is_shared_as(self.tensor.dtype, self.device)


@dataclass
class Materialized:
    """What was done, and all that is needed to undo it.

    Attributes:
        pieces: the tensors that were materialized.
        dispatch: the hooks that were taken off.
        homes: the device of everything that was real before, by name.
        buffers: (registered, name, tensor) of the real buffers: `nn.Module.to` exchanges buffers for new objects.
        undo: steps that bring the objects back, to be run from the last to the first.
    """

    pieces: list[Piece] = field(default_factory=list)
    dispatch: Dispatch = field(default_factory=Dispatch)
    homes: dict[str, torch.device] = field(default_factory=dict)
    buffers: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = field(default_factory=list)
    undo: list[Callable[[], None]] = field(default_factory=list)


def materialize(
    model: object, target_device: Device | DeviceMap, progress: Progress | None = None, *, wants_digests: bool = False
) -> Materialized:
    """As `materialize_meta_tensors`, and returns what is needed to undo it; to see changes, that takes digests."""
    started = time.perf_counter()
    with registry.lock:
        action = f"Materializing {type(model).__name__}"
        place = _placement(target_device)
        held = inventory(model)
        if not held.meta and not is_dispatched(held.modules.values()):
            return Materialized()
        pieces = _plan(action, held, place)
        _check_budget(action, pieces)
        _read(action, pieces, progress, wants_digests)
        done = Materialized(
            pieces,
            homes={name: holding.device for holding in held.holdings for name in holding.names},
            buffers=[
                (module._buffers, name, buffer)
                for module in held.modules.values()
                for name, buffer in module._buffers.items()
                if buffer is not None and buffer.device.type != "meta"
            ],
        )
        with interrupts_deferred():
            _commit(model, held, done)
    _report(model, done, time.perf_counter() - started)
    return done


def _plan(action: str, held: Inventory, place: Callable[[str], torch.device]) -> list[Piece]:
    """A piece for every tensor to be, with its data found and checked."""
    offloaded = slots(held.modules)
    _refuse_without_data(action, held, offloaded)
    sources, problems = Sources(), []
    found: list[tuple[Slot, Source]] = []
    for slot in offloaded:
        try:
            source = sources.find(slot.hook.weights_map, slot.key)
            mismatch = source.mismatch(slot.tensor)
            found.append((slot, source))
        except KeyError:
            mismatch = "the map that the dispatch keeps its weights in has no such entry"
        except Unusable as error:
            mismatch = str(error)
        if mismatch:
            problems.append((slot.full_name, mismatch))
    if problems:
        advice = "Mend the offload folder or its index, or load the model again. The dispatched model would fail there as well."
        raise OffloadedDataError(action, problems, advice)
    return [
        Piece(
            tied.slots, tied.tensor, tied.source, place(tied.slots[0].full_name), tied.tensor.dtype, tied.tensor.shape,
            tied.source.open(), joins_real=tied.tensor.device.type != "meta",
        )
        for tied in find_ties(held, found)
    ]  # fmt: skip


def _refuse_without_data(action: str, held: Inventory, offloaded: Iterable[Slot]) -> None:
    kept = {id(slot.tensor) for slot in offloaded}
    missing = [meta for meta in held.meta if id(meta.tensor) not in kept]
    if missing:
        raise MetaTensorsPresent(
            f"{action}: {len(missing)} tensors are on the meta device and no hook of a dispatch knows where their data is, the "
            f"first is {missing[0].name!r}. Nothing was changed. Their data is lost if hooks were removed after a dispatch, or was "
            "never loaded (init_empty_weights): load the checkpoint again."
        )


def _check_budget(action: str, pieces: Iterable[Piece]) -> None:
    """What is mapped from files counts too: it is of use only in RAM."""
    needed: dict[torch.device, int] = defaultdict(int)
    for piece in pieces:
        if not piece.joins_real and not (piece.is_shared and piece.source.file is None):
            needed[piece.device] += piece.tensor.nbytes
    for device, nbytes in needed.items():
        if device.type == "cpu":
            budget.require_host(action, nbytes, settings.ram_limit, arena.bytes_in_use(), _HOST_ADVICE)
        else:
            budget.require_device(action, nbytes, device, _DEVICE_ADVICE)


_HOST_ADVICE = (
    "Delete or restore another parked model, park one to disk, or raise the limit named. Or leave the model dispatched, with a "
    "smaller device_map: one that puts less on cpu and disk."
)
_DEVICE_ADVICE = "Park another model first, materialize to the CPU (target_device='cpu'), or give a device_map that puts less there."


def _read(action: str, pieces: Sequence[Piece], progress: Progress | None, wants_digests: bool) -> None:
    """Brings the bytes of all pieces in. The model has not changed yet."""
    missing = [piece for piece in pieces if not piece.joins_real]
    _allocate(action, missing)
    reads = {id(piece): Read(piece.source, piece.opened, piece.real, wants_digests) for piece in missing}
    read(list(reads.values()), progress)
    devices.synchronize({piece.device for piece in missing})
    if wants_digests:
        for piece in pieces:
            piece.digest = digest_of(piece.tensor) if piece.joins_real else reads[id(piece)].digest


def _allocate(action: str, pieces: Sequence[Piece]) -> None:
    """Memory for every piece that cannot look into its source."""
    needy = [piece for piece in pieces if not piece.is_shared]
    on_host = iter(
        arena.allocate([piece.tensor.nbytes for piece in needy if piece.device.type == "cpu"], registry.forget)
    )
    for piece in needy:
        if piece.device.type == "cpu":
            storage = next(on_host)
        else:
            storage = _allocate_on(action, piece.tensor.nbytes, piece.device)
        piece.real = tensor_over(storage, piece.tensor.dtype, piece.tensor.shape)


def _allocate_on(action: str, nbytes: int, device: torch.device) -> torch.UntypedStorage:
    try:
        return torch.empty(nbytes, dtype=torch.uint8, device=device).untyped_storage()
    except torch.OutOfMemoryError as error:
        free = devices.free_memory(device) or 0
        raise NotEnoughMemory(action, str(device), nbytes, free, "free VRAM, in pieces", _DEVICE_ADVICE) from error


def _commit(model: object, held: Inventory, done: Materialized) -> None:
    """Puts the data into the model and takes the hooks off; all of it, or none."""
    try:
        done.dispatch = take_off(held.modules.values())
        done.undo.append(done.dispatch.put_on)
        for piece in done.pieces:
            _settle_in(piece, done.undo)
        kinds.settle(inventory(model))
    except BaseException:
        _roll_back(done.undo)
        raise


def _settle_in(piece: Piece, undo: list[Callable[[], None]]) -> None:
    if not piece.joins_real:
        twin = stand_in(piece.tensor, piece.opened if piece.real is None else piece.real)
        exchange(piece.tensor, twin)
        undo.append(lambda: exchange(piece.tensor, twin))
    for slot in piece.slots:
        if slot.tensor is not piece.tensor:
            slot.put(piece.tensor)
            undo.append(lambda slot=slot: slot.put(slot.tensor))


def _roll_back(undo: list[Callable[[], None]]) -> None:
    while undo:
        undo.pop()()


def _placement(target: Device | DeviceMap) -> Callable[[str], torch.device]:
    """Where the meta tensor of a given name is to go."""
    if not isinstance(target, Mapping):
        device = devices.resolve(target)
        return lambda name: device
    places = {prefix: devices.resolve(value) for prefix, value in target.items()}

    def by_longest_prefix(name: str) -> torch.device:
        fitting = [prefix for prefix in places if not prefix or f"{name}.".startswith(f"{prefix}.")]
        return places[max(fitting, key=len)] if fitting else devices.CPU

    return by_longest_prefix


def _report(model: object, done: Materialized, seconds: float) -> None:
    made = [piece for piece in done.pieces if not piece.joins_real]
    from_disk = [piece for piece in made if piece.source.file is not None]
    nbytes = sum(piece.source.nbytes for piece in from_disk)
    files = len({piece.source.file for piece in from_disk})
    log.info(
        "materialized %s: %s in %d tensors, of which %s read from %d files, in %.2f s (%.1f GB/s)",
        *(type(model).__name__, readable_bytes(sum(piece.tensor.nbytes for piece in made)), len(made)),
        *(readable_bytes(nbytes), files),
        *(seconds, nbytes / seconds / 1e9),
    )
