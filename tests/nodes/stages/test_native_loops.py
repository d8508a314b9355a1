"""ComfyUI's own Start Loop and End Loop: each round has new node ids, and all rounds are there at
once. From the second round on nothing moves where everything fits; else the loop's models go last."""

from __future__ import annotations

from typing import Any

import pytest
from qmove_pack.nodes.host.models import finding
from qmove_pack.nodes.host.panel import history
from qmove_pack.nodes.host.stages import auto_parking, executor

import qmove_core as qmove
import simcuda
from tests.nodes.builders import careless_nodes, native_loop
from tests.nodes.builders.careless_nodes import MIB, model_in, node, noted
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.native_loop import loop

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def _loops(host: FakeHost) -> None:
    careless_nodes.forget_all()
    finding.forget_all()
    simcuda.set_memory(128 * MIB)
    host.add(*careless_nodes.ALL)
    native_loop.add_to(host)


def body(*models: str) -> dict[str, Any]:
    """In each round these models run one after the other."""
    nodes: dict[str, Any] = {}
    after = ("start", 0)
    for number, model in enumerate(models):
        nodes[f"use{number}"] = node("Use", model=(model, 0), seed=number, after=after)
        after = (f"use{number}", 0)
    return nodes


def loads(*mib: int) -> dict[str, Any]:
    return {f"load{i}": node("Load", mib=size + i, shape="plain") for i, size in enumerate(mib)}


def moved() -> int:
    found = simcuda.counters(0)
    return found.h2d_bytes + found.d2h_bytes


def weights(host: FakeHost, name: str) -> int:
    return sum(p.nbytes for p in model_in(host, name).parameters())


def test_it_runs_and_gives_what_its_last_round_gives(host: FakeHost) -> None:
    outputs = host.run(loads(10) | loop(3, body("load0"), ("use0", 0)))

    assert host.errors == []
    alone = host.run(loads(10) | {"use": node("Use", model=("load0", 0), seed=0)})
    assert outputs["end"] == alone["use"]
    assert len(noted("use 0")) == 4
    assert "use0" not in host.ran  # only its copies


def test_where_everything_fits_nothing_moves_in_any_round(host: FakeHost) -> None:
    prompt = loads(50, 50) | loop(5, body("load0", "load1"), ("use1", 0))
    host.run(prompt)
    assert host.errors == []
    before = moved()

    host.run(prompt | loop(6, body("load0", "load1"), ("use1", 0)))

    assert host.errors == []
    assert moved() - before < MIB


def test_where_it_does_not_the_models_of_the_loop_go_last(host: FakeHost) -> None:
    """Two models of the loop fit together, and a third that was used before it does not."""
    prompt = loads(50, 50, 50)
    prompt["use"] = node("Use", model=("load2", 0), seed=9)
    inner = body("load0", "load1")
    prompt |= loop(5, inner, ("use1", 0), first=("use", 0))
    prompt["use2"] = node("Use", model=("load2", 0), seed=10, after=("end", 0))
    host.run(prompt)
    assert host.errors == []
    before = moved()

    host.run(prompt | {"use": node("Use", model=("load2", 0), seed=11)})

    assert host.errors == []
    # One of the loop comes home for it, the third again after it; copies out are true already.
    assert moved() - before <= 2 * weights(host, "load2") + MIB


def test_what_its_nodes_need_is_known_in_the_second_round(host: FakeHost) -> None:
    """By class and values, not by the node's id, which is new in each round."""
    inner = {"work": node("Scratch", mib=100, seed=1, after=("start", 0))}
    prompt = loads(50) | loop(3, inner, ("work", 0), first=("load0", 0))
    host.run(prompt)
    assert host.errors == []
    host.ran.clear()

    host.run(loads(50) | {"use": node("Use", model=("load0", 0), seed=1)} | loop(4, inner, ("work", 0), first=("use", 0)))  # fmt: skip

    assert host.errors == []
    rounds = [name for name in host.ran if name.endswith(" work")]
    assert len(rounds) == 4  # none ran out of memory and twice
    assert qmove.is_parked(model_in(host, "load0"))


def test_a_loop_in_a_loop(host: FakeHost) -> None:
    inner = {
        "start2": node("StartLoop", rounds=2, first=("start", 0))
        | {"_loop_body": ["use0"], "_loop_end": "end2"},
        "use0": node("Use", model=("load0", 0), seed=0, after=("start2", 0)),
        "end2": node("EndLoop", value=("use0", 0)),
    }
    outputs = host.run(loads(60, 60) | loop(2, inner, ("end2", 0), first=("load1", 0)))

    assert host.errors == []
    assert len(noted("use 0")) == 4
    assert outputs["end"]


def test_a_node_that_is_taken_away_while_it_waits_leaves_nothing_behind(host: FakeHost) -> None:
    """It has expanded, was put back, and is never completed."""
    seen: list[set[str]] = []

    class Expands(careless_nodes._Node):
        def run(self) -> dict[str, Any]:
            inner = {"a": node("Inhibits", of="wait"), "b": node("Look", after=("a", 0))}
            return {"result": [["b", 0]], "expand": inner}

    class Inhibits(careless_nodes._Node):
        HIDDEN = ("execution_list",)

        def run(self, of: str, execution_list: Any) -> tuple[Any]:
            execution_list.inhibit_nodes([of])
            return (1,)

    class Look(careless_nodes._Node):
        def run(self, after: Any = None) -> tuple[Any]:
            nodes = executor.running_graph()
            if after == 1:  # what Inhibits gave
                seen.append(set(executor._runs[nodes].unfinished))  # type: ignore[index]
            auto_parking.order_to_park(nodes, None, auto_parking.in_use)
            return (1,)

    host.add(Expands, Inhibits, Look)
    host.run(loads(10, 10) | {"wait": node("Expands"), "look": node("Look", after=("load0", 0))})

    assert host.errors == []
    assert seen == [{"wait.0.0.b"}]
    assert len(executor._runs) == 0
    assert {stage["node"] for stage in history.last_run()["stages"]} == set(host.ran)  # type: ignore[index]


def test_an_error_in_a_round_leaves_everything_ready_for_the_next_run(host: FakeHost) -> None:
    inner = body("load0") | {"fail": node("Fail", model=("load0", 0), after=("use0", 0))}
    host.run(loads(50) | loop(3, inner, ("fail", 0)))
    assert [type(error) for error in host.errors] == [ValueError]
    assert len(executor._runs) == 0

    host.run(loads(50) | loop(3, body("load0"), ("use0", 0)))
    assert host.errors == []
