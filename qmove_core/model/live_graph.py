"""Tells whether a live autograd graph still needs the weights of a model.

Rebinding a tensor does not bump its version, so such a graph would not notice that its saved
weights have moved. Saved tensors are held in C++. The use count there tells whether anything holds
a tensor, and only then is the graph itself searched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..collector import all_objects
from .holdings import Inventory


def tensors_in_live_graph(inventory: Inventory) -> list[str]:
    """Names of the holdings that a live graph has saved, or accumulates gradients into."""
    suspects = _held_in_cpp(inventory)
    if not suspects:
        return []
    own = {id(tensor) for held in inventory.holdings for tensor in held.tensors}
    needed = _needed_by_graphs(_made_by_norms(inventory), own)
    return sorted(suspects[storage] for storage in needed & suspects.keys())


def _made_by_norms(inventory: Inventory) -> set[int]:
    """The ids of the weights that `torch.nn.utils.weight_norm` and `spectral_norm` compute anew in
    each forward. Nobody goes back through their graphs of before."""
    return {
        id(module.__dict__.get(hook.name))
        for module in inventory.modules.values()
        for hook in module.__dict__.get("_forward_pre_hooks", {}).values()
        if type(hook).__module__ in ("torch.nn.utils.weight_norm", "torch.nn.utils.spectral_norm")
    }


def _held_in_cpp(inventory: Inventory) -> dict[int, str]:
    """The storages (`_cdata`) with a tensor that has more owners in C++ than its Python object,
    its views and its role explain, and their names.
    """
    suspects: dict[int, str] = {}
    with torch._C.DisableTorchFunction():
        pairs = [(tensor, held) for held in inventory.holdings for tensor in held.tensors]
        views = Counter(
            id(tensor._base)
            for tensor, _ in pairs
            if not tensor.is_inference() and tensor._base is not None
        )
        for tensor, held in pairs:
            explained = 1 + views[id(tensor)] + (held.kind == "gradient")
            uses = tensor._use_count()  # type: ignore[attr-defined]
            if uses > explained or tensor.grad_fn is not None:
                suspects[held.storage._cdata] = held.name
    return suspects


def _needed_by_graphs(left_out: set[int], own: set[int]) -> set[int]:
    """Storages of all tensors that a graph which some tensor object keeps alive has saved, or
    sends gradients to.

    A tensor of the model itself (its id in `own`) may only say how it was made: HQQ's bias is a
    clone of a parameter. If its graph has saved nothing, no value of it is used again.
    """
    needed: set[int] = set()
    with torch._C.DisableTorchFunction():
        found = [
            obj
            for obj in all_objects()
            if issubclass(type(obj), torch.Tensor) and obj.grad_fn is not None
        ]
        seen = set(_nodes([obj.grad_fn for obj in found if id(obj) in left_out], set()))
        seen = {node for node in seen if not hasattr(node, "variable")}
        roots = [obj for obj in found if id(obj) not in left_out and obj.grad_fn not in seen]
        needed.update(_storages(o for o in roots if id(o) not in own or _has_saved(o.grad_fn)))
        for node in _nodes([root.grad_fn for root in roots], seen):
            needed.update(_storages([getattr(node, "variable", None)]))  # of an AccumulateGrad
            needed.update(_storages(_saved_by(node)))
    return needed


def _has_saved(grad_fn: Any) -> bool:
    return any(_storages(_saved_by(node)) for node in _nodes([grad_fn], set()))


def _nodes(pending: list[Any], seen: set[Any]) -> Iterator[Any]:
    """The nodes of the graphs that end in these, each once, without those `seen` already."""
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            pending += [following for following, _index in node.next_functions]


def _saved_by(node: Any) -> list[object]:
    saved: list[object] = []
    try:
        saved += getattr(node, "saved_tensors", ())  # of a torch.autograd.Function
        for attribute in dir(node):
            if attribute.startswith("_saved_"):
                value = getattr(node, attribute)
                saved += value if isinstance(value, (list, tuple)) else [value]
    except RuntimeError:  # its backward has run and freed what it saved
        return []
    return saved


def _storages(objects: Iterable[object]) -> set[int]:
    return {
        o.untyped_storage()._cdata
        for o in objects
        if isinstance(o, torch.Tensor) and torch._C._has_storage(o)
    }
