"""Park, restore, prefetch and move: what a user asks for, and the figures of what was done."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch

from .. import devices, homes, hosting
from ..devices import Device, DeviceMap
from ..errors import NotEnoughDeviceMemory, first_of, readable_bytes
from ..memory import arena, budget, mirrors
from ..model.holders import Straggler
from ..model.inventory import inventory
from ..moving import moving
from ..settings import settings
from ..transfer.copies import Progress
from ..transfer.moves import Done, MovePlan
from ..transfer.transaction import carry_out
from . import (
    attaching,
    disk,
    in_use,
    pins,
    plans,
    records,
    rolling,
    sleeping,
    stats,
    streaming,
)

log = logging.getLogger("qmove")


@dataclass(frozen=True)
class Moved:
    """What a move did.

    Attributes:
        nbytes: bytes of all storages that changed places.
        copied_bytes: bytes that were really copied for it.
        seconds: wall time.
        home: for each storage that changed places, by its name, its home: where a park took it
            from, a restore brought it to.
        stragglers: storages that did not leave their device, and who holds them.
        emptied: tensors that have lost their bytes: somebody has cut their storage
            (`storage.resize_(0)`). Nothing of them moved, and nothing brings them back.
        verified: whether digests proved that every byte arrived as it was
            (`qmove.configure(verify=True)`).
    """

    nbytes: int
    copied_bytes: int
    seconds: float
    home: dict[str, torch.device] = field(repr=False)
    stragglers: list[Straggler]
    verified: bool = False
    emptied: list[str] = field(default_factory=list)


AnyMoved = TypeVar("AnyMoved", bound=Moved)


@dataclass(frozen=True)
class Restored(Moved):
    """What a restore did."""


@dataclass(frozen=True)
class Parked(Moved):
    """What a park did, and the way back: `parked.restore()`.

    Attributes:
        reserved_after: bytes that PyTorch's allocator still held unused on the devices involved,
            after its cache was emptied: pieces beside tensors of others, which no other program can
            have. None where it is emptied later, after several moves in a row.
    """

    reserved_after: int | None = None
    _model: Any = field(repr=False, default=None)

    def restore(self, device: Device | DeviceMap | None = None) -> Restored:
        """See `qmove.restore`."""
        return restore(self._model, device)


@moving()
def park(
    model: object,
    *,
    to: Literal["ram", "disk"] = "ram",
    folder: str | os.PathLike[str] | None = None,
    extra: Iterable[object] = (),
    allow_live_graph: bool = False,
    strict: bool = False,
    free: int | Mapping[Device, int] | None = None,
    progress: Progress | None = None,
) -> Parked:
    """Moves every byte that `model` has on accelerators into host memory. The model wakes by itself
    when it is used.

    Parking a parked model does nothing; what has come onto a device since then is parked too. What
    lies on the host stays.

    Args:
        model: anything that holds tensors: a module, a pipeline, a list or dict of them, another
            library's wrapper.
        to: "ram"; or "disk": a model that is parked in RAM goes there too, and its RAM is free. It
            lies in a mapped file, as after `mirror_files`, and wakes, streams and moves as any
            parked model does; what comes home unchanged is parked there again without a copy.
        folder: for "disk". With one, the model stays there in `weights.safetensors`, whole, for
            `attach` in a later process; what a file of `mirror_files` has is written as a reference
            to that file. The folder above it must be there. None: a temporary file in
            `configure(disk_folder=...)`, which goes with the model or the process.
        extra: objects that go with it (an optimizer, a cache). They come home with the model.
        allow_live_graph: park although an autograd graph still needs the weights. What it saved
            then stays on the device.
        strict: refuse a model that holds what cannot be moved (a sparse tensor, one whose raw
            address a kernel has, ...). Otherwise that stays where it is, and is a straggler.
        free: bytes to free, on each device where it is a mapping from devices: as many layers leave
            as that takes and no more, the one that the model uses last first. It wakes as a whole.
            None: all leave.
        progress: called as `progress(bytes_done, bytes_in_all)`; what it raises stops the park with
            nothing moved.

    Returns:
        A `Parked`. Its `stragglers` name what stayed on a device, and who holds it.

    Raises:
        NoTensors, MetaTensorsPresent, LiveAutogradGraph: see the messages.
        ValueError: `free` is negative.
        NotEnoughMemory: the host has not enough free memory.
        CannotWriteToDisk: the disk is full, the folder is missing, ...; the model stays where it
            was, and so does an older file in the folder.
        CannotMove: a storage was cut, a graph has raw addresses; with `strict` whatever cannot be
            moved; with names and reasons.
        InUse: another thread pins it (`resident`), or does not come to the end of a forward.
        Pinned: it is pinned. Of a model that shares a part with a pinned one that part stays, and
            is a straggler; so does a pinned part of a pipeline.
        CapturingGraph: this thread captures a graph (so also for all other moves).
        DeviceLost: the driver's context is spoilt, for good (so also for all other moves).
    """
    started = time.perf_counter()
    where = disk.target(to, folder)

    def make_plan() -> MovePlan:
        return plans.to_park(
            model,
            wake,
            extra,
            allow_live_graph=allow_live_graph,
            strict=strict,
            free=free,
            goes_along=None if where is None else where.goes_along,
        )

    def act(plan: MovePlan) -> Done:
        with in_use.kept_still(plan):
            if where is None:
                return carry_out(plan, progress)
            return disk.carry_out(model, plan, where, progress)

    plan, done = _with_room(make_plan, act)
    return parked_result(model, plan, done, time.perf_counter() - started)


@moving()
def restore(
    model: object,
    device: Device | DeviceMap | None = None,
    *,
    stream: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Brings a parked model back: every storage to the device it came from, or to where `device`
    says.

    Restoring a resident model does nothing.

    Args:
        model: the object that was parked, or a part of it.
        device: None for home; one device; or a device_map from name prefixes ("" for the rest) to
            devices.
        stream: return as soon as the copies are queued. The model can be used at once: each of its
            layers waits only for its own bytes, which arrive in the order in which the layers were
            last used. Where that is not possible (compiled modules, wrapper subclasses such as
            torchao's, `verify`, a `progress`) it waits for all of them.
        progress: as for `park`; what it raises stops the restore with the model still parked.

    Raises:
        NotEnoughMemory: the device has not enough free memory; the model stays parked.
        UnknownDevice: there is no such device.
    """
    started = time.perf_counter()

    def act(plan: MovePlan) -> Done:
        if stream and progress is None and plan.moves and streaming.can_stream(plan):
            return _restore_streaming(plan)
        return carry_out(plan, progress)

    plan, done = _with_room(lambda: plans.to_restore(model, device), act)
    return restored_result(model, plan, done, time.perf_counter() - started)


