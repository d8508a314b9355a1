"""The parts of a model that arrive together, in the order in which the model uses them.

A unit is a layer (a child of a `ModuleList`, `ModuleDict` or `Sequential`, with everything below it) or a module outside of all
layers that has tensors of its own. What the order is can only be seen while a model runs: each streaming restore notes it for
the next one. Until then it is the order in which the modules were registered.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..memory import arena
from ..model.holdings import Holding, Inventory

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

_last_used: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # a unit's topmost module -> when it was last used
_clock = itertools.count()


@dataclass(eq=False)
class Unit:
    """Attributes:
    name: of its topmost module; "" for what no module holds.
    modules: the topmost first.
    holdings: what the modules hold; one that several units share is in each of them.
    """

    name: str
    modules: list[nn.Module] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)


def used(topmost: nn.Module) -> None:
    """Notes that the unit with this topmost module is used now."""
    _last_used[topmost] = next(_clock)


def units_of(held: Inventory) -> list[Unit]:
    """All units of a model, those first that it needs first. Every holding is in at least one of them."""
    loose = Unit("")
    units: dict[str, Unit] = {}
    layers = _layers(held)
    for name, module in _in_order(held.modules):
        layer = _prefix_in(name, layers)
        unit = units.setdefault(
            name if layer is None else layer, Unit(name if layer is None else layer)
        )
        unit.modules.append(module)
    for holding in held.holdings:
        owners = {_prefix_in(name, units) for name in holding.names}
        for owner in owners or {None}:
            (loose if owner is None else units[owner]).holdings.append(holding)
    found = [unit for unit in units.values() if unit.holdings]
    never = next(_clock)
    found.sort(key=lambda unit: _last_used.get(unit.modules[0], never))
    return [loose, *found] if loose.holdings else found


def holdings_in_order(held: Inventory) -> list[Holding]:
    """The holdings of a model, those first that it needs first."""
    found = {
        id(holding): holding for unit in units_of(held) for holding in _as_they_lie(unit.holdings)
    }
    return list(found.values())


def _as_they_lie(holdings: list[Holding]) -> list[Holding]:
    """What is parked side by side in that order: it travels together. A forward may have changed the order of the walk."""
    places = [arena.place_of(holding.storage) for holding in holdings]
    if (
        len({id(place[0]) if place is not None else None for place in places}) != 1
        or places[0] is None
    ):
        return holdings
    offsets = [place[1] for place in places if place is not None]
    return [
        holding
        for _offset, holding in sorted(
            zip(offsets, holdings, strict=True), key=lambda pair: pair[0]
        )
    ]


def _layers(held: Inventory) -> dict[str, nn.Module]:
    """The outermost layers, by name."""
    names = {id(module): name for name, module in held.modules.items()}
    layers: dict[str, nn.Module] = {}
    for name, module in held.modules.items():  # an outer one comes before those inside it
        if isinstance(module, _LISTS) and _prefix_in(name, layers) is None:
            layers |= {names[id(child)]: child for child in module.children() if id(child) in names}
    return layers


def _in_order(modules: dict[str, nn.Module]) -> Iterable[tuple[str, nn.Module]]:
    """The modules as `nn.Module.modules()` goes through them, from each topmost one."""
    names = {id(module): name for name, module in modules.items()}
    seen: set[int] = set()
    for top in modules.values():
        if id(top) in seen:
            continue
        for module in top.modules():
            if id(module) in names and id(module) not in seen:
                seen.add(id(module))
                yield names[id(module)], module


def _prefix_in(name: str, among: dict[str, nn.Module] | dict[str, Unit]) -> str | None:
    """The longest prefix of a dotted name that is among these names."""
    while name:
        if name in among:
            return name
        name = name.rpartition(".")[0]
    return "" if "" in among else None
