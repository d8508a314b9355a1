"""A small ComfyUI for tests: model management, execution stages, progress and server, as the
contract describes them.

Written from the contract (`nodes/host/contract.py` says what qmove uses), not from ComfyUI's code.
`old=True` has the shapes of 0.3.64: no `get_cache`, outputs without an entry around them, an
interrupt that is an Exception.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .fake_cache_provider import Providers
from .fake_graph import Cache, DynamicPrompt, execution_list_class, is_link
from .fake_management import FakeModelManagement, ModelPatcher


class FakeServer:
    """`server.PromptServer.instance`: keeps what was sent."""

    def __init__(self) -> None:
        self.client_id = "browser"
        self.sent: list[tuple[str, Any]] = []
        self.texts: list[tuple[str, str]] = []

    def send_sync(self, event: str, data: Any, sid: str | None = None) -> None:
        self.sent.append((event, data))

    def send_progress_text(self, text: str, node_id: str, sid: str | None = None) -> None:
        self.texts.append((node_id, text))


class FakeHost:
    """The modules that a ComfyUI process has, and `run` to run a prompt in it."""

    def __init__(self, *, old: bool = False, keeps_outputs: bool = True) -> None:
        self.old, self._keeps_outputs = old, keeps_outputs
        self.management = FakeModelManagement(old)
        self.server = FakeServer()
        self.bars: list[tuple[str, int, int]] = []
        self.ran: list[str] = []
        self.errors: list[BaseException] = []
        self.said = ""  # what the browser shows of the last error
        self.cache = Cache(old)
        self._signatures: dict[str, Any] = {}
        self._running: ContextVar[Any] = ContextVar("running", default=None)
        self.list_class = execution_list_class()
        self.executor_class = type(
            "PromptExecutor", (), {"handle_execution_error": self._keep_error()}
        )
        self.classes: dict[str, type] = {}
        self.instances: dict[tuple[str, type], Any] = {}  # of nodes: kept from prompt to prompt
        self.execution: Any = _module(
            "execution",
            PromptExecutor=self.executor_class,
            get_output_data=_function_of(self._get_output_data),
        )
        self.providers = Providers(self.classes)
        self.models_dir: str | None = None
        self.user_directory: str | None = None
        self.model_files: dict[str, str] = {}  # name -> path

    def modules(self) -> dict[str, ModuleType]:
        """By the names under which the host imports them."""
        new = {} if self.old else {"comfy_execution.cache_provider": self.providers.module()}
        return new | {
            "comfy": _module("comfy"),
            "comfy.model_management": self.management,
            "comfy.model_patcher": _module("comfy.model_patcher", ModelPatcher=ModelPatcher),
            "comfy.utils": _module("comfy.utils", ProgressBar=self._bar_class()),
            "comfy_execution": _module("comfy_execution"),
            "comfy_execution.graph": _module(
                "comfy_execution.graph", ExecutionList=self.list_class
            ),
            "comfy_execution.utils": _module(
                "comfy_execution.utils", get_executing_context=self._running.get
            ),
            "execution": self.execution,
            "folder_paths": _module(
                "folder_paths",
                get_user_directory=lambda: self.user_directory,
                folder_names_and_paths={"checkpoints": ([], set())},
                get_full_path=lambda kind, name: self.model_files.get(name),
                models_dir=self.models_dir,
            ),
            "nodes": _module("nodes", NODE_CLASS_MAPPINGS=self.classes),
            "server": _module("server", PromptServer=SimpleNamespace(instance=self.server)),
        }

    def add(self, *classes: type, pack: str = "custom_nodes.careless") -> None:
        """Registers node classes, as parts of a pack or (pack="nodes") as the host's own."""
        for cls in classes:
            cls.RELATIVE_PYTHON_MODULE = pack  # type: ignore[attr-defined]
            self.classes[cls.__name__] = cls

    def run(self, prompt: Mapping[str, Any]) -> dict[str, list[Any]]:
        """Runs a prompt; returns the outputs of the nodes that are there at its end.

        Errors are in `errors`, and end it.
        """
        self.errors = []
        self.management.interrupt_current_processing(False)
        self._forget_changed(prompt)
        self.providers.begin(prompt)
        try:
            with torch.inference_mode():
                asyncio.run(self._run(prompt))
        finally:
            self.providers.end()
        outputs = {
            node_id: getattr(entry, "outputs", entry)
            for node_id, entry in self.cache.entries.items()
        }
        if not self._keeps_outputs:
            self.cache.entries.clear()
        return outputs

    @contextmanager
    def node_runs(self, node_id: str) -> Any:
        """Inside, the host says that this node runs."""
        token = self._running.set(SimpleNamespace(node_id=node_id))
        try:
            yield
        finally:
            self._running.reset(token)

    async def _run(self, prompt: Mapping[str, Any]) -> None:
        dynprompt = DynamicPrompt(prompt)
        nodes = self.list_class(dynprompt, self.cache, self.classes)
        self.instances = {key: x for key, x in self.instances.items() if key[0] in prompt}
        pending: dict[str, Any] = {}
        for node_id in prompt:
            await self.providers.look_up(self.cache, node_id)
        for node_id in prompt:
            nodes.add_node(node_id)
        while nodes.pendingNodes:
            node_id, _error, _exception = await nodes.stage_node_execution()
            await self.providers.look_up(self.cache, node_id)
            if not nodes.is_cached(node_id):
                try:
                    done = await self._run_node(nodes, node_id, pending)
                except (Exception, self.management.InterruptProcessingException) as error:
                    if isinstance(error, torch.OutOfMemoryError):
                        self.management.unload_all_models()
                    details = {"node_id": node_id, "exception_message": str(error)}
                    self.executor_class().handle_execution_error(
                        "prompt", prompt, {}, set(), details, error
                    )
                    self.said = details["exception_message"]
                    return
                if not done:
                    nodes.unstage_node_execution()
                    continue
            nodes.complete_node_execution()
        self.cache.forget(dynprompt.ephemeral)

    async def _run_node(self, nodes: Any, node_id: str, pending: dict[str, Any]) -> bool:
        """Runs a node, or puts together what came of the nodes that it expanded into.

        Returns:
            False where it has expanded, and waits for them.
        """
        self.management.throw_exception_if_processing_interrupted()
        if node_id in pending:
            self._keep(node_id, [self._values(item) for item in pending.pop(node_id)])
            return True
        node = nodes.dynprompt.get_node(node_id)
        cls = self.classes[node["class_type"]]
        if (node_id, cls) not in self.instances:
            self.instances[node_id, cls] = cls()
        inputs = {name: self._values(item) for name, item in node["inputs"].items()}
        hidden = {"dynprompt": nodes.dynprompt, "execution_list": nodes, "unique_id": node_id}
        inputs |= {name: [hidden[name]] for name in getattr(cls, "HIDDEN", ())}
        # Looked up in its module, as the host does.
        results = await self.execution.get_output_data(
            "prompt",
            node_id,
            self.instances[node_id, cls],
            inputs,
            execution_block_cb=None,
            pre_execute_cb=lambda index: None,
        )
        result = results[0]
        if isinstance(result, dict) and "expand" in result:
            names = nodes.expand(node_id, result["expand"])
            results = [
                [names[item[0]], item[1]] if isinstance(item, list) else item
                for item in result["result"]
            ]
            for source, _index in filter(is_link, results):
                nodes.blocking.setdefault(source, {})[node_id] = True
            pending[node_id] = results
            return False
        ui = result.get("ui") if isinstance(result, dict) else None
        results = [r["result"] if isinstance(r, dict) else r for r in results]
        is_list = getattr(cls, "OUTPUT_IS_LIST", [False] * len(results[0]))
        outputs = [
            results[0][index] if of_list else [result[index] for result in results]
            for index, of_list in enumerate(is_list)
        ]
        self._keep(node_id, outputs, ui)
        return True

    def _keep(self, node_id: str, outputs: list[Any], ui: Any = None) -> None:
        self.cache.put(node_id, outputs)
        self.providers.store(node_id, outputs, ui)

    def _values(self, item: Any) -> list[Any]:
        if not is_link(item):
            return [item]
        entry = self.cache.get(item[0])
        return getattr(entry, "outputs", entry)[item[1]]

    async def _get_output_data(
        self,
        prompt_id: str,
        unique_id: str,
        obj: Any,
        input_data_all: Mapping[str, list[Any]],
        execution_block_cb: Any = None,
        pre_execute_cb: Any = None,
        v3_data: Any = None,
    ) -> Any:
        """Calls a node once for each element of its lists."""
        results = []
        for index in range(max(map(len, input_data_all.values()), default=1)):
            arguments = {k: v[min(index, len(v) - 1)] for k, v in input_data_all.items()}
            if pre_execute_cb is not None and input_data_all:
                pre_execute_cb(index)
            self.ran.append(unique_id)
            with self.node_runs(unique_id):
                results.append(getattr(obj, obj.FUNCTION)(**arguments))
        return results

    def _forget_changed(self, prompt: Mapping[str, Any]) -> None:
        signatures: dict[str, Any] = {}

        def signature(node_id: str) -> Any:
            node = prompt[node_id]
            parts = {n: signature(v[0]) if is_link(v) else v for n, v in node["inputs"].items()}
            always = getattr(self.classes.get(node["class_type"]), "ALWAYS_RUNS", False)
            changed = self.providers.is_changed(prompt, node_id)
            return node["class_type"], object() if always else tuple(sorted(parts.items())), changed

        for node_id in prompt:
            signatures[node_id] = signature(node_id)
            if self._signatures.get(node_id) != signatures[node_id]:
                self.cache.entries.pop(node_id, None)
        self.cache.entries = {
            node_id: e for node_id, e in self.cache.entries.items() if node_id in prompt
        }
        self._signatures = signatures

    def _keep_error(host: FakeHost) -> Any:
        def handle_execution_error(
            self: Any,
            prompt_id: str,
            prompt: Any,
            current_outputs: Any,
            executed: Any,
            error: Any,
            ex: BaseException,
        ) -> None:
            host.errors.append(ex)

        return handle_execution_error

    def _bar_class(host: FakeHost) -> type:
        class ProgressBar:
            def __init__(self, total: int, node_id: str | None = None) -> None:
                self._node_id = node_id

            def update_absolute(self, value: int, total: int | None = None) -> None:
                host.management.throw_exception_if_processing_interrupted()
                host.bars.append((self._node_id or "", value, total or 0))

        return ProgressBar


def _function_of(method: Any) -> Any:
    """A plain coroutine function of a module, as the host has it."""

    async def get_output_data(
        prompt_id: str,
        unique_id: str,
        obj: Any,
        input_data_all: Any,
        execution_block_cb: Any = None,
        pre_execute_cb: Any = None,
        v3_data: Any = None,
    ) -> Any:
        return await method(
            prompt_id, unique_id, obj, input_data_all, execution_block_cb, pre_execute_cb, v3_data
        )

    return get_output_data


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    return module
