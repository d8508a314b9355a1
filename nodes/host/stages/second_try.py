"""A node that ran out of memory runs once more, when idle models could make room for it.

ComfyUI calls a node through `get_output_data` of its `execution` module, in all versions since
0.3.64, so that is wrapped: ComfyUI learns only of an error that stays. A node runs again only where
nothing of its first try is left outside: it gave no result yet, and it is no output node, none that
says of itself that it is not repeatable, and none that runs as a task beside others.
"""

from __future__ import annotations

import functools
import gc
import inspect
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

import qmove_core as qmove
from qmove_core import for_hosts

from .. import comfy, hooks, meter, settings

log = logging.getLogger("qmove")

_ON_A_GPU = re.compile(r"\bGPU (\d+)\b")


def install(give_room: Callable[[str, BaseException], bool]) -> bool:
    """Wraps ComfyUI's function, once. Returns whether it is as expected.

    Args:
        give_room: given a node and its error, makes room for another try. False where there is none
            to make, or the node has had its second try.
    """
    module: Any = comfy.module("execution")
    original: Any = getattr(module, "get_output_data", _missing)
    plain = inspect.unwrap(original)
    names = list(inspect.signature(plain).parameters) if inspect.iscoroutinefunction(plain) else []
    if names[:4] != ["prompt_id", "unique_id", "obj", "input_data_all"] or (
        "pre_execute_cb" not in names
    ):
        log.warning(
            "This ComfyUI calls its nodes in another way than qmove knows: a node that runs out of "
            "memory does not run again by itself."
        )
        return False

    @functools.wraps(original)
    async def get_output_data(*args: Any, **kwargs: Any) -> Any:
        node_id, node = args[1], args[2]
        calls = _Calls(kwargs.get("pre_execute_cb"))
        try:
            return await original(*args, **{**kwargs, "pre_execute_cb": calls})
        except Exception as error:
            if not _may_run_again(node, calls, error) or not give_room(node_id, error):
                raise
        # Out here the error is gone, and with its frames what the node had allocated.
        gc.collect()
        log.info("Node %s runs again: idle models were parked for it.", node_id)
        return await original(*args, **kwargs)

    hooks.wrap(module, "get_output_data", get_output_data)
    return True


def _missing() -> None:
    """In place of a function that is not there."""


class _Calls:
    """Counts how often the node's function is called: once for each element of a list."""

    def __init__(self, callback: Callable[[int], object] | None) -> None:
        self._callback, self.count = callback, 0

    def __call__(self, index: int) -> None:
        self.count += 1
        if self._callback is not None:
            self._callback(index)


def _may_run_again(node: Any, calls: _Calls, error: Exception) -> bool:
    return (
        settings.auto_park()
        and calls.count <= 1
        and is_allowed(node if isinstance(node, type) else type(node))
        and is_out_of_memory(error)
    )


def is_allowed(node_class: Any) -> bool:
    """Whether a node of this class may run again after it has run out of memory."""
    return (
        settings.runs_again()
        and not getattr(node_class, "OUTPUT_NODE", False)
        and not getattr(node_class, "NOT_IDEMPOTENT", False)
    )


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
