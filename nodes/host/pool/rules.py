"""Which outputs the pool may keep: those that ComfyUI would make anew, alike, and that hold a new
model.

Nothing is kept that must run: a node that shows or saves something, that says it is not idempotent,
or that asks for its own id or for the workflow around it, be it the loader, a node before it, or
one that it has expanded into.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .. import comfy, graph, settings
from ..contract import ExecutionList
from ..models import finding, managers, residency, wires
from ..models.adopted import adopted_of

MOST_LOOSE = 1 << 20  # bytes of images and the like beside a model

# Hidden inputs whose values differ from workflow to workflow.
_TELLING = frozenset({"UNIQUE_ID", "PROMPT", "DYNPROMPT", "EXTRA_PNGINFO", "EXECUTION_LIST"})

_repeatable: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def is_repeatable(cls: Any) -> bool:
    """Whether nodes of a class give the same for the same inputs, in whatever workflow."""
    if cls is None:
        return False
    known = _repeatable.get(cls)
    if known is None:  # asked once: what a node takes may list folders
        hidden = cls.INPUT_TYPES().get("hidden") or {}
        asks = {kind for value in hidden.values() for kind in _kinds(value)}
        _repeatable[cls] = known = not graph.must_run(cls) and asks.isdisjoint(_TELLING)
    return known


def _kinds(hidden: Any) -> Sequence[Any]:
    """What a hidden input is: older nodes have a word there, newer ones a tuple with a word."""
    return hidden if isinstance(hidden, (tuple, list)) else (hidden,)


def nodes_behind(nodes: ExecutionList, node_id: str) -> list[str]:
    """A node, all that its inputs come from, and what any of them has expanded into."""
    found: dict[str, None] = {}
    expanded, stack = graph.expansions(nodes), [node_id]
    while stack:
        one = stack.pop()
        if one not in found:
            found[one] = None
            stack += [source for source, _index in graph.links_of(nodes, one)]
            stack += expanded.get(one, [])
    return list(found)


def written_inputs(nodes: ExecutionList, node_ids: Sequence[str]) -> Iterator[Any]:
    """What is written on these nodes: their inputs without the links."""
    for node_id in node_ids:
        yield list(nodes.dynprompt.get_node(node_id)["inputs"].values())


def models_to_keep(
    nodes: ExecutionList, node_id: str, outputs: Sequence[Any]
) -> tuple[list[Any], list[Any]] | None:
    """The models of an output that may be kept, ours and ComfyUI's own; None where it may not.

    A node that hands on a model that it was given is no loader: it is quick, and may have changed
    it. What another manager moves (accelerate) would stay in VRAM for good.
    """
    found = wires.find_models(outputs)
    groups = finding.groups_among(found.seen)
    ours = [*found.modules, *found.tensor_owners, *groups]
    if not (ours or found.patchers) or (found.patchers and not settings.keeps_loaded_own()):
        return None
    in_groups = {number for group in groups for number in group.ids()}
    loose = [t for t in graph.tensors_in(outputs) if id(t) not in in_groups]
    if sum(tensor.nbytes for tensor in loose) > MOST_LOOSE:
        return None
    if any(managers.manager_of(m) for m in ours if isinstance(m, torch.nn.Module)):
        return None
    taken = wires.find_models(graph.inputs_of(nodes, node_id))
    known = {adopted_of(m) for m in (*taken.all(), *finding.groups_among(taken.seen))} - {None}
    adopted = residency.take_in(ours)
    its_own = {id(patcher.model) for patcher in found.patchers}
    if not known.isdisjoint(adopted) or not its_own.isdisjoint(id(p.model) for p in taken.patchers):
        return None
    return (ours, found.patchers) if all(not a.left_alone for a in adopted) else None


def class_named(class_name: str) -> type | None:
    return comfy.node_classes().get(class_name)
