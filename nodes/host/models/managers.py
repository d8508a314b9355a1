"""Who else moves a model by itself: what another manager swaps in and out is left to it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import GraphModule


def manager_of(module: nn.Module) -> str | None:
    """The library or pack that moves parts of a model while it runs; None if nobody does."""
    if isinstance(module, GraphModule):
        return "torch.compile"  # a compiled graph, with its constants
    for part in module.modules():
        own: dict[str, Any] = part.__dict__
        if "_mm_manager" in own:
            return "mmgp"
        if own.get("blocks_to_swap"):
            return "block swap"
        if _offloads(own.get("_hf_hook")):
            return "accelerate's offload"
        hooks = getattr(own.get("_diffusers_hook"), "hooks", {})
        if any("offload" in name for name in hooks):
            return "diffusers' group offload"
    return None


def _offloads(hook: Any) -> bool:
    """Whether a hook of accelerate brings weights in before each forward, or a whole model."""
    hooks = getattr(hook, "hooks", (hook,))
    return any(
        getattr(each, "offload", False) or type(each).__name__ == "CpuOffload" for each in hooks
    )
