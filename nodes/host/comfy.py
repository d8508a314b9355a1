"""ComfyUI's own modules, as far as this process has them.

Nothing is imported here: ComfyUI has loaded them, or this is another process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from .contract import GetExecutingContext, ModelManagement, NodeClasses, PromptServer


def module(name: str) -> ModuleType | None:
    """The host's module of this name, None outside of ComfyUI."""
    return sys.modules.get(name)


def model_management() -> ModelManagement | None:
    return cast("ModelManagement | None", module("comfy.model_management"))


def model_patcher_class() -> type | None:
    """ComfyUI's `ModelPatcher`, the base of all that its own loaders give."""
    return getattr(module("comfy.model_patcher"), "ModelPatcher", None)


def server() -> PromptServer | None:
    prompt_server = getattr(module("server"), "PromptServer", None)
    return getattr(prompt_server, "instance", None)


def allowed_origin() -> str | None:
    """The origin whose pages may send requests beside ComfyUI's own (`--enable-cors-header`), "*"
    for all; None unless its user has named one."""
    return getattr(getattr(module("comfy.cli_args"), "args", None), "enable_cors_header", None)


def node_classes() -> NodeClasses:
    """All nodes the host knows, by name."""
    return getattr(module("nodes"), "NODE_CLASS_MAPPINGS", {})


def names_of_node_classes() -> dict[type, str]:
    """What people call the nodes, by class."""
    titles = getattr(module("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {})
    return {cls: titles.get(name, name) for name, cls in node_classes().items()}


def title_of_node_class(name: str) -> str:
    """What the pack of a node calls its class."""
    titles = getattr(module("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {})
    return str(titles.get(name) or name)


def running_workflow() -> str | None:
    """The id of the workflow whose prompt runs; None where nobody has said it."""
    queue: Any = getattr(server(), "prompt_queue", None)
    for item in list(getattr(queue, "currently_running", {}).values()):
        extra = item[3] if len(item) > 3 and isinstance(item[3], dict) else {}
        told = extra.get("extra_pnginfo")
        workflow = told.get("workflow") if isinstance(told, dict) else None
        found = workflow.get("id") if isinstance(workflow, dict) else None
        if isinstance(found, str) and found:
            return found
    return None


def has_browsers() -> bool | None:
    """Whether a browser is connected; None where this ComfyUI does not say."""
    sockets = getattr(server(), "sockets", None)
    return None if sockets is None else bool(sockets)


def execution_list_class() -> type | None:
    return getattr(module("comfy_execution.graph"), "ExecutionList", None)


def prompt_executor_class() -> type | None:
    return getattr(module("execution"), "PromptExecutor", None)


def cache_providers() -> ModuleType | None:
    """Where caches of outputs beside ComfyUI's own are registered: from 0.18.2 on."""
    found = module("comfy_execution.cache_provider")
    return found if hasattr(found, "register_cache_provider") else None


def keeps_no_outputs() -> bool:
    """Whether it was started with `--cache-none`."""
    return bool(getattr(getattr(module("comfy.cli_args"), "args", None), "cache_none", False))


def progress_bar_class() -> type | None:
    return getattr(module("comfy.utils"), "ProgressBar", None)


def running_node() -> str | None:
    """The node whose code runs now in this thread, None between nodes and outside of a prompt."""
    get_context: GetExecutingContext | None = getattr(
        module("comfy_execution.utils"), "get_executing_context", None
    )
    context = get_context() if get_context is not None else None
    return context.node_id if context is not None else None


def own_directory() -> Path | None:
    """qmove's folder in ComfyUI's user folder. Names like it are not served over HTTP."""
    folder = user_directory()
    return None if folder is None else Path(folder) / "__qmove"


def file_named(name: str) -> Path | None:
    """A file in one of ComfyUI's model folders; None where there is none of this name."""
    folder_paths = module("folder_paths")
    for kind in getattr(folder_paths, "folder_names_and_paths", {}):
        path = folder_paths.get_full_path(kind, name)  # type: ignore[union-attr]
        if path is not None:
            return Path(path)
    return None


def folders_of_models() -> list[Path]:
    """All folders that hold models, and those in its main one that packs have made."""
    folder_paths = module("folder_paths")
    known = getattr(folder_paths, "folder_names_and_paths", {}).values()
    folders = [Path(path) for paths in known for path in paths[0]]
    main = getattr(folder_paths, "models_dir", None)
    if main is not None and Path(main).is_dir():
        folders += [path for path in Path(main).iterdir() if path.is_dir()]
    return list(dict.fromkeys(folders))


def user_directory() -> str | None:
    """The folder with a folder for each of ComfyUI's users."""
    get: Any = getattr(module("folder_paths"), "get_user_directory", None)
    return get() if get is not None else None
