"""Which models a node of the last runs gave or took: for "Park this model now" in a node's menu.

Everything is held weakly; a node whose models are gone is forgotten.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from .. import graph
from ..contract import ExecutionList
from ..guard import never_fails
from . import wires
from .adopted import can_be_adopted

MOST_NODES = 4096


@dataclass(frozen=True)
class _Models:
    class_name: str
    references: list[weakref.ReferenceType[Any]]

    def alive(self) -> list[Any]:
        return [model for reference in self.references if (model := reference()) is not None]


_by_node: dict[str, _Models] = {}


@never_fails("remember the models of a node", None)
def remember(nodes: ExecutionList, node_id: str) -> None:
    """Notes what a node that has just run gave, or what it took if it gave no model."""
    models = _models_in(graph.outputs_of(nodes, node_id)) or _models_in(
        graph.inputs_of(nodes, node_id)
    )
    _by_node.pop(node_id, None)
    if models:
        references = [weakref.ref(model) for model in models if can_be_adopted(model)]
        _by_node[node_id] = _Models(graph.class_name_of(nodes, node_id), references)
        if len(_by_node) > MOST_NODES:
            del _by_node[next(iter(_by_node))]


def models_of(node_id: str, class_name: str) -> list[Any]:
    """The models of a node that are still alive; none if another node had this id."""
    known = _by_node.get(node_id)
    return known.alive() if known is not None and known.class_name == class_name else []


def nodes_with_models() -> list[str]:
    return [node_id for node_id, models in list(_by_node.items()) if models.alive()]


def forget() -> None:
    _by_node.clear()


def _models_in(values: list[Any]) -> list[Any]:
    found = wires.find_models(values) if values else wires.Found()
    return [*found.modules, *found.patchers, *found.keepers]
