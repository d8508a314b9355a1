"""Reads the prompt's graph while it runs: inputs, outputs, and which nodes are still to come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .comfy import node_classes
from .contract import ExecutionList

Outputs = list[Any]  # one list of values for each output


def inputs_of(graph: ExecutionList, node_id: str) -> list[Any]:
    """All values that will reach the node on wires, as far as they are there."""
    values: list[Any] = []
    for source, index in links_of(graph, node_id):
        outputs = _outputs(graph, source, node_id)
        if outputs is not None and index < len(outputs):
            values.append(outputs[index])
    return values


def outputs_of(graph: ExecutionList, node_id: str) -> Outputs:
    """What a node that has just run gave."""
    cache = graph.output_cache
    # `get_local` asks no outside cache, as `is_cached` does.
    outputs = _plain_outputs((getattr(cache, "get_local", None) or cache.get)(node_id))
    if outputs is not None:
        return outputs
    # With --cache-none only the nodes that wait for it have its outputs.
    for waiting in graph.blocking.get(node_id, ()):
        outputs = _outputs(graph, node_id, waiting)
        if outputs is not None:
            return outputs
    return []


def links_of(graph: ExecutionList, node_id: str) -> Iterator[tuple[str, int]]:
    """The node's links, as (source node, index of its output)."""
    for value in graph.dynprompt.get_node(node_id)["inputs"].values():
        if (
            isinstance(value, list)
            and len(value) == 2
            and isinstance(value[0], str)
            and isinstance(value[1], (int, float))
        ):
            yield value[0], int(value[1])


def steps_ahead(graph: ExecutionList) -> dict[str, int]:
    """For each node that remains, how many others must run before it: the more, the later."""
    waits_for: dict[str, set[str]] = {node_id: set() for node_id in graph.pendingNodes}
    for source, waiting in graph.blocking.items():
        for node_id in waiting:
            waits_for.setdefault(node_id, set()).add(source)
    return {node_id: len(_all_before(node_id, waits_for)) for node_id in graph.pendingNodes}


def class_of(graph: ExecutionList, node_id: str) -> type | None:
    return node_classes().get(graph.dynprompt.get_node(node_id)["class_type"])


def class_name_of(graph: ExecutionList, node_id: str) -> str:
    return str(graph.dynprompt.get_node(node_id)["class_type"])


def is_custom(graph: ExecutionList, node_id: str) -> bool:
    """Whether the node is from a pack, whose code may take VRAM without asking the host."""
    source = getattr(class_of(graph, node_id), "RELATIVE_PYTHON_MODULE", None) or "nodes"
    return source.startswith("custom_nodes")


def choices_of(graph: ExecutionList, node_id: str) -> tuple[Any, ...]:
    """What was chosen on the node: files, precisions, switches; no prose and no numbers."""
    chosen = []
    for name, value in graph.dynprompt.get_node(node_id)["inputs"].items():
        if isinstance(value, (str, bool)):
            _type, _category, options = graph.get_input_info(node_id, name)
            if not (options or {}).get("multiline"):
                chosen.append((name, value))
    return tuple(chosen)


def _all_before(node_id: str, waits_for: dict[str, set[str]]) -> set[str]:
    before: set[str] = set()
    stack = [node_id]
    while stack:
        for source in waits_for.get(stack.pop(), ()):
            if source not in before:
                before.add(source)
                stack.append(source)
    return before


def _outputs(graph: ExecutionList, source: str, node_id: str) -> Outputs | None:
    get_cache = getattr(graph, "get_cache", None)  # from 0.3.75
    if get_cache is not None:
        return _plain_outputs(get_cache(source, node_id))
    return _plain_outputs(graph.output_cache.get(source))


def _plain_outputs(cached: Any) -> Outputs | None:
    outputs = getattr(cached, "outputs", cached)  # 0.3.64 has the outputs themselves
    return outputs if isinstance(outputs, (list, tuple)) else None  # type: ignore[return-value]
