"""Between stages: what a node is given is home before it runs, and nothing runs again because of
qmove."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
from typing import Any

import pytest
import torch
from qmove_pack.nodes.host import comfy, hooks, settings
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.stages import auto_parking, executor, job_queue

import qmove_core as qmove
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import model_in, noted
from tests.nodes.builders.fake_host import DynamicPrompt, FakeHost
from tests.nodes.builders.guarded import Guarded

node = careless_nodes.node


@pytest.fixture(autouse=True)
def _nodes(request: pytest.FixtureRequest) -> None:
    careless_nodes.forget_all()
    for name in ("host", "forgetful_host"):
        if name in request.fixturenames:
            request.getfixturevalue(name).add(*careless_nodes.ALL)


@pytest.mark.parametrize("shape", ["plain", "list", "dict", "pipeline"])
@pytest.mark.parametrize("switch", [True, False])
def test_the_second_run_of_a_workflow_whose_loader_is_cached_just_works(
    host: FakeHost, gpu: GPU, shape: str, switch: bool
) -> None:
    settings.change({settings.AUTO_PARK: switch})
    prompt = {"a": node("Load", mib=16, shape=shape), "b": node("Use", model=("a", 0), seed=1)}
    first = host.run(prompt)["b"]
    qmove.park(model_in(host, "a"))
    assert gpu.allocated() == 0

    prompt["b"]["inputs"]["seed"] = 2
    host.run(prompt)
    prompt["b"]["inputs"]["seed"] = 1
    again = host.run(prompt)["b"]

    assert again == first
    assert [device for device, _allocated in noted("use 2")] == ["cuda:0"]
    assert host.ran == ["a", "b", "b", "b"]


def test_a_node_that_is_cached_brings_nothing_home(host: FakeHost, gpu: GPU) -> None:
    prompt = {"a": node("Load", mib=16, shape="plain"), "b": node("Use", model=("a", 0), seed=1)}
    host.run(prompt)
    qmove.park(model_in(host, "a"))

    host.run(prompt)

    assert host.ran == ["a", "b"]
    assert gpu.allocated() == 0


def test_both_models_of_a_node_are_home(host: FakeHost) -> None:
    prompt = {
        "a": node("Load", mib=16, shape="plain"),
        "b": node("Load", mib=17, shape="dict"),
        "c": node("Both", first=("a", 0), second=("b", 0)),
    }
    host.run({name: prompt[name] for name in ("a", "b")})
    qmove.park([model_in(host, "a"), model_in(host, "b")])

    host.run(prompt)

    assert noted("both") == [["cuda:0", "cuda:0"]]


def test_a_model_that_comes_through_no_wire_wakes_when_it_is_used(host: FakeHost, gpu: GPU) -> None:
    hidden = careless_nodes.model_of(16)
    (adopted,) = residency.take_in([hidden])
    residency.park([adopted])

    class Hidden:
        FUNCTION = "run"

        def run(self) -> tuple[Any]:
            return (hidden(torch.zeros(1, hidden[0].in_features, device="cuda:0")).sum().item(),)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {}

    host.add(Hidden)
    host.run({"a": node("Hidden")})

    assert host.errors == []
    assert gpu.allocated() == adopted.resident[gpu.device] > 0
    assert [line.model.model for line in host.management.current_loaded_models] == [hidden]


def test_with_everything_off_no_model_is_even_looked_for(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.change({settings.AUTO_PARK: False})

    def look(*_arguments: Any) -> None:
        raise AssertionError("qmove looked at a node although it is off")

    for name in ("prepare", "finish"):
        monkeypatch.setattr(auto_parking, name, look)
    host.run(careless_nodes.stages(1, 16))

    assert host.errors == []
    assert host.management.requests == []


def test_a_failure_of_qmove_fails_no_prompt_and_is_logged_once(
    host: FakeHost,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    guarded: Guarded,
) -> None:
    guarded.expect("prepare for a node", "look at what a node gave")

    def fail(*_arguments: Any) -> None:
        raise LookupError(f"a fault of qmove's own in {host.old}")

    monkeypatch.setattr(auto_parking, "prepare", fail)
    monkeypatch.setattr(auto_parking, "finish", fail)
    with caplog.at_level(logging.ERROR, "qmove"):
        host.run(careless_nodes.stages(2, 16))

    assert host.errors == []
    assert len(noted("use 2")) == 1
    assert (
        len([record for record in caplog.records if "fault of qmove's own" in record.getMessage()])
        == 2
    )  # one a hook


def test_a_request_waits_for_the_node_that_runs_also_where_qmove_could_not_prepare_for_it(
    host: FakeHost, monkeypatch: pytest.MonkeyPatch, guarded: Guarded
) -> None:
    guarded.expect("prepare for a node")
    answers: list[tuple[bool, Any]] = []

    class Ask(careless_nodes.Scratch):
        def run(self, **_inputs: Any) -> tuple[Any]:  # type: ignore[override]
            answers.append(job_queue.run_or_queue(lambda: "done"))
            return (1,)

    def fail(*_arguments: Any) -> None:
        raise LookupError("a fault of qmove's own")

    monkeypatch.setattr(auto_parking, "prepare", fail)
    host.add(Ask)
    host.run({"ask": node("Ask", mib=1)})

    assert answers == [(False, None)]


def test_a_host_that_runs_nodes_in_another_way_is_left_alone_and_the_log_says_so(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    hooks.unwrap_all()
    untouched = host.list_class.complete_node_execution
    del host.list_class.stage_node_execution

    assert not executor.install()

    assert "another way" in caplog.text
    assert host.list_class.complete_node_execution is untouched


def hooked(host: FakeHost) -> list[Any]:
    return [
        host.list_class.stage_node_execution,
        host.list_class.complete_node_execution,
        host.executor_class.handle_execution_error,
        host.execution.get_output_data,
    ]


def test_hooks_are_put_in_once_and_come_out_again(host: FakeHost) -> None:
    ours = hooked(host)
    assert executor.install()
    assert hooked(host) == ours
    originals = [method.__wrapped__ for method in ours]

    hooks.unwrap_all()

    assert hooked(host) == originals


WRAPPERS_OF_OTHERS = {
    "plain": lambda original: lambda *args, **kwargs: original(*args, **kwargs),
    "with functools.wraps": lambda original: functools.wraps(original)(
        lambda *args, **kwargs: original(*args, **kwargs)
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS_OF_OTHERS)
@pytest.mark.parametrize("owner", ["list_class", "executor_class", "execution"])
def test_what_another_pack_has_wrapped_before_is_followed_all_the_same(
    host: FakeHost, owner: str, wrapper: str, caplog: pytest.LogCaptureFixture
) -> None:
    hooks.unwrap_all()
    names = {
        "list_class": ["stage_node_execution", "complete_node_execution"],
        "executor_class": ["handle_execution_error"],
        "execution": ["get_output_data"],
    }[owner]
    of = getattr(host, owner)
    for name in names:
        setattr(of, name, WRAPPERS_OF_OTHERS[wrapper](getattr(of, name)))

    assert executor.install()
    host.run(careless_nodes.stages(1, 16))

    assert caplog.text == ""
    assert host.errors == []
    assert host.management.current_loaded_models != []  # it was seen and listed


def test_functions_of_the_host_with_other_parameters_are_not_followed(
    host: FakeHost, caplog: pytest.LogCaptureFixture
) -> None:
    """Each switches off what needs it, says so once, and the rest works."""

    async def get_output_data(prompt_id: str, node: Any) -> Any: ...

    get_output_data.__module__ = host.execution.__name__
    hooks.unwrap_all()
    original, host.execution.get_output_data = host.execution.get_output_data, get_output_data
    try:
        assert executor.install()
        assert host.execution.get_output_data is get_output_data
        assert "does not run again" in caplog.text
    finally:
        host.execution.get_output_data = original
    host.run(careless_nodes.stages(1, 16))
    assert host.errors == []


def test_a_hook_that_another_pack_has_wrapped_stays_below_it(host: FakeHost) -> None:
    ours = host.list_class.complete_node_execution

    @functools.wraps(ours)
    def of_another_pack(self: Any) -> Any:
        return ours(self)

    host.list_class.complete_node_execution = of_another_pack

    hooks.unwrap_all()

    assert host.list_class.complete_node_execution is of_another_pack


def test_a_host_that_keeps_no_outputs_leaves_nothing_in_memory(
    forgetful_host: FakeHost, gpu: GPU
) -> None:
    prompt = careless_nodes.stages(3, 16)
    first = forgetful_host.run(prompt)["use3"]
    gc.collect()
    assert gpu.allocated() == 0

    again = forgetful_host.run(prompt)["use3"]

    assert again == first
    assert qmove.stats().arena_bytes == 0
    assert forgetful_host.management.current_loaded_models == []


def test_a_node_that_raises_leaves_every_model_whole(host: FakeHost) -> None:
    prompt = careless_nodes.stages(2, 16)
    first = host.run(prompt)["use2"]
    prompt["fail"] = node("Fail", model=("load1", 0), after=("use2", 0))

    host.run(prompt)

    assert [str(error) for error in host.errors] == ["the node fails on purpose"]
    del prompt["fail"]
    for seed in ("1", "2"):
        prompt[f"use{seed}"]["inputs"]["seed"] = int(seed)
    assert host.run(prompt)["use2"] == first


def test_a_node_that_is_staged_again_to_collect_its_results_brings_nothing_home(
    host: FakeHost, gpu: GPU
) -> None:
    """An async node, or one that expanded into others: it has run already."""
    prompt = {
        "load": node("Load", mib=16, shape="plain"),
        "use": node("Use", model=("load", 0), seed=1),
    }
    host.run({"load": prompt["load"]})
    nodes = host.list_class(DynamicPrompt(prompt), host.cache, host.classes)
    nodes.add_node("use")
    asyncio.run(nodes.stage_node_execution())
    nodes.staged_node_id = None  # the host puts it back until its results are there
    residency.park(residency.idle_models([]))

    asyncio.run(nodes.stage_node_execution())

    assert gpu.allocated() == 0


def test_comfyuis_own_models_are_not_adopted(host: FakeHost) -> None:
    from tests.nodes.builders.fake_host import ModelPatcher

    patcher = ModelPatcher(careless_nodes.model_of(16, "cpu"))

    class LoadOwn:
        FUNCTION = "run"

        def run(self) -> tuple[Any]:
            vae = type("VAE", (), {})()
            vae.patcher, vae.first_stage_model = patcher, patcher.model
            return (vae,)

        @classmethod
        def INPUT_TYPES(cls) -> dict[str, Any]:
            return {}

    host.add(LoadOwn, pack="nodes")
    host.run({"a": node("LoadOwn"), "b": node("Both", first=("a", 0), second=("a", 0))})

    assert residency.idle_models([]) == []
    assert comfy.running_node() is None
