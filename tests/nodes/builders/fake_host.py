"""A small ComfyUI for tests: model management, execution stages, progress and server, as the
contract describes them.

Written from the contract (`nodes/host/contract.py` says what qmove uses), not from ComfyUI's code.
`old=True` has the shapes of 0.3.64: no `get_cache`, outputs without an entry around them, an
interrupt that is an Exception.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

INFERENCE = 16 << 20  # bytes the host keeps free for computing; the real one has 1.2 GiB


class Line:
    """`LoadedModel`, one line of the list of loaded models: it holds the entry weakly, and once
    loaded it watches the real model die."""

    management: FakeModelManagement  # of the host whose class it is

    def __init__(self, entry: Any) -> None:
        self._entry = weakref.ref(entry)
        self.device = entry.load_device
        self.currently_used = True
        self.real_model: Any = None
        self.model_finalizer: Any = None

    @property
    def model(self) -> Any:
        return self._entry()

    def model_load(self) -> Any:
        self.model.model_patches_to(self.device)
        self.model.model_patches_to(self.model.model_dtype())
        self.model.partially_load(self.device, 1e32, force_patch_weights=False)
        real = self.model.model
        self.real_model = weakref.ref(real)
        self.model_finalizer = weakref.finalize(real, self.management.drop_dead_lines)
        return real

    def is_dead(self) -> bool:
        return self.real_model() is not None and self.model is None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Line) and self.model is other.model

    __hash__ = None  # type: ignore[assignment]


class FakeModelManagement(ModuleType):
    """`comfy.model_management`."""

    def __init__(self, old: bool) -> None:
        super().__init__("comfy.model_management")
        self.current_loaded_models: list[Line] = []
        self.LoadedModel = type("LoadedModel", (Line,), {"management": self})
        self.InterruptProcessingException = type(
            "InterruptProcessingException", (Exception if old else BaseException,), {}
        )
        self._interrupted = False
        self.emptied = 0
        self.requests: list[list[str]] = []
        self.free_memory = _plain_function(self._free_memory)

    def get_torch_device(self) -> torch.device:
        return torch.device("cuda:0")

    def minimum_inference_memory(self) -> int:
        return INFERENCE

    def get_free_memory(self, dev: torch.device) -> int:
        return (
            torch.cuda.mem_get_info(dev)[0]
            + torch.cuda.memory_reserved(dev)
            - torch.cuda.memory_allocated(dev)
        )

    def soft_empty_cache(self) -> None:
        self.emptied += 1
        torch.cuda.empty_cache()

    def load_models_gpu(
        self, models: Iterable[Any], memory_required: float = 0, *, force_full_load: bool = False
    ) -> None:
        models = list(models)
        self.requests.append([type(entry.model).__name__ for entry in models])
        for entry in models:
            for line in [line for line in self.current_loaded_models if entry.is_clone(line.model)]:
                self.current_loaded_models.remove(line)
                line.model.detach(unpatch_all=False)
                line.model_finalizer.detach()
        for device in {entry.load_device for entry in models}:
            missing = sum(
                e.model_size() - e.loaded_size() for e in models if e.load_device == device
            )
            self.free_memory(missing * 1.1 + max(INFERENCE, memory_required), device)
        for entry in models:
            line = self.LoadedModel(entry)
            line.model_load()
            self.current_loaded_models.insert(0, line)

    def _free_memory(
        self, memory_required: float, device: torch.device, keep_loaded: Iterable[Any] = ()
    ) -> list[Line]:
        keep = list(keep_loaded)
        lines = [
            x
            for x in self.current_loaded_models
            if x.device == device and x.model is not None and x not in keep
        ]
        gone = []
        for line in sorted(lines, key=lambda line: line.model.loaded_size(), reverse=True):
            missing = memory_required - self.get_free_memory(device)
            if missing <= 0:
                break
            if (
                missing < line.model.loaded_size()
                and line.model.partially_unload(torch.device("cpu"), missing) >= missing
            ):
                continue
            line.model.detach(True)
            line.model_finalizer.detach()
            gone.append(line)
        ids = {id(line) for line in gone}
        self.current_loaded_models = [x for x in self.current_loaded_models if id(x) not in ids]
        if gone:
            self.soft_empty_cache()
        return gone

    def unload_all_models(self) -> None:
        for index in range(torch.cuda.device_count()):
            self.free_memory(1e30, torch.device("cuda", index))

    def drop_dead_lines(self) -> None:
        self.current_loaded_models = [
            x for x in self.current_loaded_models if x.real_model() is not None
        ]

    def interrupt_current_processing(self, value: bool = True) -> None:
        self._interrupted = value

    def processing_interrupted(self) -> bool:
        return self._interrupted

    def throw_exception_if_processing_interrupted(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise self.InterruptProcessingException


class ModelPatcher:
    """One of the host's own models: it moves whole, by `.to`."""

    parent = None

    def __init__(self, model: nn.Module, device: str = "cuda:0") -> None:
        self.model = model
        self.load_device, self.offload_device = torch.device(device), torch.device("cpu")

    def model_size(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def loaded_size(self) -> int:
        return self.model_size() if next(self.model.parameters()).device == self.load_device else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def partially_load(
        self, device: torch.device, extra: float, force_patch_weights: bool = False
    ) -> int:
        before = self.loaded_size()
        self.model.to(device)
        return self.loaded_size() - before

    def partially_unload(self, offload_device: torch.device, memory_to_free: float) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> None:
        if unpatch_all:
            self.model.to(self.offload_device)

    def is_clone(self, other: Any) -> bool:
        return other is not None and getattr(other, "model", None) is self.model

    def model_patches_models(self) -> list[Any]:
        return []

    def model_patches_to(self, device_or_dtype: Any) -> None:
        pass

    def model_dtype(self) -> None:
        return None

    def is_dynamic(self) -> bool:
        return False

    def lowvram_patch_counter(self) -> int:
        return 0


class Cache:
    """The outputs of nodes.

    Between prompts it keeps those whose inputs are the same, unless it keeps nothing.
    """

    def __init__(self, old: bool) -> None:
        self._old = old
        self.entries: dict[str, Any] = {}

    def get(self, node_id: str) -> Any:
        return self.entries.get(node_id)

    def put(self, node_id: str, outputs: list[Any]) -> None:
        self.entries[node_id] = outputs if self._old else SimpleNamespace(outputs=outputs)

    def forget(self, node_ids: Iterable[str]) -> None:
        for node_id in node_ids:
            self.entries.pop(node_id, None)


class DynamicPrompt:
    """The prompt's nodes, and those that they have expanded into."""

    def __init__(self, prompt: Mapping[str, Any]) -> None:
        self._prompt = prompt
        self.ephemeral: dict[str, Any] = {}
        self._overridden: dict[str, Any] = {}
        self._parents: dict[str, str] = {}
        self._display: dict[str, str] = {}

    def get_node(self, node_id: str) -> Any:
        for nodes in (self._overridden, self.ephemeral):
            if node_id in nodes:
                return nodes[node_id]
        return self._prompt[node_id]

    def has_node(self, node_id: str) -> bool:
        return node_id in self.ephemeral or node_id in self._prompt

    def all_node_ids(self) -> set[str]:
        return {*self.ephemeral, *self._prompt}

    def get_parent_node_id(self, node_id: str) -> str | None:
        return self._parents.get(node_id)

    def get_display_node_id(self, node_id: str) -> str:
        while node_id in self._display:
            node_id = self._display[node_id]
        return node_id

    def get_real_node_id(self, node_id: str) -> str:
        while node_id in self._parents:
            node_id = self._parents[node_id]
        return node_id

    def add_ephemeral_node(
        self, node_id: str, node_info: Any, parent_id: str, display_id: str
    ) -> None:
        self.ephemeral[node_id] = node_info
        self._parents[node_id] = parent_id
        self._display[node_id] = display_id

    def override_node(self, node_id: str, node_info: Any) -> None:
        """From the versions with native loops: another node in the place of one of the prompt's."""
        self._overridden[node_id] = node_info


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
        self.list_class = _execution_list_class(self)
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
        self.user_directory: str | None = None
        self.model_files: dict[str, str] = {}  # name -> path

    def modules(self) -> dict[str, ModuleType]:
        """By the names under which the host imports them."""
        return {
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
        with torch.inference_mode():
            asyncio.run(self._run(prompt))
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
            nodes.add_node(node_id)
        while nodes.pendingNodes:
            node_id, _error, _exception = await nodes.stage_node_execution()
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
            self.cache.put(node_id, [self._values(item) for item in pending.pop(node_id)])
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
        results = [r["result"] if isinstance(r, dict) else r for r in results]
        is_list = getattr(cls, "OUTPUT_IS_LIST", [False] * len(results[0]))
        outputs = [
            results[0][index] if of_list else [result[index] for result in results]
            for index, of_list in enumerate(is_list)
        ]
        self.cache.put(node_id, outputs)
        return True

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
            return node["class_type"], object() if always else tuple(sorted(parts.items()))

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


def is_link(value: Any) -> bool:
    """Whether an input of a prompt's node is another node's output: [node, index]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
    )


def _execution_list_class(host: FakeHost) -> Any:
    class ExecutionList:
        """Gives out nodes whose inputs are there; of several, output nodes first."""

        def __init__(self, dynprompt: Any, output_cache: Cache, classes: dict[str, type]) -> None:
            self.dynprompt, self.output_cache, self._classes = dynprompt, output_cache, classes
            self.pendingNodes: dict[str, bool] = {}
            self.blocking: dict[str, dict[str, bool]] = {}
            self.staged_node_id: str | None = None
            self._outside: dict[str, Any] = {}  # nodes blocked from outside; what released them

        @property
        def blockCount(self) -> dict[str, int]:
            counts = dict.fromkeys(self.pendingNodes, 0)
            counts.update({n: 1 for n, value in self._outside.items() if value is None})
            for source in self.pendingNodes:
                for waiting in self.blocking[source]:
                    counts[waiting] = counts.get(waiting, 0) + 1
            return counts

        def is_cached(self, node_id: str) -> bool:
            return self.output_cache.get(node_id) is not None

        def get_input_info(self, unique_id: str, input_name: str) -> tuple[Any, Any, Any]:
            inputs = self._classes[self.dynprompt.get_node(unique_id)["class_type"]].INPUT_TYPES()  # type: ignore[attr-defined]
            for category, names in inputs.items():
                if input_name in names:
                    return names[input_name][0], category, (*names[input_name], {})[1]
            return None, None, None

        def add_node(self, node_id: str) -> None:
            self.pendingNodes[node_id] = True
            self.blocking.setdefault(node_id, {})
            for value in self.dynprompt.get_node(node_id)["inputs"].values():
                if is_link(value) and not self.is_cached(value[0]):
                    self.blocking.setdefault(value[0], {})[node_id] = True

        async def stage_node_execution(self) -> tuple[str | None, Any, Any]:
            ready = [node_id for node_id in self.pendingNodes if not self.blockCount[node_id]]
            ready.sort(key=lambda node_id: not getattr(self._class(node_id), "OUTPUT_NODE", False))
            self.staged_node_id = ready[0]
            return self.staged_node_id, None, None

        def unstage_node_execution(self) -> None:
            assert self.staged_node_id is not None
            self.staged_node_id = None

        def expand(self, node_id: str, graph: Mapping[str, Any]) -> dict[str, str]:
            """Puts the nodes of a graph into the prompt, under ids of their own, which it returns.

            A node may say in "display" which node people see for it: the one that expanded, without.
            """
            names = {name: f"{node_id}.0.0.{name}" for name in graph}
            for name, node in graph.items():
                inputs = {
                    key: [names.get(value[0], value[0]), value[1]] if is_link(value) else value
                    for key, value in node["inputs"].items()
                }
                self.dynprompt.add_ephemeral_node(
                    names[name],
                    {**node, "inputs": inputs},
                    node_id,
                    node.get("display", node_id),
                )
            for child in names.values():
                self.add_node(child)
            return names

        # From the versions with native loops on

        def inhibit_nodes(self, node_ids: Iterable[str]) -> None:
            """Takes nodes away without completing them."""
            for node_id in node_ids:
                self.pendingNodes.pop(node_id, None)
                self.blocking.pop(node_id, None)
                for waiting in self.blocking.values():
                    waiting.pop(node_id, None)

        def add_external_block(self, node_id: str) -> None:
            self._outside[node_id] = None

        def release_external_block(self, node_id: str, value: Any) -> None:
            self._outside[node_id] = value

        def released_with(self, node_id: str) -> Any:
            return self._outside.pop(node_id)

        def complete_node_execution(self) -> None:
            assert self.staged_node_id is not None
            del self.pendingNodes[self.staged_node_id]
            del self.blocking[self.staged_node_id]
            self.staged_node_id = None

        def _class(self, node_id: str) -> type:
            return self._classes[self.dynprompt.get_node(node_id)["class_type"]]

    return ExecutionList


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


def _plain_function(method: Any) -> Any:
    """A function that a module has, as the host's: others may put theirs in its place."""

    def function(*args: Any, **options: Any) -> Any:
        return method(*args, **options)

    return function


def _module(name: str, **members: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(members)
    return module