@moving()
def prefetch(model: object) -> Restored | None:
    """Begins to bring a parked model home, if there is room for it, and returns at once.

    It is for a model that will be needed next, while another one still computes: nothing is parked
    for it, and no host is asked for room.

    Args:
        model: as for `restore`. For one that is home there is nothing to begin.

    Returns:
        What was begun. None, with the model still parked, if some device has too little free
        memory, or if the model cannot be used while it arrives (see `restore(stream=True)`).
    """
    started = time.perf_counter()
    plan = plans.to_restore(model)
    if not budget.has_room(plan.arriving):
        return None
    if not plan.moves:
        done = carry_out(plan)
    elif streaming.can_stream(plan):
        done = _restore_streaming(plan)
    else:
        return None
    return restored_result(model, plan, done, time.perf_counter() - started)


@moving()
def prepare(model: object) -> int:
    """Page-locks host memory for the first park of `model` in the background, while it computes.

    Does nothing for what needs no memory to be parked, where memory cannot be locked, and where
    there is too little of it.

    Args:
        model: as for `park`; on an accelerator.

    Returns:
        Bytes that are being prepared, or are ready.
    """
    if pins.is_pinned(model):
        return 0
    plan = plans.to_park(model, wake, allow_live_graph=True)
    needed = arena.bytes_for(
        [move.nbytes for move in plan.moves if mirrors.of(move.source) is None]
    )
    return budget.prepare(needed)


