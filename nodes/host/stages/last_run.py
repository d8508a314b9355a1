"""The models that the last prompt has used, so that they can come home ahead of the next one.

References are weak; models that are gone are forgotten.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from ..contract import HostEntry
from ..models.adopted import Adopted
from .auto_parking import NodeInputs

_graph: weakref.ReferenceType[Any] | None = None  # of the prompt
_adopted: list[weakref.ReferenceType[Adopted]] = []
_patchers: list[weakref.ReferenceType[Any]] = []


def note(nodes: Any, inputs: NodeInputs) -> None:
    """Notes what a node of a prompt was given. The first node of another prompt begins anew."""
    global _graph
    if _graph is None or _graph() is not nodes:
        _graph = weakref.ref(nodes)
        _adopted.clear()
        _patchers.clear()
    if not inputs.models and not inputs.patchers:
        return
    known = {model.number for model in models()}
    _adopted.extend(weakref.ref(m) for m in inputs.models if m.number not in known)
    shared = {id(patcher.model) for patcher in patchers()}  # clones share the model
    _patchers.extend(weakref.ref(p) for p in inputs.patchers if id(p.model) not in shared)


def models() -> list[Adopted]:
    """Adopted models, in the order in which they were first used."""
    return list(_alive(_adopted))


def patchers() -> list[HostEntry]:
    """ComfyUI's own models, in the order in which they were first used."""
    return list(_alive(_patchers))


def _alive(references: list[weakref.ReferenceType[Any]]) -> Iterator[Any]:
    return (model for reference in list(references) if (model := reference()) is not None)
