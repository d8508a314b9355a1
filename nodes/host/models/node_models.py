"""Which models a node of the last runs gave or took: for "Park this model now" in a node's menu.

References are weak; a node whose models are gone is forgotten.
"""

from __future__ import annotations

import weakref
from typing import Any

from .. import graph
from ..contract import ExecutionList
from ..guard import never_fails
from . import wires
from .adopted import can_be_adopted

MOST_NODES = 4096

_by_node: dict[str, tuple[str, list[weakref.ReferenceType[Any]]]] = {}  # id -> class name, models


@never_fails("remember the models of a node", None)
def remember(nodes: ExecutionList, node_id: str) -> None:
    """Notes what a node that has just run gave, or what it took if it gave no model."""
    models = wires.find_models(graph.outputs_of(nodes, node_id)).all()
    models = models or wires.find_models(graph.inputs_of(nodes, node_id)).all()
    _by_node.pop(node_id, None)
    if models:
        references = [weakref.ref(model) for model in models if can_be_adopted(model)]
        _by_node[node_id] = graph.class_name_of(nodes, node_id), references
        if len(_by_node) > MOST_NODES:
            del _by_node[next(iter(_by_node))]


def models_of(node_id: str, class_name: str) -> list[Any]:
    """The models of a node that are still alive; none if another node had this id."""
    known_class, references = _by_node.get(node_id, ("", []))
    return _alive(references) if known_class == class_name else []


def nodes_with_models() -> list[str]:
    return [node_id for node_id, (_, models) in list(_by_node.items()) if _alive(models)]


def _alive(references: list[weakref.ReferenceType[Any]]) -> list[Any]:
    return [model for reference in references if (model := reference()) is not None]
