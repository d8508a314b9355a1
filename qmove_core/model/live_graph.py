"""Tells whether a live autograd graph still needs the weights of a model.

Rebinding a tensor does not bump its version, so such a graph would not notice that its saved
weights have moved. Saved tensors are held in C++. The use count there tells whether anything holds
a tensor, and only then is the graph itself searched.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch

from .holdings import Inventory


def tensors_in_live_graph(inventory: Inventory) -> list[str]:
    """Names of the holdings that a live graph has saved, or accumulates gradients into."""
    suspects = _held_in_cpp(inventory)
    if not suspects:
        return []
    return sorted(suspects[storage] for storage in _needed_by_graphs() & suspects.keys())


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


def _needed_by_graphs() -> set[int]:
    """Storages of all tensors that a graph which some tensor object keeps alive has saved, or
    sends gradients to.
    """
    needed: set[int] = set()
    with torch._C.DisableTorchFunction():
        roots = [
            obj
            for obj in gc.get_objects()
            if issubclass(type(obj), torch.Tensor) and obj.grad_fn is not None
        ]
        needed.update(_storages(roots))
        pending = [root.grad_fn for root in roots]
        seen = set(pending)
        while pending:
            node = pending.pop()
            needed.update(_storages([getattr(node, "variable", None)]))  # of an AccumulateGrad
            needed.update(_storages(_saved_by(node)))
            for following, _index in node.next_functions:
                if following is not None and following not in seen:
                    seen.add(following)
                    pending.append(following)
    return needed


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
