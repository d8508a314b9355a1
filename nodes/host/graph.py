"""Reads the prompt's graph while it runs: inputs, outputs, and which nodes are still to come."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .comfy import node_classes
from .contract import ExecutionList

MOST_TENSORS = 16  # a wire may carry a thousand pictures
MOST_DEPTH = 3

_WRITTEN_IN_PROMPTS = (str, int, float, type(None))

Outputs = list[Any]  # one list of values for each output


def inputs_of(graph: ExecutionList, node_id: str) -> list[Any]:
    """All values that will reach the node, as far as they are there: on wires, and objects that an
    expanding node has put into it."""
    inputs = graph.dynprompt.get_node(node_id)["inputs"].values()
    values = [v for v in inputs if not isinstance(v, _WRITTEN_IN_PROMPTS) and not _is_link(v)]
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
        if _is_link(value):
            yield value[0], int(value[1])


def _is_link(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], (int, float))
    )


def steps_ahead(graph: ExecutionList) -> dict[str, int]:
    """For each node that remains, how many others must run before it: the more, the later.

    A node that waits for something outside the graph (the End of a loop, for its last round) comes
    after all that do not wait for it.
    """
    waits_for: dict[str, list[str]] = {node_id: [] for node_id in graph.pendingNodes}
    for source, waiting in graph.blocking.items():
        for node_id in waiting:
            waits_for.setdefault(node_id, []).append(source)
    counts = getattr(graph, "blockCount", {})
    outside = {n for n in graph.pendingNodes if counts.get(n, 0) > len(waits_for[n])}
    before = _all_before(waits_for)
    bits = {node_id: 1 << index for index, node_id in enumerate(before)}
    late = sum(bits[node_id] for node_id in outside)
    most = len(before)
    return {
        n: before[n].bit_count() + (most if (before[n] | bits[n]) & late else 0)
        for n in graph.pendingNodes
    }


def _all_before(waits_for: dict[str, list[str]]) -> dict[str, int]:
    """For each node those that run before it, as a set of bits: that of a node is its place here.

    A loop's rounds may be thousands of nodes, one behind the other.
    """
    before: dict[str, int] = {}
    place: dict[str, int] = {}
    stack = [(node_id, False) for node_id in waits_for]
    while stack:
        node_id, is_next = stack.pop()
        sources = waits_for.get(node_id, [])
        if is_next:
            for source in sources:
                before[node_id] |= before[source] | 1 << place[source]
        elif node_id not in before:
            place[node_id] = len(before)
            before[node_id] = 0
            stack.append((node_id, True))
            stack += [(source, False) for source in sources]
    return before


def class_of(graph: ExecutionList, node_id: str) -> type | None:
    return node_classes().get(graph.dynprompt.get_node(node_id)["class_type"])


def class_name_of(graph: ExecutionList, node_id: str) -> str:
    return str(graph.dynprompt.get_node(node_id)["class_type"])


def is_custom(graph: ExecutionList, node_id: str) -> bool:
    """Whether the node is from a pack, whose code may take VRAM without asking the host."""
    source = getattr(class_of(graph, node_id), "RELATIVE_PYTHON_MODULE", None) or "nodes"
    return source.startswith("custom_nodes")


def must_run(node_class: Any) -> bool:
    """Whether nodes of a class do things outside (show, save), or say that a second run differs."""
    return bool(
        getattr(node_class, "OUTPUT_NODE", False) or getattr(node_class, "NOT_IDEMPOTENT", False)
    )


def expanded_from(graph: ExecutionList, node_id: str) -> list[str]:
    """The nodes that expanded into this one, the nearest first; none for one of the prompt's."""
    get = getattr(graph.dynprompt, "get_parent_node_id", None)
    parents: list[str] = []
    while get is not None and (parent := get(node_id)) is not None and parent not in parents:
        parents.append(parent)
        node_id = parent
    return parents


