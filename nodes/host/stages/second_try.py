"""A node that ran out of memory runs once more, when idle models could make room for it.

ComfyUI calls a node through `get_output_data` of its `execution` module, in all versions since
0.3.64, so that is wrapped: ComfyUI learns only of an error that stays. A node runs again only where
nothing of its first try is left outside: it gave no result yet, and it is neither an output node
nor one that says of itself that it is not repeatable.
"""

from __future__ import annotations

import functools
import gc
import logging
import re
from collections.abc import Iterator
from typing import Any, Protocol

import torch

import qmove_core as qmove
from qmove_core import for_hosts

from .. import comfy, graph, hooks, meter, settings

log = logging.getLogger("qmove")

_ON_A_GPU = re.compile(r"\bGPU (\d+)\b")


class Room(Protocol):
    """Who can make room for a node."""

    def can_be_made(self, node_id: str, error: BaseException) -> bool:
        """Whether the node may have a second try. From here on it has had it."""

    def make(self, node_id: str) -> None:
        """Makes room. What the node had allocated is free again."""

    def is_lacking(self, error: BaseException) -> None:
        """ComfyUI is about to see this error, and to unload its models for it."""


def install(room: Room) -> bool:
    """Wraps ComfyUI's function, once. Returns whether it is as expected."""
    module: Any = comfy.module("execution")
    if not hooks.fits(
        module, "get_output_data", 4, ["execution_block_cb", "pre_execute_cb"], is_async=True
    ):
        log.warning(
            "This ComfyUI calls its nodes in another way than qmove knows: a node that runs out of "
            "memory does not run again by itself."
        )
        return False
    original = module.get_output_data

    @functools.wraps(original)
    async def get_output_data(
        prompt_id: Any, unique_id: str, obj: Any, *args: Any, **options: Any
    ) -> Any:
        calls = _Calls(options.get("pre_execute_cb"))
        counted = {**options, "pre_execute_cb": calls}
        try:
            return await original(prompt_id, unique_id, obj, *args, **counted)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if not _may_run_again(obj, calls) or not room.can_be_made(unique_id, error):
                room.is_lacking(error)
                raise
        # Out here the error is gone, and with its frames what the node had allocated.
        gc.collect()
        room.make(unique_id)
        log.info("Node %s runs again: idle models were parked for it.", unique_id)
        try:
            return await original(prompt_id, unique_id, obj, *args, **options)
        except Exception as error:
            if is_out_of_memory(error):
                room.is_lacking(error)
            raise

    hooks.wrap(module, "get_output_data", get_output_data)
    return True


class _Calls:
    """Counts how often the node's function is called: once for each element of a list."""

    def __init__(self, callback: Any) -> None:
        self._callback, self.count = callback, 0

    def __call__(self, index: int) -> None:
        self.count += 1
        if self._callback is not None:
            self._callback(index)


def _may_run_again(node: Any, calls: _Calls) -> bool:
    node_class = node if isinstance(node, type) else type(node)
    return settings.auto_park() and calls.count <= 1 and is_allowed(node_class)


def is_allowed(node_class: Any) -> bool:
    """Whether a node of this class may run again after it has run out of memory."""
    return settings.runs_again() and not graph.must_run(node_class)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, says that a device has no room."""
    return any(for_hosts.is_out_of_memory(each) for each in _chain(error))


def full_devices(error: BaseException | None) -> list[torch.device]:
    """The devices that had no room, as far as an error says it; else all that are in use."""
    known = {str(device): device for device in meter.devices()}
    for each in _chain(error):
        place = each.place if isinstance(each, qmove.NotEnoughMemory) else None
        match = _ON_A_GPU.search(str(each)) if for_hosts.is_out_of_memory(each) else None
        device = known.get(place or (f"cuda:{match[1]}" if match else ""))
        if device is not None:
            return [device]
    return [device for device in known.values() if for_hosts.has_context(device)]


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