@moving()
def move(
    model: object,
    device: Device,
    *,
    allow_live_graph: bool = False,
    progress: Progress | None = None,
) -> Moved:
    """A better `.to()`: moves every byte of `model`, quantization kept, and it can run on `device`.

    Moved to the CPU, the model is not parked: it runs there, and does not wake. What was parked on
    disk or in the model's own files is read into RAM. Tensors that plain attributes hold on the
    host stay there, unless an earlier move brought them.

    Args:
        model: as for `park`; it may be parked.
        device: "cpu", "cuda:0", ...
        allow_live_graph: as for `park`.
        progress: as for `park`.

    Raises:
        QMoveError: as `park`.
        CannotMove: also if parts of the model would not run on `device`, with names and reasons.
        Pinned: also where only a part of it is pinned to another place.
    """
    started = time.perf_counter()

    def make_plan() -> MovePlan:
        return plans.to_move(model, device, allow_live_graph=allow_live_graph)

    def act(plan: MovePlan) -> Done:
        with in_use.kept_still(plan, wakes=False):
            return carry_out(plan, progress)

    plan, done = _with_room(make_plan, act)
    seconds = time.perf_counter() - started
    moved = _result(Moved, plan, done, seconds, plan.targets)
    _report(f"moved to {devices.resolve(device)}:", model, moved)
    return moved


@moving()
def attach(
    model: object, folder: str | os.PathLike[str], device: Device | None = None
) -> Parked | Restored | Moved:
    """Gives a freshly built model the weights that `park(to="disk", folder=...)` left in `folder`,
    in this process or in an earlier one. Nothing is loaded or quantized.

    The model must be of the same structure: tensors are found by their names, and must have the
    same kinds, dtypes and shapes. It may be on the meta device, on the CPU or on an accelerator;
    layers of bitsandbytes may be quantized, or not yet. What is no weight of it (caches, gradients)
    may be missing in either.

    Args:
        model: as for `park`; it must not be parked.
        folder: it stays as it is, and must stay as long as the model is parked there.
        device: None: the model is parked in the file, every byte is read and proved now, and it
            wakes to where it was home (or to this machine's accelerator). Or where it is to be;
            then its bytes are proved on their way.

    Raises:
        CannotAttach: the folder or one of its files is missing, cut short, altered or not ours, or
            the model is another one, with names. The model is as it was.
        QMoveError: as `restore` with a `device`; the model is parked on disk then.
        Pinned: a part of it is pinned.
    """
    started = time.perf_counter()
    place = None if device is None else devices.resolve(device)
    plan = attaching.attach(model, folder, wake, proves=place is None).plan
    if place is not None:
        return move(model, place) if place.type == "cpu" else restore(model, place)
    done = Done(0, [], verified=True)
    seconds = time.perf_counter() - started
    result = _result(Parked, plan, done, seconds, plan.origins, _model=model)
    _report("attached", model, result)
    return result


@moving()
def is_parked(model: object) -> bool:
    """Whether anything of `model` is parked.

    Args:
        model: as for `park`. One without tensors is not parked.
    """
    held = inventory(model)
    origins = [homes.origin_of_tensor(holding.tensors[0]) for holding in held.holdings]
    away = [origin for origin in origins if origin is not None and origin.is_parked]
    # What was made of it (a cast, a deep copy) counts only where it has taken its place.
    return any(not origin.is_result for origin in away) or (
        bool(away) and any(map(sleeping.is_parked, held.modules.values()))
    )


