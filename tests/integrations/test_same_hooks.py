"""Hooks that are taken off and put back: the same objects, the same values, in the same order. See
test_same_objects.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.dispatched_models import SPREAD, dispatched
from tests.builders.same_objects import (
    ABSENT,
    Objects,
    Text,
    linear_4bit,
    linear_8bit,
    odd_flags,
    odd_values,
    put,
)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


# accelerate ---------------------------------------------------------------------------------------


def materialize_and_return(model: Any) -> None:
    with qmove.materialized(model):
        pass


DISPATCH_SLOTS = ["hf_device_map", "_old_forward", "forward", "to", "cuda", "note"]


@pytest.mark.parametrize("slot", DISPATCH_SLOTS)
@odd_values
def test_a_dispatch_comes_back_as_it_was(
    tmp_path: Path, gpu: GPU, second_gpu: GPU, slot: str, value: Any
) -> None:
    model = dispatched(tmp_path, SPREAD)
    put(model, slot, value)
    model.note_behind = object()
    objects = Objects(model)
    materialize_and_return(model)
    objects.assert_same()


def test_what_was_set_meanwhile_stays(tmp_path: Path, gpu: GPU, second_gpu: GPU) -> None:
    model = dispatched(tmp_path, SPREAD)
    model.note = 1
    order = list(model.__dict__)
    with qmove.materialized(model):
        model.note = changed = Text("changed")
        model.new = None
    assert model.note is changed
    assert list(model.__dict__) == [*order, "new"]


def test_a_hook_of_somebody_else_in_a_row_of_hooks_comes_back(tmp_path: Path, gpu: GPU) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    accelerate.cpu_offload(model, execution_device=gpu.device)
    for hook in (accelerate.hooks.ModelHook(), accelerate.hooks.ModelHook()):
        accelerate.hooks.add_hook_to_module(model[0], hook, append=True)
    objects = Objects(model)
    materialize_and_return(model)
    objects.assert_same()


def test_a_parked_graph_module_gets_its_hook_back_and_wakes(gpu: GPU) -> None:
    """accelerate replaces the `forward` of a GraphModule's class, which is not the class of a
    parked one."""
    model = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))).cuda()
    x = torch.ones(2, 8, device="cuda")
    expected = model(x)
    accelerate.hooks.add_hook_to_module(
        model, accelerate.hooks.AlignDevicesHook(execution_device=gpu.device)
    )
    forward = type(model).forward
    qmove.park(model)
    with qmove.materialized(model):
        assert torch.equal(model(x), expected)
        assert type(model).forward is not forward
        qmove.park(model)
    assert torch.equal(model(x), expected)
    assert not qmove.is_parked(model)
    assert type(model).forward is forward


@pytest.mark.parametrize("names", [("CB",), ("SCB",), ("CB", "SCB"), ()])
def test_what_hangs_on_an_offloaded_8_bit_weight_comes_back(
    gpu: GPU, names: tuple[str, ...]
) -> None:
    model = nn.Sequential(linear_8bit())
    qmove.move(model, "cpu")
    accelerate.cpu_offload(model, execution_device=gpu.device)
    for name in names:
        put(model[0].weight, name, ABSENT)
        put(model[0].state, name, ABSENT)
    objects = Objects(model)
    materialize_and_return(model)
    objects.assert_same()


@odd_flags
def test_what_hangs_on_an_offloaded_4_bit_weight_comes_back(gpu: GPU, value: Any) -> None:
    model = nn.Sequential(linear_4bit())
    qmove.move(model, "cpu")
    accelerate.cpu_offload(model, execution_device=gpu.device)
    put(model[0].weight, "bnb_quantized", value)
    put(model[0].quant_state, "note", value)
    objects = Objects(model)
    materialize_and_return(model)
    objects.assert_same()


# diffusers ----------------------------------------------------------------------------------------


def group_offloaded() -> nn.Module:
    hooks = pytest.importorskip("diffusers.hooks")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)).eval().requires_grad_(False)
    hooks.apply_group_offloading(model, torch.device("cuda:0"), offload_type="leaf_level")
    return model


@odd_values
def test_group_offload_comes_back_as_it_was(gpu: GPU, value: Any) -> None:
    model = group_offloaded()
    layer = model[0]
    layer.note = value
    hook = next(iter(layer._diffusers_hook.hooks.values()))
    if value is not ABSENT:
        hook.fn_ref = value  # nothing of this is qmove's
    objects = Objects(model)
    materialize_and_return(model)
    objects.assert_same()


def test_group_offload_beside_other_hooks_comes_back(gpu: GPU) -> None:
    from diffusers.hooks import ModelHook

    model = group_offloaded()
    registry = model[0]._diffusers_hook
    registry.register_hook(ModelHook(), "somebody's")
    objects = Objects(model)
    orders = list(registry.hooks.items()), list(registry._hook_order), list(registry._fn_refs)
    materialize_and_return(model)
    objects.assert_same()
    assert orders == (list(registry.hooks.items()), registry._hook_order, registry._fn_refs)


@odd_values
def test_what_a_pipeline_notes_about_offloading_comes_back(gpu: GPU, value: Any) -> None:
    class Pipeline:
        def __init__(self) -> None:
            self.components = {"model": group_offloaded()}
            self._all_hooks = value
            self.hf_device_map = value
            self.last = None

    pipe = Pipeline()
    for name in ("_all_hooks", "hf_device_map"):
        put(pipe, name, value)
    objects = Objects(pipe)
    materialize_and_return(pipe)
    objects.assert_same()
