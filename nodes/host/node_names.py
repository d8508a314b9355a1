"""What people call the nodes of the prompt that runs, and which workflow they are of.

Ids are not enough: node 5 of another workflow is another node, perhaps in another tab.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import comfy
from .contract import ExecutionList

MOST_NODES = 4096


@dataclass(frozen=True)
class NodeName:
    """One node of a prompt.

    Attributes:
        node: its id; "3:5" for node 5 in the subgraph of node 3.
        class_name: its type.
        title: what the user calls it, else what its pack does, else its type.
        workflow: the id of the workflow; None where the one who queued the prompt did not say.
    """

    node: str
    class_name: str
    title: str
    workflow: str | None = None

    @property
    def has_title(self) -> bool:
        """Whether somebody calls it something else than its type."""
        return self.title != self.class_name

    def to_dict(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "class": self.class_name,
            "title": self.title,
            "workflow": self.workflow,
        }


_known: dict[str, NodeName] = {}  # of the nodes that were staged last, by id


def note(nodes: ExecutionList, node_id: str) -> NodeName:
    """Takes the name of a node that is about to run."""
    node = nodes.dynprompt.get_node(node_id)
    class_name = str(node["class_type"])
    meta = node.get("_meta")  # the frontend puts the title there
    title = meta.get("title") if isinstance(meta, dict) else None
    if not isinstance(title, str) or not title.strip():
        title = comfy.title_of_node_class(class_name)
    _known.pop(node_id, None)
    known = _known[node_id] = NodeName(node_id, class_name, title, comfy.running_workflow())
    if len(_known) > MOST_NODES:
        del _known[next(iter(_known))]
    return known


def of(node_id: str | None) -> NodeName | None:
    """The name of a node that was staged; None for one that was not."""
    return None if node_id is None else _known.get(node_id)
