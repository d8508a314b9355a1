"""Park, restore and move: what goes where, and what is then true of the model."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from . import arrival, autograd, budget, devices, diffusers_offload, dispatch, kinds, registry, statistics, units, wake
from .allocation import bytes_by_device
from .devices import Device, DeviceMap
from .errors import CannotMove, LiveAutogradGraph, MetaTensorsPresent, NoTensors, readable_bytes
from .inventory import Holding, Inventory, inventory
from .registry import Origin, Record
from .relocation import Step, relocate
from .settings import settings
from .strangers import Straggler
from .transfer import Progress

log = logging.getLogger("qmove")


@dataclass(frozen=True)
class Moved:
    """What a move did.

    Attributes:
        nbytes: bytes of all storages that changed places.
        copied_bytes: bytes that were really copied for it.
        seconds: wall time.
        home: for each storage that changed places, by its name, its home: where a park took it from, a restore brought it to.
        stragglers: storages that did not leave their device, and who holds them.
        verified: whether digests proved that every byte arrived as it was (`qmove.configure(verify=True)`).
    """

    nbytes: int
    copied_bytes: int
    seconds: float
    home: dict[str, torch.device] = field(repr=False)
    stragglers: list[Straggler]
    verified: bool = False


@dataclass(frozen=True)
class Restored(Moved):
    """What a restore did."""


@dataclass(frozen=True)
class Parked(Moved):
    """What a park did, and the way back: `parked.restore()`."""

    _model: Any = field(repr=False, default=None)

    def restore(self, device: Device | DeviceMap | None = None) -> Restored:
        """See `qmove.restore`."""
        return restore(self._model, device)


def park(
    model: object, *, extra: Iterable[object] = (), allow_live_graph: bool = False, progress: Progress | None = None
) -> Parked:
    """Moves every byte that `model` has on accelerators into host memory. The model wakes by itself when it is used.

    Parking a parked model does nothing; what has come onto a device since then is parked too. What lies on the host stays.

    Args:
        model: anything that holds tensors: a module, a pipeline, a list or dict of them, another library's wrapper.
        extra: objects that go with it (an optimizer, a cache). They come home with the model.
        allow_live_graph: park although an autograd graph still needs the weights. What it saved then stays on the device.
        progress: called as `progress(bytes_done, bytes_in_all)`; what it raises stops the park with nothing moved.

    Returns:
        A `Parked`. Its `stragglers` name what stayed on a device, and who holds it.

    Raises:
        NoTensors, MetaTensorsPresent, LiveAutogradGraph: see the messages.
        NotEnoughMemory: the host has not enough free memory.
        CannotMove: some tensors cannot be moved, with names and reasons.
    """
    started = time.perf_counter()
    extra = tuple(extra)
    with registry.lock:
        before = registry.record_of(model)
        held = _inventory_of(model, extra)
        away = [holding for holding in units.holdings_in_order(held) if holding.device.type != "cpu"]
        if not away:
            return Parked(0, 0, time.perf_counter() - started, {}, [], settings.verify, model)
        action = f"Parking {_title(model)}"
        dispatch.refuse_lost(action, held)
        _refuse_immovable(action, held, devices.CPU)
        if not allow_live_graph:
            _refuse_live_graph(action, held)
        homes = {name: holding.device for holding in away for name in holding.names}
        if before is not None:  # parked already, and something has come onto a device since
            homes, extra = before.homes | homes, (*before.extra, *extra)
        record = Record(model, extra, homes)
        steps = [Step(holding, devices.CPU, Origin(holding.device, holding.nbytes, record)) for holding in away]
        done = relocate(action, held, steps, on_commit=lambda: _fall_asleep(record, held), progress=progress)
    home = {step.holding.name: step.origin.home for step in steps if step.origin}
    seconds = time.perf_counter() - started
    result = Parked(_bytes(steps), done.copied_bytes, seconds, home, done.stragglers, done.verified, model)
    _report("parked", model, result)
    return result


def restore(
    model: object,
    device: Device | DeviceMap | None = None,
    *,
    stream: bool = False,
    progress: Progress | None = None,
) -> Restored:
    """Brings a parked model back: every storage to the device it came from, or to where `device` says.

    Restoring a resident model does nothing.

    Args:
        model: the object that was parked, or a part of it.
        device: None for home; one device; or a device_map from name prefixes ("" for the rest) to devices.
        stream: return as soon as the copies are queued. The model can be used at once: each of its layers waits only for
            its own bytes, which arrive in the order in which the layers were last used. Where that is not possible (compiled
            modules, wrapper subclasses such as torchao's, `verify`, a `progress`) it waits for all of them.
        progress: as for `park`; what it raises stops the restore with the model still parked.

    Raises:
        NotEnoughMemory: the device has not enough free memory; the model stays parked.
        UnknownDevice: there is no such device.
    """
    started = time.perf_counter()
    with registry.lock:
        choose = _destination(device)
        record = registry.record_of(model)
        held = _inventory_of(model, record.extra if record else ())
        goals = [
            (holding, choose(holding, home))
            for holding in units.holdings_in_order(held)
            if (home := _home(holding, record))
        ]
        figures = _bring(f"Restoring {_title(model)}", held, goals, progress, stream)
    restored = Restored(seconds=time.perf_counter() - started, **figures)
    _report("restored", model, restored)
    return restored


def prefetch(model: object) -> Restored | None:
    """Begins to bring a parked model home, if there is room for it, and returns at once; see `restore(stream=True)`.

    Nothing is parked for it and nobody is asked to make room: it is for a model that will be needed next, while another
    one still computes.

    Returns:
        What was begun; None if some device has too little free memory: then the model stays parked.
    """
    with registry.lock:
        record = registry.record_of(model)
        held = _inventory_of(model, record.extra if record else ())
        homes = [(holding.nbytes, home) for holding in held.holdings if (home := _home(holding, record))]
        return restore(model, stream=True) if budget.has_room(bytes_by_device(homes)) else None


def move(model: object, device: Device, *, allow_live_graph: bool = False, progress: Progress | None = None) -> Moved:
    """A better `.to()`: relocates every byte of `model`, quantization kept, and leaves it ready to run on `device`.

    Moved to the CPU, the model is not parked: it runs there, and does not wake. Tensors that plain attributes hold on the
    host stay there, unless an earlier move brought them.

    Args:
        model: as for `park`; it may be parked.
        device: "cpu", "cuda:0", ...
        allow_live_graph, progress: as for `park`.

    Raises:
        As `park`; and CannotMove if parts of the model would not run on `device`, with names and reasons.
    """
    started = time.perf_counter()
    with registry.lock:
        target = devices.resolve(device)
        record = registry.record_of(model)
        held = _inventory_of(model, record.extra if record else ())
        action = f"Moving {_title(model)} to {target}"
        refuse_meta(action, held)
        _refuse_immovable(action, held, target, kinds.obstacles(held, target))
        goals = [
            (holding, target)
            for holding in units.holdings_in_order(held)
            if target.type == "cpu" or _goes_along(holding)
        ]
        if not allow_live_graph and any(holding.device != target for holding, _target in goals):
            _refuse_live_graph(action, held)
        figures = _bring(action, held, goals, progress)
    moved = Moved(seconds=time.perf_counter() - started, **figures)
    _report(f"moved to {target}:", model, moved)
    return moved


@contextmanager
def parked(model: object, **options: Any) -> Iterator[Parked]:
    """Keeps `model` out of VRAM inside the body; it is home again after it, also when the body raises."""
    result = park(model, **options)
    try:
        yield result
    finally:
        restore(model)


@contextmanager
def resident(model: object) -> Iterator[Restored]:
    """Keeps `model` home inside the body; if it was parked before, it is parked again after it."""
    with registry.lock:
        was_parked, record = is_parked(model), registry.record_of(model)
        extra = record.extra if record else []
    try:
        yield restore(model)
    finally:
        if was_parked:
            park(model, extra=extra)


def is_parked(model: object) -> bool:
    """Whether anything of `model` is parked."""
    with registry.lock:
        return any(registry.parked_home(holding.tensors[0]) for holding in inventory(model).holdings)


def parked_models() -> list[Any]:
    """The models that are parked now, the longest parked first. A dict or list appears as a copy of it."""
    with registry.lock:
        return registry.parked_models()


def _bring(
    action: str,
    held: Inventory,
    goals: Sequence[tuple[Holding, torch.device]],
    progress: Progress | None,
    stream: bool = False,
) -> dict[str, Any]:
    """Takes holdings to where they are to run, and wakes the model. Returns the figures of a `Moved` but its time."""
    steps, staying = [], []
    for holding, target in goals:
        origin = registry.origin_of(holding.storage)
        strangers = origin.strangers_on(holding.storage) if origin else []
        if holding.device != target:
            to_host = Origin(holding.device, holding.nbytes, None) if target.type == "cpu" else None
            steps.append(Step(holding, target, to_host, strangers))
        elif origin is not None:
            staying.append(origin)

    def settle_in() -> None:
        for origin in staying:
            origin.record = None
        wake.wake_up(held.modules.values())

    figures: dict[str, Any] = {"nbytes": _bytes(steps), "home": {step.holding.name: step.target for step in steps}}
    if stream and progress is None and arrival.can_stream(held, steps):
        arrival.bring(action, held, steps, on_commit=settle_in, on_failure=_sleep_again(held, steps))
        return figures | {"copied_bytes": figures["nbytes"], "stragglers": []}
    done = relocate(action, held, steps, on_commit=settle_in, progress=progress)
    return figures | {"copied_bytes": done.copied_bytes, "stragglers": done.stragglers, "verified": done.verified}


def _sleep_again(held: Inventory, steps: Sequence[Step]) -> Callable[[], None]:
    """What parks a model again whose streaming restore fails. It keeps nothing of the model alive."""
    origins = (registry.origin_of(step.holding.storage) for step in steps)
    records = {
        id(origin.record): origin.record for origin in origins if origin is not None and origin.record is not None
    }

    def sleep_again() -> None:
        for record in records.values():
            model = record.model
            if model is not None:
                again = inventory(model, extra=record.extra)
                kinds.settle(again)
                _fall_asleep(record, again)

    return sleep_again


def _fall_asleep(record: Record, held: Inventory) -> None:
    def waker(module: nn.Module) -> None:
        model = record.model
        if model is not None:
            restore(model, stream=True)
        if wake.sleeps_by(module, waker):  # it outlived the pipeline it was parked with, or was taken out of it
            restore(module, stream=True)

    wake.put_to_sleep(held.modules.values(), waker)


def _inventory_of(model: object, extra: Iterable[object]) -> Inventory:
    held = inventory(model, extra=extra)
    arrival.settle(tensor for holding in held.holdings for tensor in holding.tensors)
    if not held.holdings and not held.meta:
        hint = (
            f" It refers to modules that are not its own: {', '.join(held.foreign[:5])}; pass those."
            if held.foreign
            else ""
        )
        raise NoTensors(f"{_title(model)} holds no tensor that qmove could find. Pass the model itself.{hint}")
    return held


def refuse_meta(action: str, held: Inventory) -> None:
    """Raises MetaTensorsPresent if some of the model's data is not in memory."""
    diffusers_offload.refuse_absent(action, held.modules.values())
    if held.meta:
        dispatch.refuse_lost(action, held)
        raise MetaTensorsPresent(
            f"{action}: a dispatch keeps the data of {len(held.meta)} tensors elsewhere, the first is {held.meta[0].name!r}. "
            "Call qmove.materialize_meta_tensors(model) first. Nothing was moved."
        )


def _refuse_immovable(
    action: str, held: Inventory, target: torch.device, obstacles: Sequence[tuple[str, str]] = ()
) -> None:
    reasons = [*obstacles, *((item.name, item.reason) for item in held.immovable if item.device != target)]
    if reasons:
        raise CannotMove(action, reasons)


def _refuse_live_graph(action: str, held: Inventory) -> None:
    names = autograd.tensors_in_live_graph(held)
    if names:
        raise LiveAutogradGraph(
            f"{action}: a live autograd graph needs {len(names)} of its tensors, the first is {names[0]!r}. Nothing was moved. "
            "Run the model under torch.no_grad() or delete its outputs and losses; or pass allow_live_graph=True: "
            "then what the graph has saved stays in VRAM, and its backward may meet weights on another device."
        )


def _destination(device: Device | DeviceMap | None) -> Callable[[Holding, torch.device], torch.device]:
    """What `restore(device=...)` means for a holding with a given home."""
    if device is None:
        return lambda holding, home: home
    place = devices.placement(device)
    return lambda holding, home: place(holding.name) or home


def _home(holding: Holding, record: Record | None) -> torch.device | None:
    """The home of a parked holding, None for one that is not parked."""
    if holding.device.type != "cpu":
        return None
    origin = registry.origin_of(holding.storage)
    if origin is not None:
        return origin.home if origin.record is not None else None
    # A tensor that was replaced while the model was parked goes to the home of its name.
    homes = (record.homes.get(name) for name in holding.names) if record is not None else ()
    return next((home for home in homes if home is not None), None)


def _goes_along(holding: Holding) -> bool:
    """Whether a move to an accelerator takes a holding along: not what pipelines and hooks keep on the host on purpose."""
    on_purpose = holding.kind in ("attribute", "captured") and holding.device.type == "cpu"
    return not on_purpose or registry.origin_of(holding.storage) is not None


def _bytes(steps: Iterable[Step]) -> int:
    return sum(step.holding.nbytes for step in steps)


def _title(model: object) -> str:
    return type(model).__name__


def _report(done: str, model: object, figures: Moved) -> None:
    statistics.count(done.split()[0], figures.copied_bytes)
    rate = figures.copied_bytes / figures.seconds / 1e9
    log.info(
        "%s %s: %s, %s copied in %.2f s (%.1f GB/s)",
        *(
            done,
            _title(model),
            readable_bytes(figures.nbytes),
            readable_bytes(figures.copied_bytes),
            figures.seconds,
            rate,
        ),
    )
    for straggler in figures.stragglers:
        log.warning(
            "%s of %s stays on %s (%s), held by %s",
            *(
                straggler.name,
                _title(model),
                straggler.device,
                readable_bytes(straggler.nbytes),
                "; ".join(straggler.holders),
            ),
        )