def expansions(graph: ExecutionList) -> dict[str, list[str]]:
    """The nodes that each node has expanded into, where it has."""
    found: dict[str, list[str]] = {}
    get = getattr(graph.dynprompt, "get_parent_node_id", None)
    all_ids = getattr(graph.dynprompt, "all_node_ids", None)
    if get is None or all_ids is None:
        return found
    for node_id in all_ids():
        if (parent := get(node_id)) is not None:
            found.setdefault(parent, []).append(node_id)
    return found


def values_of(graph: ExecutionList, node_id: str) -> dict[str, Any]:
    """What was chosen on the node: numbers, switches and names; no seeds and no prose."""
    inputs = graph.dynprompt.get_node(node_id)["inputs"]
    kinds = _kinds_of(class_of(graph, node_id))
    return {n: v for n, v in inputs.items() if _is_choice(v, kinds.get(n, _CHOICE))}


def _is_choice(value: Any, kind: str) -> bool:
    if kind == _TEXT_OR_SEED:
        return False
    if isinstance(value, str):  # typed in, it may name a file or a repository: one word
        words = value.split()
        return len(value) <= 256 and (len(words) == 1 or (kind == _CHOICE and len(words) > 1))
    return isinstance(value, (bool, int, float))


_CHOICE, _TYPED_IN, _TEXT_OR_SEED = "choice", "typed in", "text or seed"
_kinds: weakref.WeakKeyDictionary[type, dict[str, str]] = weakref.WeakKeyDictionary()


def _kinds_of(cls: type | None) -> dict[str, str]:
    """What each input of a class is. It is asked once: that may list folders."""
    if cls is None:
        return {}
    known = _kinds.get(cls)
    if known is None:
        _kinds[cls] = known = dict(_inputs_of_class(cls))
    return known


def _inputs_of_class(cls: Any) -> Iterator[tuple[str, str]]:
    for inputs in cls.INPUT_TYPES().values():
        for name, description in inputs.items() if isinstance(inputs, dict) else ():
            kind, *rest = description if isinstance(description, (tuple, list)) else (description,)
            options = rest[0] if rest and isinstance(rest[0], dict) else {}
            is_text = kind == "STRING" and options.get("multiline")
            if is_text or "seed" in name or options.get("control_after_generate"):
                yield name, _TEXT_OR_SEED
            else:
                yield name, _TYPED_IN if kind == "STRING" else _CHOICE


def shapes_of(values: Iterable[Any]) -> tuple[str, ...]:
    """Shapes and dtypes of the tensors among values, and in the dicts and lists among them."""
    return tuple(f"{'x'.join(map(str, t.shape))} {t.dtype}" for t in tensors_in(values))


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """The first tensors among values, and in the dicts and lists among them."""
    tensors: list[torch.Tensor] = []
    stack = [(value, 0) for value in reversed(list(values))]
    while stack and len(tensors) < MOST_TENSORS:
        value, depth = stack.pop()
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif depth < MOST_DEPTH and isinstance(value, dict):
            stack += [(item, depth + 1) for item in reversed(list(value.values())[:MOST_TENSORS])]
        elif depth < MOST_DEPTH and isinstance(value, (list, tuple)):
            stack += [(item, depth + 1) for item in reversed(value[:MOST_TENSORS])]
    return tensors


def _outputs(graph: ExecutionList, source: str, node_id: str) -> Outputs | None:
    # What the node waits for is kept here, also where the cache drops it meanwhile. `get_cache`
    # would put it back there.
    linked = getattr(graph, "execution_cache", {}).get(node_id, {})
    outputs = _plain_outputs(linked.get(source))
    if outputs is None:
        cache = graph.output_cache
        get_local = getattr(cache, "get_local", None)  # from 0.18.2 `get` is a coroutine
        outputs = _plain_outputs((get_local or cache.get)(source))
    return outputs


def _plain_outputs(cached: Any) -> Outputs | None:
    outputs = getattr(cached, "outputs", cached)  # 0.3.64 has the outputs themselves
    return outputs if isinstance(outputs, (list, tuple)) else None  # type: ignore[return-value]
