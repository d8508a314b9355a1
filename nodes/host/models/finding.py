"""Looks for models that no wire carries: what holds the VRAM that no known model explains."""

from __future__ import annotations

from .adopted import Adopted


def look() -> list[Adopted]:
    """Adopts and registers the models that hold VRAM which no known model explains.

    Called after a node, before one that lacks room, and after an out-of-memory. Where no device
    has more allocated than at the last look, nothing is looked at.
    """
    return []


def taken_by(node_class: type | None) -> list[Adopted]:
    """The found models that a node uses without a wire: on its instance, in its class, its pack.

    They count as the node's inputs: they are not parked for it, and what cannot wake by itself
    (tensors outside of modules) comes home before it.
    """
    return []
