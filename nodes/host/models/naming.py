"""Names models after the node that gave them first: what it names in its inputs, else its title.

Nodes that a model only passes through do not rename it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .. import graph, node_names
from ..contract import ExecutionList
from ..guard import never_fails
from . import names, wires

WEIGHTS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf", ".onnx", ".engine")
_NAME_OF_MODEL = re.compile(
    r"(?:.*_)?(?:models?|checkpoint|ckpt|repo|repo_id|repository|hf_id|path|file|filename|name"
    r"|model_id|model_name|model_version|version|variant|preset)\d*",
    re.IGNORECASE,
)
# Inputs of these names choose how a model runs, not which one it is.
_NO_NAME = re.compile(
    r"(?:.*_)?(?:device|dtype|precision|quant\w*|attention|scheduler|sampler\w*|lora\w*|prefix)"
    r"(?:_.*)?",
    re.IGNORECASE,
)


@never_fails("name the models that a node gave", None)
def note(nodes: ExecutionList, node_id: str, found: Iterable[object] = ()) -> None:
    """Names the models that a node has just given, and `found`, which it keeps for itself."""
    given: list[tuple[object, str]] = []
    node_class: Any = graph.class_of(nodes, node_id)
    outputs: Any = getattr(node_class, "RETURN_NAMES", None)
    outputs = outputs or getattr(node_class, "RETURN_TYPES", ())
    for index, values in enumerate(graph.outputs_of(nodes, node_id)):
        inside = wires.find_models([values])
        models = [*inside.modules, *(p.model for p in inside.patchers), *inside.tensor_owners]
        output = str(outputs[index]) if index < len(outputs) else ""
        given += [(model, output) for model in models]
    given += [(model, "") for model in found]
    new = {id(model): (model, out) for model, out in reversed(given) if names.has_none(model)}
    if new:
        _name(list(reversed(new.values())), nodes, node_id)


def _name(models: Sequence[tuple[object, str]], nodes: ExecutionList, node_id: str) -> None:
    """Names what one node gave; where that are several, each says which of them it is."""
    chosen = _chosen(nodes.dynprompt.get_node(node_id)["inputs"])
    node = node_names.of(node_id)
    title = node.title if node is not None and node.has_title else ""
    outputs = [output for _model, output in models]
    classes = [type(model).__name__ for model, _output in models]
    for number, (model, output) in enumerate(models, 1):
        name = chosen or names.own_name(model) or title
        if not name:
            continue
        if len(models) > 1:
            own = type(model).__name__
            of_class = own if classes.count(own) == 1 else f"{own} {number}"
            part = output if output and outputs.count(output) == 1 else of_class
            name = f"{name} · {part}"
        names.give(model, name)


def _chosen(inputs: dict[str, Any]) -> str:
    texts = [
        (key, value.strip())
        for key, value in inputs.items()
        if isinstance(value, str)
        and 0 < len(value.strip()) <= names.LONGEST
        and "\n" not in value
        and not _NO_NAME.fullmatch(key)
    ]
    files = [names.last_part(text) for _key, text in texts if text.lower().endswith(WEIGHTS)]
    if files:
        return " + ".join(dict.fromkeys(files))
    named = [text for key, text in texts if _NAME_OF_MODEL.fullmatch(key)]
    repositories = [found for text in named if (found := names.repository(text))]
    return repositories[0] if repositories else names.last_part(named[0]) if named else ""
