"""ComfyUI's own Start Loop and End Loop, as the fake host has them: from the contract.

When Start runs, it puts a copy of the loop's body into the prompt for each round, all at once, and
takes the original nodes away (`inhibit_nodes`). The copies have new ids; Start is their parent, and
the original is what people see. End waits for a block from outside, which the node behind the last
round releases. Start itself is done at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from .careless_nodes import node
from .fake_host import FakeHost, is_link


class StartLoop:
    FUNCTION = "run"
    ALWAYS_RUNS = True
    HIDDEN = ("dynprompt", "execution_list", "unique_id")
    RETURN_TYPES = ("INT", "*")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"rounds": ("INT", {}), "first": ("*", {})}}

    def run(
        self,
        rounds: int,
        dynprompt: Any,
        execution_list: Any,
        unique_id: str,
        first: Any = None,
    ) -> dict[str, Any]:
        start = dynprompt.get_node(unique_id)
        body, end = start["_loop_body"], start["_loop_end"]
        nodes, result = self._rounds(dynprompt, unique_id, body, end, rounds)
        nodes["result"] = node("LoopResult", end_id=end, value=result)
        inputs = dynprompt.get_node(end)["inputs"]
        execution_list.add_external_block(end)
        execution_list.inhibit_nodes(body)
        left = {name: value for name, value in inputs.items() if name not in ("value", "carry")}
        dynprompt.override_node(end, {"class_type": "EndLoop", "inputs": left})
        execution_list.blocking.setdefault(end, {})
        return {"result": [None, None], "expand": nodes}

    def _rounds(
        self, dynprompt: Any, start_id: str, body: list[str], end: str, rounds: int
    ) -> tuple[dict[str, Any], Any]:
        carried = dynprompt.get_node(start_id)["inputs"].get("first")
        inputs_of_end = dynprompt.get_node(end)["inputs"]
        nodes: dict[str, Any] = {}
        result: Any = None
        before: dict[str, Any] = {}
        for number in range(rounds):
            opener = f"{number} round"
            nodes[opener] = node("LoopIteration", number=number, carried=carried, **before)
            nodes[opener]["display"] = start_id

            def copied(value: Any, number: int = number, opener: str = opener) -> Any:
                if not is_link(value):
                    return value
                if value[0] == start_id:
                    return [opener, value[1]]
                return [f"{number} {value[0]}", value[1]] if value[0] in body else value

            for name in body:
                original = dynprompt.get_node(name)
                nodes[f"{number} {name}"] = {
                    **original,
                    "inputs": {key: copied(v) for key, v in original["inputs"].items()},
                    "display": name,
                }
                if "_loop_end" in original:  # a loop in it: its nodes are copies too
                    of_round = f"{start_id}.0.0.{number} "
                    nodes[f"{number} {name}"] |= {
                        "_loop_body": [of_round + inner for inner in original["_loop_body"]],
                        "_loop_end": of_round + original["_loop_end"],
                    }
            result = copied(inputs_of_end["value"])
            carried = copied(inputs_of_end.get("carry"))
            before = {"after": result}
        return nodes, result


class LoopIteration:
    FUNCTION = "run"
    RETURN_TYPES = ("INT", "*")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"number": ("INT", {})}}

    def run(self, number: int, carried: Any = None, after: Any = None) -> tuple[Any, Any]:
        return number, carried


class LoopResult:
    FUNCTION = "run"
    HIDDEN = ("execution_list",)
    OUTPUT_NODE = True
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"end_id": ("STRING", {}), "value": ("*", {})}}

    def run(self, end_id: str, value: Any, execution_list: Any) -> tuple[()]:
        execution_list.release_external_block(end_id, (value,))
        return ()


class EndLoop:
    FUNCTION = "run"
    HIDDEN = ("execution_list", "unique_id")
    RETURN_TYPES = ("*",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"value": ("*", {})}}

    def run(self, execution_list: Any, unique_id: str, **_inputs: Any) -> Any:
        return execution_list.released_with(unique_id)


def add_to(host: FakeHost) -> None:
    host.add(StartLoop, LoopIteration, LoopResult, EndLoop, pack="comfy_extras.nodes_loop")


def loop(
    rounds: int, body: Mapping[str, Any], value: tuple[str, int], **inputs: Any
) -> dict[str, Any]:
    """A prompt's nodes for a loop over `body`, whose nodes begin with one linked to ("start", 0).

    The loop gives `value` of its last round as ("end", 0).
    """
    start = node("StartLoop", rounds=rounds, **inputs)
    start |= {"_loop_body": sorted(body), "_loop_end": "end"}
    return {"start": start, **body, "end": node("EndLoop", value=value)}
