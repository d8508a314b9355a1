"""Pinned models: a thread keeps one home for a while (`resident`), a user until it is unpinned, a
pool as long as the model is on lease.

What a user has pinned, or has on lease, stays where it is, also where another model shares it: a
park leaves it out, and a move that would take it along is refused, also to the thread that holds
the lease.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import homes
from ..actions import Action
from ..errors import Pinned
from ..model.holdings import Holding, Immovable, Inventory
from ..model.inventory import inventory
from .weakly import Weakly


class Pin:
    """A model that stays. It is held weakly: a pin of a model that is gone is no pin any more.

    Attributes:
        model: the model, None when it is gone.
        thread: who keeps it home for a while; None for one that stays until it is unpinned.
        device: the one it is kept on; None for wherever it is home.
        parks_after: whether somebody has to park it when the thread lets it go.
        extra: what is parked with it then.
        frees: bytes that are parked then of each device; None: all.
        lease: by what name of which pool it is on lease, in words; None for all other pins.
        has_ended: whether a lease was given back: it counts no more.
    """

    def __init__(
        self,
        model: object,
        *,
        thread: threading.Thread | None,
        device: torch.device | None = None,
        lease: str | None = None,
    ) -> None:
        self._model = Weakly(model)
        self.name = type(model).__name__
        self.thread, self.device, self.lease = thread, device, lease
        self.has_ended = False
        self.parks_after = False
        self.extra: list[object] = []
        self.frees: dict[torch.device, int] | None = None
        self._modules: WeakIdKeyDictionary = WeakIdKeyDictionary()

    @property
    def model(self) -> object:
        return self._model()

    def is_for(self, model: object) -> bool:
        """Whether exactly this object was pinned."""
        return self._model.is_for(model)

    def note_modules(self) -> None:
        """Notes the modules that the model has now, for `has`."""
        for module in inventory(self.model).modules.values():
            self._modules[module] = None

    def has(self, model: object) -> bool:
        """Whether this object was pinned, or was a module of what was."""
        return self.is_for(model) or (isinstance(model, nn.Module) and model in self._modules)


_pins: list[Pin] = []  # changed by who holds the lock of moves, as is the other one
_leases: list[Pin] = []


# For a while, by a thread ----------------------------------------------------------------------


def hold(pin: Pin) -> None:
    """Pins a model for a thread."""
    _forget_dead()
    _pins.append(pin)


def let_go(pin: Pin) -> None:
    """Ends a thread's pin, unless that was done. `parks_after` is then whether it is to be parked
    now: another pin may do that."""
    with homes.lock:
        model = pin.model
        if model is None:
            pin.parks_after = False
        elif pin.parks_after:
            other = _held_by_thread(inventory(model), of_others=False, but=pin)
            if other is not None:
                other.parks_after, other.frees, pin.parks_after = True, pin.frees, False
        if pin in _pins:
            _pins.remove(pin)


def held_by_another_thread(held: Inventory) -> Pin | None:
    """The pin of another thread that shares a tensor with this model."""
    return _held_by_thread(held, of_others=True)


def _held_by_thread(held: Inventory, *, of_others: bool, but: Pin | None = None) -> Pin | None:
    mine: set[int] = set()
    for pin in _pins:
        if pin.thread is None or pin is but:
            continue
        if of_others and pin.thread is threading.current_thread():
            continue
        mine = mine or {id(tensor) for holding in held.holdings for tensor in holding.tensors}
        theirs = inventory(pin.model).holdings
        if any(id(tensor) in mine for holding in theirs for tensor in holding.tensors):
            return pin
    return None


# As long as it is on lease ---------------------------------------------------------------------


def lend(pin: Pin) -> None:
    """Keeps a model where it is until `take_back`; the lock of moves is held.

    Args:
        pin: a new one with a `lease`, or one that was taken back.
    """
    pin.has_ended = False
    _leases[:] = [*(lease for lease in _leases if not lease.has_ended and lease is not pin), pin]


def take_back(pin: Pin) -> None:
    """Ends a lease, unless that was done. It waits for no move, so that finalizers may call it."""
    pin.has_ended = True


# Until it is unpinned --------------------------------------------------------------------------


def keep(model: object, device: torch.device | None = None) -> None:
    """Pins a model until it is unpinned or dies."""
    pin = Pin(model, thread=None, device=device)
    pin.note_modules()
    _pins.append(pin)


def lift(model: object) -> list[Pin]:
    """Takes the pins of exactly this object off, and returns them."""
    _forget_dead()
    lifted = [pin for pin in _pins if pin.thread is None and pin.is_for(model)]
    _pins[:] = [pin for pin in _pins if pin not in lifted]
    return lifted


def put_back(lifted: Iterable[Pin]) -> None:
    """Undoes `lift`."""
    _pins.extend(lifted)


def any_pinned() -> bool:
    """Whether any model may be pinned by a user."""
    return bool(_kept())


def pin_of(model: object) -> Pin | None:
    """The pin of this object, or of what it was a module of when that was pinned. It is cheap."""
    return next((pin for pin in _kept() if pin.has(model)), None)


def by_storage(*, with_device: bool = False) -> dict[int, Pin]:
    """The pin of each storage (`_cdata`) that is pinned; `with_device` only those kept on one."""
    found: dict[int, Pin] = {}
    for pin in _kept():
        model = pin.model
        if model is not None and (pin.device is not None or not with_device):
            for holding in inventory(model).holdings:
                found.setdefault(holding.storage._cdata, pin)
    return found


def is_pinned(model: object) -> bool:
    """Whether exactly this object is pinned, or all of it belongs to pinned models."""
    if any(pin.is_for(model) for pin in _kept()):
        return True
    pinned = by_storage()
    held = inventory(model).holdings if pinned else []
    return bool(held) and all(holding.storage._cdata in pinned for holding in held)


def without_pinned(action: Action, model: object, held: Inventory) -> Inventory:
    """The inventory of a model that is to leave, without what is pinned on a device.

    That is among `immovable` then, in one line for each pin.

    Raises:
        Pinned: nothing else is left, or exactly this model is pinned.
    """
    pinned = by_storage()
    if not pinned:
        return held
    staying = [
        (holding, pinned[cdata])
        for holding in held.holdings
        if holding.device.type != "cpu" and (cdata := holding.storage._cdata) in pinned
    ]
    if not staying:
        return held
    ids = {id(holding) for holding, _pin in staying}
    others = [holding for holding in held.holdings if id(holding) not in ids]
    own = next((pin for pin in _kept() if pin.is_for(model)), None)
    if own is not None or not others:
        first = own or staying[0][1]
        raise Pinned(action, first.name, first.lease)
    pins = {id(pin): pin for _holding, pin in staying}
    groups: dict[tuple[int, torch.device], list[Holding]] = defaultdict(list)
    for holding, pin in staying:
        groups[id(pin), holding.device].append(holding)
    immovable = [
        Immovable(
            first.name + (f" and {len(more)} more" if more else ""),
            device,
            _in_words(pins[key]),
            sum(holding.nbytes for holding in (first, *more)),
        )
        for (key, device), (first, *more) in groups.items()
    ]
    modules = {id(m) for pin in pins.values() for m in inventory(pin.model).modules.values()}
    return replace(
        held,
        holdings=others,
        immovable=[*held.immovable, *immovable],
        modules={name: m for name, m in held.modules.items() if id(m) not in modules},
    )


def refuse(action: Action, holdings: Iterable[Holding], target: torch.device) -> None:
    """Raises Pinned if one of these is pinned and would come to another place than its own."""
    pinned = by_storage()
    for holding in holdings if pinned else ():
        storage = holding.storage
        pin = pinned.get(storage._cdata)
        if pin is not None and target != (pin.device or _home_of(storage, holding.device)):
            raise Pinned(action, pin.name, pin.lease)


def _in_words(pin: Pin) -> str:
    if pin.lease is None:
        return f"the pin of {pin.name} (qmove.pin)"
    return f"the lease of {pin.lease}"


def _home_of(storage: torch.UntypedStorage, place: torch.device) -> torch.device:
    origin = homes.origin_of(storage)
    return origin.home if origin is not None and origin.is_parked else place


def _forget_dead() -> None:
    """Forgets the pins of models that are gone; a thread's is forgotten when the thread lets go."""
    _pins[:] = [pin for pin in _pins if pin.thread is not None or pin.model is not None]


def _kept() -> list[Pin]:
    leases = [pin for pin in list(_leases) if not pin.has_ended]
    return [*leases, *(pin for pin in _pins if pin.thread is None)]
