"""Finds which offloaded weights are one weight: a dispatch separates tied parameters.

In a forward accelerate gives each module a tensor of its own and leaves a meta tensor of its own
behind, so after the first forward the objects do not show ties. The entry of the weights map does.
Where each name has an entry of its own (`.dat` files, or one of two tied modules on a GPU),
transformers or the hooks remember that there was a tie; it holds if the bytes are equal.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..digests.checksum import checksum_of
from ..integrations.tensor_slots import Slot, registered_slots
from ..integrations.weights_map import Source
from ..model.holdings import Inventory
from ..model.kinds import wrappers


@dataclass(eq=False)
class Tied:
    """Slots that take one and the same tensor.

    Attributes:
        slots: in the order of the model.
        tensor: the object that is to stand in all of them: a real one where the weight is real
            elsewhere in the model.
        source: where its data lies.
    """

    slots: list[Slot]
    tensor: torch.Tensor
    source: Source


def find_ties(held: Inventory, found: Sequence[tuple[Slot, Source]]) -> list[Tied]:
    """Groups slots that are tied, and finds the real tensors that some of them are tied to."""
    groups = _by_object_and_entry(found)
    registered = {
        slot.full_name: slot.tensor
        for slot in registered_slots(held.modules)
        if slot.tensor.device.type != "meta"
    }
    for hinted in _hinted(held, groups, registered):
        _join_equal(hinted, groups)
    return groups


def _by_object_and_entry(found: Iterable[tuple[Slot, Source]]) -> list[Tied]:
    groups: list[Tied] = []
    known: dict[Hashable, Tied] = {}
    for slot, source in found:
        tensor = slot.tensor
        keys: list[Hashable] = [id(tensor)]
        if tensor.device.type == "meta":  # a real one may have changed since
            keys.append((source.key, tensor.dtype, isinstance(tensor, nn.Parameter)))
        group = next((known[key] for key in keys if key in known), None)
        if group is None:
            group = Tied([], tensor, source)
            groups.append(group)
        group.slots.append(slot)
        known.update({key: known.get(key, group) for key in keys})
    return groups


def _hinted(
    held: Inventory, groups: Sequence[Tied], registered: dict[str, torch.Tensor]
) -> Iterable[list[Tied | torch.Tensor]]:
    """Groups and real tensors that were tied once, as far as is known; real ones come first."""
    candidates: dict[Hashable, dict[int, Tied | torch.Tensor]] = defaultdict(dict)
    by_name = {slot.full_name: group for group in groups for slot in group.slots}
    for first, second in _declared_ties(held):
        for name in (second, first):
            member = registered.get(name, by_name.get(name))
            if member is not None:
                candidates[second][id(member)] = member
    real = {id(tensor): tensor for tensor in registered.values()}
    for group in groups:
        for slot in group.slots:
            ties = getattr(slot.hook, "tied_params_map", None) or {}
            if (
                slot.key not in getattr(slot.hook, "tied_params_names", ())
                and group.source.address not in ties
            ):
                continue
            # An address with a tensor on a device says which tie it was. On the disk, or changed
            # since, it could be any.
            addresses = [group.source.address] if ties.get(group.source.address) else list(ties)
            for address in addresses:
                members = candidates[id(ties), address]
                for tensor in ties[address].values():
                    if id(tensor) in real:
                        members[id(tensor)] = tensor
                members[id(group)] = group
    for members in candidates.values():
        if len(members) > 1:
            yield sorted(members.values(), key=lambda member: isinstance(member, Tied))


def _declared_ties(held: Inventory) -> Iterable[tuple[str, str]]:
    """(tied name, name of what it is tied to), as the models of transformers 5 declare them."""
    for module_name, module in held.modules.items():
        declared = getattr(module, "all_tied_weights_keys", None)
        if isinstance(declared, dict):
            prefix = f"{module_name}." if module_name else ""
            yield from (
                (f"{prefix}{first}", f"{prefix}{second}") for first, second in declared.items()
            )


def _join_equal(members: Sequence[Tied | torch.Tensor], groups: list[Tied]) -> None:
    for index, member in enumerate(members):
        if not isinstance(member, Tied) or member not in groups:
            continue
        for other in members[:index]:
            if (isinstance(other, Tied) and other not in groups) or not _are_equal(other, member):
                continue
            if isinstance(other, Tied):
                other.slots += member.slots
                groups.remove(member)
            else:
                member.tensor = other
            break


def _are_equal(one: Tied | torch.Tensor, other: Tied) -> bool:
    tensor = one.tensor if isinstance(one, Tied) else one
    if (
        tensor is other.tensor
        or tensor.shape != other.tensor.shape
        or tensor.dtype != other.tensor.dtype
        or wrappers.is_wrapper(tensor)
    ):
        return False
    return _content(one) == _content(other)


def _content(member: Tied | torch.Tensor) -> int:
    if isinstance(member, torch.Tensor):
        return checksum_of(member)
    return checksum_of(member.source.cast(member.source.open()).to(member.tensor.dtype))
