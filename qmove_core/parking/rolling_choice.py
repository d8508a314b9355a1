"""What of a model stays home, and what comes and goes, within a limit on its VRAM."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..actions import Action
from ..digests.gathering import LEAST_STAGING
from ..errors import NotEnoughMemory, readable_bytes
from ..model.holdings import Holding, Inventory
from . import layer_order
from .layer_order import LayerGroup

RESERVE = 4 << 20  # bytes of a limit that are for digests and staging, at most a share of it:
RESERVE_SHARE = 16
# Bytes that cross the link at a time: a sixteenth of a limit, but no more than BATCH, and no less
# than LEAST_BATCH, or an eighth of a small limit.
BATCH, LEAST_BATCH = 256 << 20, 16 << 20

Sizes = Counter[torch.device]
Homes = Mapping[int, torch.device]  # of each holding, by `id`


@dataclass(frozen=True)
class Limit:
    """Bytes of VRAM, on each device, that a model may take."""

    at_most: int

    @property
    def usable(self) -> int:
        """What its weights may take."""
        return self.at_most - min(RESERVE, self.at_most // RESERVE_SHARE)

    @property
    def batch(self) -> int:
        """Bytes that come, and go, together: each time costs the host some milliseconds. 0, which
        means one unit, where the reserve is too small for the digests of more."""
        if self.at_most < RESERVE_SHARE * LEAST_STAGING:
            return 0
        return min(BATCH, max(self.usable // 16, min(LEAST_BATCH, self.usable // 8)))

    def exceeded(self, sizes: Sizes) -> list[torch.device]:
        """The devices on which this is too much."""
        return [device for device, nbytes in sizes.items() if nbytes > self.usable]

    def __str__(self) -> str:
        return readable_bytes(self.at_most)


def groups_at_home(held: Inventory, homes: Homes, limit: Limit) -> list[LayerGroup]:
    """The layer groups of what is home on devices. A layer that has no room beside another one of
    its size is divided into its modules."""
    groups = [
        replace(group, holdings=[h for h in group.holdings if id(h) in homes])
        for group in layer_order.groups_of(held)
    ]
    return [
        part for group in groups if group.holdings for part in _parts(group, held, homes, limit)
    ]


def _parts(group: LayerGroup, held: Inventory, homes: Homes, limit: Limit) -> list[LayerGroup]:
    sizes = sizes_of(group.holdings, homes)
    if not limit.exceeded(sizes + sizes):
        return [group]
    parts = layer_order.by_module(group, held)
    found = {id(holding) for part in parts for holding in part.holdings}
    return parts if all(id(holding) in found for holding in group.holdings) else [group]


def choose(
    action: Action, groups: list[LayerGroup], must: list[LayerGroup], homes: Homes, limit: Limit
) -> list[LayerGroup]:
    """The groups that stay: as many as leave room for the others, two of them at a time, or two
    batches, so that one comes while the other computes. The small ones outside of all layers first,
    then layers in the order of their use.

    Args:
        must: those that stay in any case.

    Raises:
        NotEnoughMemory: a group, with what must stay, is larger than the limit.
    """
    total = sizes_of((h for group in groups for h in group.holdings), homes)
    if all(nbytes <= limit.at_most for nbytes in total.values()):
        return groups
    sizes = {id(group): sizes_of(group.holdings, homes) for group in groups}
    fixed = _sum(sizes[id(group)] for group in must)
    others = [group for group in groups if not any(group is other for other in must)]
    at_a_time, batches = 2, Counter({device: 2 * limit.batch for device in total})
    if limit.exceeded(fixed + _window([sizes[id(group)] for group in others], 2)):
        at_a_time, batches = 1, Counter()
        alone = [(fixed + sizes[id(group)], group) for group in others] or [(fixed, groups[0])]
        for needed, group in alone:
            for device in limit.exceeded(needed):
                raise _too_large(action, device, needed[device], group, limit)
    chosen = list(must)
    wanted = sorted(
        others,
        key=lambda group: (group.is_layer, 0 if group.is_layer else sizes[id(group)].total()),
    )
    for group in wanted:
        left = [g for g in others if g is not group]
        more = fixed + sizes[id(group)]
        window = _window([sizes[id(g)] for g in left], at_a_time)
        if not limit.exceeded(more + (window | batches)):
            chosen.append(group)
            others, fixed = left, more
    return chosen


def _too_large(
    action: Action, device: torch.device, needed: int, group: LayerGroup, limit: Limit
) -> NotEnoughMemory:
    return NotEnoughMemory(
        action,
        str(device),
        needed,
        limit.usable,
        "at_most of qmove.resident, less what digests take",
        f"Its layer {group.name!r} needs all of its weights at once, and with what must be there "
        "they take so much: raise the limit.",
    )


def sizes_of(holdings: Iterable[Holding], homes: Homes) -> Sizes:
    """Bytes of these holdings, each counted once, by their home."""
    total: Sizes = Counter()
    for holding in {id(holding): holding for holding in holdings}.values():
        total[homes[id(holding)]] += holding.nbytes
    return total


def _window(sizes: Sequence[Sizes], count: int) -> Sizes:
    """The most that so many units take on each device that are used one after the other."""
    total: Sizes = Counter()
    for index in range(len(sizes)):
        together = _sum(sizes[(index + k) % len(sizes)] for k in range(min(count, len(sizes))))
        for device, nbytes in together.items():
            total[device] = max(total[device], nbytes)
    return total


def _sum(sizes: Iterable[Mapping[torch.device, int]]) -> Sizes:
    total: Sizes = Counter()
    for one in sizes:
        total.update(one)
    return total
