"""The parts of a model that arrive together, in the order in which the model uses them.

A group is a layer (a child of a `ModuleList`, `ModuleDict` or `Sequential`, with everything below
it) or a module outside of all layers that has tensors of its own. What the order is can only be
seen while a model runs: each streaming restore notes it for the next one, also of what is home
already. Until then it is the order in which the modules were registered.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ..memory.blocks import place_of
from ..model.holdings import Holding, Inventory

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)

_last_used: WeakIdKeyDictionary = (
    WeakIdKeyDictionary()
)  # a group's topmost module -> when it was last used
_clock = itertools.count()


@dataclass(eq=False)
class LayerGroup:
    """Attributes:
    name: of its topmost module; "" for what no module holds.
    modules: the topmost first.
    holdings: what the modules hold; one that several groups share is in each of them.
    is_layer: whether it is a layer.
    """

    name: str
    modules: list[nn.Module] = field(default_factory=list)
    holdings: list[Holding] = field(default_factory=list)
    is_layer: bool = False


def note_use(topmost: nn.Module) -> None:
    """Notes that the group with this topmost module is used now."""
    _last_used[topmost] = next(_clock)


def groups_of(held: Inventory) -> list[LayerGroup]:
    """All groups of a model, those first that it needs first.

    Every holding is in at least one of them.
    """
    loose = LayerGroup("")
    groups: dict[str, LayerGroup] = {}
    layers = _layers(held)
    for name, module in _in_order(held.modules):
        layer = _prefix_in(name, layers)
        key = name if layer is None else layer
        group = groups.setdefault(key, LayerGroup(key, is_layer=layer is not None))
        group.modules.append(module)
    for holding in held.holdings:
        owners = {_prefix_in(name, groups) for name in holding.names}
        for owner in owners or {None}:
            (loose if owner is None else groups[owner]).holdings.append(holding)
    found = [group for group in groups.values() if group.holdings]
    never = next(_clock)
    found.sort(key=lambda group: _last_used.get(group.modules[0], never))
    return [loose, *found] if loose.holdings else found


def by_module(group: LayerGroup, held: Inventory) -> list[LayerGroup]:
    """The modules of a group that have tensors of their own, each as a group. What several use is
    in each of them."""
    names = {id(module): name for name, module in held.modules.items()}
    parts = {names[id(m)]: LayerGroup(names[id(m)], [m], [], True) for m in group.modules}
    for holding in group.holdings:
        for owner in {_prefix_in(name, parts) for name in holding.names} - {None}:
            parts[owner].holdings.append(holding)  # type: ignore[index]
    return [part for part in parts.values() if part.holdings]


def holdings_in_order(held: Inventory) -> list[Holding]:
    """The holdings of a model, those first that it needs first."""
    found = {
        id(holding): holding
        for group in groups_of(held)
        for holding in _as_they_lie(group.holdings)
    }
    return list(found.values())


def last_used(
    held: Inventory, away: Sequence[Holding], wanted: Mapping[torch.device | None, int]
) -> list[Holding]:
    """Of the holdings that may leave those that free so many bytes, layer by layer, the layer that
    is used last first. What several layers use leaves with the first of them.

    Args:
        wanted: bytes to free on each device; None stands for all of them together.
    """
    lacking, may_leave = dict(wanted), {id(holding) for holding in away}
    firsts: list[list[Holding]] = []
    for group in groups_of(held):
        firsts.append([h for h in group.holdings if id(h) in may_leave])
        may_leave -= {id(holding) for holding in firsts[-1]}
    leaving: set[int] = set()
    for holdings in reversed(firsts):
        if all(nbytes <= 0 for nbytes in lacking.values()):
            break
        short = {key for key, nbytes in lacking.items() if nbytes > 0}
        for holding in holdings:
            key = None if None in lacking else holding.device
            if key in short:
                lacking[key] -= holding.nbytes
                leaving.add(id(holding))
    return [holding for holding in away if id(holding) in leaving]


def _as_they_lie(holdings: list[Holding]) -> list[Holding]:
    """What is parked side by side in that order: it travels together.

    A forward may have changed the order of the walk.
    """
    if holdings[0].device.type != "cpu":
        return holdings
    places = [place_of(holding.storage) for holding in holdings]
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


def _prefix_in(name: str, among: dict[str, nn.Module] | dict[str, LayerGroup]) -> str | None:
    """The longest prefix of a dotted name that is among these names."""
    while name:
        if name in among:
            return name
        name = name.rpartition(".")[0]
    return "" if "" in among else None