@moving()
def parked_models() -> list[Any]:
    """The models that are parked now, the longest parked first.

    A dict or list appears as a new dict of what is left of its contents.
    """
    return records.parked_models()


def _result(
    kind: type[AnyMoved],
    plan: MovePlan,
    done: Done,
    seconds: float,
    home: dict[str, torch.device],
    **more: Any,
) -> AnyMoved:
    return kind(
        nbytes=plan.nbytes,
        copied_bytes=done.copied_bytes,
        seconds=seconds,
        home=home,
        stragglers=done.stragglers,
        verified=done.verified,
        emptied=plans.emptied(plan),
        **more,
    )


def parked_result(model: object, plan: MovePlan, done: Done, seconds: float) -> Parked:
    """Reports a park."""
    verified = done.verified if plan.moves else settings.verify
    stragglers = [*plans.left_alone(plan), *done.stragglers]
    done = replace(done, stragglers=stragglers, verified=verified)
    result = _result(
        Parked,
        plan,
        done,
        seconds,
        plan.origins,
        reserved_after=done.reserved_after,
        _model=model,
    )
    _report("parked", model, result)
    return result


def restored_result(model: object, plan: MovePlan, done: Done, seconds: float) -> Restored:
    """Reports a restore."""
    result = _result(Restored, plan, done, seconds, plan.targets)
    _report("restored", model, result)
    return result


def wake(model: object, *, stream: bool) -> None:
    """Brings home a parked model, or a list of tensors, that is used.

    A model that streams begins to run when its first layer is there.
    """
    if not rolling.takes(model) and not hosting.tell_waking(model, stream):
        restore(model, stream=stream)


def _with_room(
    make_plan: Callable[[], MovePlan], act: Callable[[MovePlan], Done]
) -> tuple[MovePlan, Done]:
    """Carries out a plan for which there is room, if a host such as ComfyUI can make some.

    It parks other models for it, which may share weights with this one: so the plan is made again.
    Where an allocation fails although the figures said that it fits (what is free lies in pieces,
    or the figure was wrong), the host is asked for as much again, and it is tried once more.
    """
    plan = make_plan()
    if budget.make_room(plan.arriving):
        plan = make_plan()
    try:
        return plan, act(plan)
    except NotEnoughDeviceMemory as error:
        if error.limit != budget.IN_PIECES:
            raise
        log.info("%s Once more, after all unused memory was given back.", str(error))
    budget.make_more_room(plan.arriving, {move.came_from for move in plan.moves})
    plan = make_plan()
    return plan, act(plan)


def _restore_streaming(plan: MovePlan) -> Done:
    streaming.restore_streaming(plan, plans.sleep_again(plan.moves))
    return Done(plan.nbytes, [], verified=False)


def _report(done: str, model: object, figures: Moved) -> None:
    """Counts and logs a move. One that had nothing to do is neither counted nor logged."""
    name = type(model).__name__
    if figures.emptied:
        log.warning(
            "%s of %s %s no bytes any more: somebody has emptied the storage (resize_(0)). Load "
            "the model again, unless its owner fills it.",
            first_of(figures.emptied),
            name,
            "has" if len(figures.emptied) == 1 else "have",
        )
    if not figures.home:
        return
    stats.count(done.split()[0], figures.copied_bytes)
    log.info(
        "%s %s: %s, %s copied in %.2f s (%s/s)",
        done,
        name,
        readable_bytes(figures.nbytes),
        readable_bytes(figures.copied_bytes),
        figures.seconds,
        # A coarse clock may have seen no time pass.
        readable_bytes(int(figures.copied_bytes / max(figures.seconds, 1e-6))),
    )
    for straggler in figures.stragglers:
        log.warning(
            "%s of %s stays on %s (%s), held by %s",
            straggler.name,
            name,
            straggler.device,
            readable_bytes(straggler.nbytes),
            "; ".join(straggler.holders),
        )
