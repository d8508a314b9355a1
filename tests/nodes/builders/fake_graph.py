"""The prompt that runs in the fake host: its nodes, what remains of them, and their outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any


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


def is_link(value: Any) -> bool:
    """Whether an input of a prompt's node is another node's output: [node, index]."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
    )


def execution_list_class() -> Any:
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
