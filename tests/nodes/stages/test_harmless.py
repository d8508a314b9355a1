"""Where everything fits nothing moves: with the pack a prompt moves not a byte more than without,
in its first run as in every later one, and ends in the same outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies
from qmove_pack.nodes.host import hooks, listen_to_core
from qmove_pack.nodes.host.stages import executor, needs

import simcuda
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, node
from tests.nodes.builders.fake_host import FakeHost, ModelPatcher
from tests.nodes.conftest import enter

pytestmark = pytest.mark.simulated

Prompt = dict[str, Any]


@dataclass
class Result:
    """What prompts did: bytes that each moved over the link, and their outputs but for models."""

    moved: list[int]
    outputs: list[dict[str, Any]]
    ran: list[list[str]]


def bytes_moved() -> int:
    found = [simcuda.counters(index) for index in range(2)]
    return sum(c.h2d_bytes + c.d2h_bytes + c.d2d_bytes for c in found)


def run(prompts: Sequence[Prompt], *, pack: bool, own: Callable[[], Any] | None = None) -> Result:
    """Runs prompts one after the other in a new host, with the pack or without."""
    careless_nodes.forget_all()
    needs.learned = needs.Needs()
    host = FakeHost()
    host.add(*careless_nodes.ALL)
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(host, monkeypatch)
        if own is not None:
            host.add(own_loader(own()), pack="nodes")
        if pack:
            assert executor.install()
            listen_to_core()
        result = Result([], [], [])
        try:
            for prompt in prompts:
                before = bytes_moved()
                host.ran.clear()
                outputs = host.run(prompt)
                assert host.errors == []
                result.moved.append(bytes_moved() - before)
                result.ran.append(list(host.ran))
                result.outputs.append({k: v for k, v in outputs.items() if k.startswith("out")})
        finally:
            hooks.unwrap_all()
            host.management.current_loaded_models.clear()
            host.cache.entries.clear()
            host.instances.clear()
    return result


def own_loader(patcher: ModelPatcher) -> type:
    """A node of ComfyUI's that loads a model of ComfyUI's own."""

    class LoadOwn(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            import sys

            sys.modules["comfy.model_management"].load_models_gpu([patcher])
            return (patcher,)

    return LoadOwn


def assert_harmless(prompts: Sequence[Prompt], own: Callable[[], Any] | None = None) -> Result:
    without = run(prompts, pack=False, own=own)
    with_pack = run(prompts, pack=True, own=own)
    assert with_pack == without
    return with_pack


def texts(count: int, **inputs: Any) -> Prompt:
    return {f"out{i}": node("Text", text=f"prompt {i}", **inputs) for i in range(count)}


# The cases that were seen in a real ComfyUI, at a tenth of their size ------------------------------


@pytest.fixture
def card_of_4000() -> None:
    simcuda.set_memory(400 * MIB)


@pytest.fixture
def card_of_2000() -> None:
    simcuda.set_memory(200 * MIB)


def test_four_text_nodes_beside_one_model(card_of_4000: None) -> None:
    load = {"load": node("Load", mib=38, shape="plain")}
    use = {"out": node("Use", model=("load", 0), seed=1)}
    assert_harmless([{**load, **use, **texts(4)}] * 2)


def test_comfyuis_own_model(card_of_4000: None) -> None:
    own = {"own": node("LoadOwn"), "load": node("Load", mib=38, shape="plain")}
    use = {"out": node("Use", model=("load", 0), seed=1), "s": node("Scratch", mib=30, seed=1)}
    prompts = [{**own, **use, **texts(n)} for n in (1, 3)]
    assert_harmless(prompts, own=lambda: ModelPatcher(careless_nodes.model_of(40, "cpu")))


def test_a_text_widget_that_changes_each_time(card_of_4000: None) -> None:
    load = {
        "load": node("Load", mib=38, shape="plain"),
        "use": node("Use", model=("load", 0), seed=1),
    }
    prompts = [{**load, "out": node("Text", text=f"run {i}")} for i in range(5)]
    assert assert_harmless(prompts).moved[1:] == [0] * 4


def loop(rounds: int, seed: int) -> Prompt:
    return {
        "load1": node("Load", mib=60, shape="plain"),
        "load2": node("Load", mib=61, shape="plain", after=("load1", 0)),
        "out": node("Loop", first=("load1", 0), second=("load2", 0), rounds=rounds, seed=seed),
    }


def test_a_loop_of_five_over_two_models_and_loops_of_other_lengths(card_of_2000: None) -> None:
    assert_harmless([loop(5, 0), loop(5, 10), loop(7, 20), loop(2, 40)])


def test_two_gpus_a_model_on_the_second_stays_for_a_node_that_uses_the_first(
    card_of_2000: None,
) -> None:
    simcuda.set_memory(100 * MIB, device=1)
    try:
        prompts = [
            {
                "load": node("Load", mib=80, shape="plain", device="cuda:1"),
                "big": node("Load", mib=120, shape="plain", after=("load", 0)),
                "out": node("Use", model=("big", 0), seed=seed),
                "out2": node("Use", model=("load", 0), seed=seed, after=("out", 0)),
            }
            for seed in range(3)
        ]
        assert_harmless(prompts)
    finally:
        simcuda.set_memory("4GiB", device=1)


# Random graphs ------------------------------------------------------------------------------------

MOST_MODELS, MOST_SCRATCH = 60, 30  # MiB; both fit on the card of the random graphs
SMALL_CARD = 128


@strategies.composite
def graphs(draw: strategies.DrawFn) -> list[Prompt]:
    """Prompts over the same loaders, whose models and work fit together."""
    sizes = draw(strategies.lists(strategies.integers(1, 20), min_size=1, max_size=3))
    loads = {
        f"load{i}": node("Load", mib=mib, shape=draw(strategies.sampled_from(SHAPES)))
        for i, mib in enumerate(sizes)
    }
    prompts = []
    for _ in range(draw(strategies.integers(1, 3))):
        prompt: Prompt = dict(loads)
        for index in range(draw(strategies.integers(1, 5))):
            kind = draw(strategies.sampled_from(("Use", "Use", "Scratch", "Text", "Loop")))
            prompt[f"out{index}"] = _node(draw, kind, list(loads), index)
        prompts.append(prompt)
    return prompts


SHAPES = ("plain", "list", "dict", "pipeline")


def _node(draw: strategies.DrawFn, kind: str, loads: list[str], index: int) -> Mapping[str, Any]:
    seed = draw(strategies.integers(0, 1000))
    model = (draw(strategies.sampled_from(loads)), 0)
    after = {"after": (f"out{index - 1}", 0)} if index else {"after": ("load0", 0)}
    if kind == "Use":
        return node("Use", model=model, seed=seed, **after)
    if kind == "Loop":
        other = (draw(strategies.sampled_from(loads)), 0)
        rounds = draw(strategies.integers(1, 3))
        return node("Loop", first=model, second=other, rounds=rounds, seed=seed, **after)
    if kind == "Scratch":
        return node("Scratch", mib=draw(strategies.integers(1, MOST_SCRATCH)), seed=seed, **after)
    return node("Text", text=draw(strategies.text(max_size=20)))


@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(prompts=graphs())
def test_random_graphs_that_fit_move_not_one_byte_more(prompts: list[Prompt]) -> None:
    simcuda.set_memory(SMALL_CARD * MIB)
    assert_harmless(prompts)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(prompts=graphs(), missing=strategies.integers(1, 40))
def test_random_graphs_that_do_not_fit_end_in_the_outputs_of_a_large_card(
    prompts: list[Prompt], missing: int
) -> None:
    simcuda.set_memory(SMALL_CARD * MIB)
    on_a_large_card = run(prompts, pack=False)
    largest = max(n["inputs"].get("mib", 0) for prompt in prompts for n in prompt.values())
    models = [n["inputs"]["mib"] for n in prompts[0].values() if n["class_type"] == "Load"]
    # Room for the two largest models or for one and the largest work, and no more.
    needed = max(sum(sorted(models)[-2:]), max(models) + largest) + 4
    simcuda.set_memory(max(needed, SMALL_CARD - missing - 64) * MIB)
    assert run(prompts, pack=True).outputs == on_a_large_card.outputs
    assert torch.cuda.memory_allocated() == 0
