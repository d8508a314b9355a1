"""What qmove uses of ComfyUI, as types: nothing else of the host is touched.

ComfyUI gives no stable interface for this. The shapes below hold in 0.3.64 and everything since;
where versions differ, the member says so. A fake host with these shapes is enough to test
everything under `nodes/host`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch


class HostEntry(Protocol):
    """What ComfyUI's model management calls on a loaded object, a `ModelPatcher` or not."""

    load_device: torch.device
    offload_device: torch.device

    @property
    def parent(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    def model_patches_models(self) -> list[Any]: ...
    def model_size(self) -> int: ...
    def loaded_size(self) -> int: ...
    def current_loaded_device(self) -> torch.device: ...
    def model_patches_to(self, device_or_dtype: Any) -> None: ...
    def model_dtype(self) -> torch.dtype | None: ...
    def partially_load(
        self, device: torch.device, extra: float, force_patch_weights: bool = False
    ) -> int: ...
    def partially_unload(self, offload_device: torch.device, memory_to_free: float) -> int: ...
    def detach(self, unpatch_all: bool = True) -> None: ...
    def is_clone(self, other: Any) -> bool: ...
    def lowvram_patch_counter(self) -> int: ...
    def is_dynamic(self) -> bool: ...  # asked from 0.18.2


class ListedModel(Protocol):
    """One line of ComfyUI's list of loaded models. `model` is None once its entry has died.

    A line made for an entry is complete after `model_load`, which has the entry load.
    """

    @property
    def model(self) -> HostEntry | None: ...

    device: torch.device
    model_finalizer: Any  # a `weakref.finalize`, or None

    def model_load(self) -> Any: ...


class ModelManagement(Protocol):
    """`comfy.model_management`."""

    current_loaded_models: list[ListedModel]
    LoadedModel: Callable[[Any], Any]  # the class of those lines; it is given an entry
    InterruptProcessingException: type[BaseException]  # an Exception up to 0.18.2
    # From 0.18.2: TOTAL_PINNED_MEMORY, bytes that it has page-locked, and MAX_PINNED_MEMORY, the
    # most that it may; 0 or less: it locks nothing.

    def load_models_gpu(
        self, models: Sequence[HostEntry], *, force_full_load: bool = False
    ) -> None: ...
    def free_memory(
        self, memory_required: float, device: torch.device, keep_loaded: Sequence[ListedModel] = ()
    ) -> Any: ...
    def get_free_memory(self, dev: torch.device) -> int: ...
    def get_torch_device(self) -> torch.device: ...
    def minimum_inference_memory(self) -> float: ...
    def soft_empty_cache(self) -> None: ...
    def processing_interrupted(self) -> bool: ...
    def interrupt_current_processing(self, value: bool = True) -> None: ...
    def throw_exception_if_processing_interrupted(self) -> None: ...


class DynamicPrompt(Protocol):
    """The graph of the prompt that runs, with the nodes that expanded into it."""

    def get_node(self, node_id: str) -> Mapping[str, Any]: ...  # {"class_type": ..., "inputs": ...}

    # From the same release on as expansion: all_node_ids, get_display_node_id, get_parent_node_id
    # (None for a node of the prompt).


class ExecutionList(Protocol):
    """`comfy_execution.graph.ExecutionList`: which nodes remain, and what they will be given."""

    dynprompt: DynamicPrompt
    pendingNodes: Mapping[str, Any]
    blocking: Mapping[str, Mapping[str, Any]]  # node -> the nodes that wait for it
    blockCount: Mapping[str, int]  # node -> how many it waits for, with what is outside the graph
    # 0.3.64: .get(node) -> outputs; from 0.3.75: .get or .get_local(node) -> an entry with .outputs
    output_cache: Any

    def is_cached(self, node_id: str) -> bool: ...

    # from 0.3.75: execution_cache: node -> the outputs that it was linked to, by their node


class PromptServer(Protocol):
    """`server.PromptServer.instance`."""

    client_id: str | None
    routes: Any  # aiohttp's RouteTableDef

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None: ...
    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None: ...


class ProgressBar(Protocol):
    """`comfy.utils.ProgressBar`. Its hook raises when the user has interrupted."""

    def update_absolute(self, value: int, total: int | None = None) -> None: ...


class ExecutingContext(Protocol):
    node_id: str


NodeClasses = MutableMapping[str, type]
GetExecutingContext = Callable[[], ExecutingContext | None]
