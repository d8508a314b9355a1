"""Which models a node of the last runs gave or took: for "Park this model now" in a node's menu.

References are weak; a node whose models are gone is forgotten. The same id in another workflow is
another node.
"""

from __future__ import annotations

import weakref
from typing import Any

from .. import comfy, graph, node_names
from ..contract import ExecutionList
from ..guard import never_fails
from . import pins, wires
from .adopted import Adopted, adopted_of, can_be_adopted

MOST_NODES = 4096

_References = list[weakref.ReferenceType[Any]]
# (workflow, id) -> the node, models
_by_node: dict[tuple[str | None, str], tuple[node_names.NodeName, _References]] = {}


@never_fails("remember the models of a node", None)
def remember(nodes: ExecutionList, node_id: str) -> None:
    """Notes what a node that has just run gave, or what it took if it gave no model."""
    models = wires.find_models(graph.outputs_of(nodes, node_id)).all()
    models = models or wires.find_models(graph.inputs_of(nodes, node_id)).all()
    name = node_names.of(node_id) or node_names.note(nodes, node_id)
    key = name.workflow, node_id
    _by_node.pop(key, None)
    if models:
        references = [weakref.ref(model) for model in models if can_be_adopted(model)]
        _by_node[key] = name, references
        if len(_by_node) > MOST_NODES:
            del _by_node[next(iter(_by_node))]


def models_of(node_id: str, class_name: str, workflow: str | None = None) -> list[Any]:
    """The models of a node that are still alive; none if another node had this id.

    Args:
        node_id, class_name: of the node.
        workflow: the one that is meant; None for the one that ran last and has such a node.
    """
    for (of_workflow, known_id), (name, references) in reversed(list(_by_node.items())):
        if (
            known_id == node_id
            and workflow in (None, of_workflow)
            and name.class_name == class_name
        ):
            return _alive(references)
    return []


def nodes_with_models() -> list[str]:
    """The ids of nodes that have a model, of whatever workflow."""
    living = [node_id for (_, node_id), (_, models) in list(_by_node.items()) if _alive(models)]
    return list(dict.fromkeys(living))


def menus() -> list[dict[str, Any]]:
    """For each node that has a model: which node it is, and what can be done with its models."""
    found = []
    for name, references in list(_by_node.values()):
        models = _alive(references)
        if models:
            found.append(name.to_dict() | {"can": _what_can_be_done(models)})
    return found


def _what_can_be_done(models: list[Any]) -> list[str]:
    can = set()
    patcher_class: Any = comfy.model_patcher_class()
    for model in models:
        if patcher_class is not None and isinstance(model, patcher_class):
            loaded, stays = int(model.loaded_size()), pins.stays(model)
            is_away = loaded < int(model.model_size())
        else:
            adopted = adopted_of(model)
            loaded, is_away, stays = _state_of(adopted) if adopted else (1, False, False)
        can |= {"park"} if loaded and not stays else set()
        can |= {"restore"} if is_away else set()
        can.add("unpin" if stays else "pin")
    return sorted(can)


def _state_of(adopted: Adopted) -> tuple[int, bool, bool]:
    return sum(adopted.resident.values()), bool(adopted.parked), pins.stays(adopted)


def _alive(references: _References) -> list[Any]:
    return [model for reference in references if (model := reference()) is not None]
