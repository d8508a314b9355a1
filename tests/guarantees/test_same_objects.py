"""What is put back is the very value that was there: the same objects, the same classes, in the
same order.

A round trip takes something away from each of these objects (a flag, a table, a hook, a wrapped
method) and puts it back. Odd values stand in the places that are taken away: 1 is not True, and
None is not the same as nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes as bnb
import numpy
import pytest
import torch
from bitsandbytes.functional import name2qmap
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.dispatched_models import SPREAD, dispatched


class Text(str):
    pass


class Map(dict):  # type: ignore[type-arg]
    pass


ABSENT: Any = type("ABSENT", (), {"__repr__": lambda self: "absent"})()
FLAGS = [1, True, numpy.bool_(True), 0, False, numpy.bool_(False), None, ABSENT]
ODD = [*FLAGS, Text("x"), Text(""), Map(a=1), Map(), numpy.float64(0.0)]
odd_flags = pytest.mark.parametrize("value", FLAGS, ids=lambda v: f"{type(v).__name__} {v!r}")
odd_values = pytest.mark.parametrize("value", ODD, ids=lambda v: f"{type(v).__name__} {v!r}")


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def put(obj: Any, name: str, value: Any) -> None:
    """Gives an attribute its odd value, or none, at the place in the `__dict__` where it stands."""
    if value is ABSENT:
        obj.__dict__.pop(name, None)
    else:
        obj.__dict__[name] = value


class Objects:
    """Everything in the `__dict__`s of a model's modules, parameters, quant states and hook
    registries."""

    def __init__(self, model: Any) -> None:
        self.found = {
            name: (obj, type(obj), list(obj.__dict__.items())) for name, obj in _parts(model)
        }

    def assert_same(self) -> None:
        for name, (obj, cls, attributes) in self.found.items():
            assert type(obj) is cls, name
            now = obj.__dict__
            assert list(now) == [key for key, _value in attributes], name
            changed = [key for key, value in attributes if now[key] is not value]
            assert not changed, f"{name}: {changed}"


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(model, nn.Module):
        yield "pipeline", model
        return
    for name, module in model.named_modules():
        yield name, module
        for slot, parameter in [*module._parameters.items(), *module._buffers.items()]:
            if parameter is not None:
                yield f"{name}.{slot}", parameter
                state, depth = getattr(parameter, "quant_state", None), 0
                while state is not None:
                    yield f"{name}.{slot}.quant_state{depth}", state
                    state, depth = state.state2, depth + 1
        if "state" in module.__dict__:
            yield f"{name}.state", module.state
        if "_diffusers_hook" in module.__dict__:
            registry = module._diffusers_hook
            yield f"{name}._diffusers_hook", registry
            yield from ((f"{name} {key}", hook) for key, hook in registry.hooks.items())
            yield from ((f"{name} fn {i}", fn) for i, fn in enumerate(registry._fn_refs))


def linear_4bit(device: str = "cuda") -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(64, 32, compute_dtype=torch.float16, quant_type="nf4")
    return layer.half().eval().to(device)


def linear_8bit() -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0)
    return layer.half().eval().cuda()


# Parking --------------------------------------------------------------------------------------------


@odd_values
def test_a_parked_module_keeps_its_attributes(gpu: GPU, value: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8)).cuda()
    for name in ("forward", "note", "_hf_hook", "device"):
        put(model[0], name, value)
    objects = Objects(model)
    qmove.park(model)
    qmove.restore(model)
    objects.assert_same()


def test_a_parked_module_is_woken_by_a_forward_that_counts_as_false(gpu: GPU) -> None:
    class Forward(list):  # type: ignore[type-arg]
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    model = nn.Linear(8, 8).cuda()
    model.__dict__["forward"] = Forward()
    qmove.park(model)
    assert torch.equal(model.forward(torch.ones(2)), torch.full((2,), 2.0))
    assert not qmove.is_parked(model)


# bitsandbytes -------------------------------------------------------------------------------------


def park_and_restore(model: Any) -> None:
    qmove.park(model)
    qmove.restore(model)


def move_and_return(model: Any) -> None:
    qmove.move(model, "cpu")
    qmove.move(model, "cuda")


@pytest.mark.parametrize("round_trip", [park_and_restore, move_and_return])
@odd_flags
def test_the_packing_flag_comes_back_as_it_was(
    gpu: GPU, value: Any, round_trip: Callable[[Any], None]
) -> None:
    layer = linear_4bit()
    put(layer, "support_avx512bf16_for_cpu", value)
    objects = Objects(layer)
    round_trip(layer)
    objects.assert_same()


@odd_flags
def test_a_packing_flag_that_was_changed_at_home_stays_changed(gpu: GPU, value: Any) -> None:
    layer = linear_4bit()
    put(layer, "support_avx512bf16_for_cpu", 1)
    park_and_restore(layer)
    put(layer, "support_avx512bf16_for_cpu", value)
    objects = Objects(layer)
    park_and_restore(layer)
    objects.assert_same()


@pytest.mark.parametrize("value", [1, 0, None, numpy.bool_(True)])
def test_a_packing_flag_that_was_changed_while_away_stays_changed(gpu: GPU, value: Any) -> None:
    layer = linear_4bit()
    put(layer, "support_avx512bf16_for_cpu", True)
    qmove.park(layer)
    layer.support_avx512bf16_for_cpu = value
    qmove.restore(layer)
    assert layer.support_avx512bf16_for_cpu is value


@pytest.mark.parametrize("table_on", ["cpu", "cuda"])
def test_a_shared_table_and_what_stands_in_for_it_come_back(
    gpu: GPU, table_on: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantization table that all models share never moves: where it is not, a twin stands in for
    it."""
    layer = linear_4bit()
    monkeypatch.setitem(name2qmap, "dynamic", layer.quant_state.state2.code.to(table_on))
    layer.quant_state.state2.code = name2qmap["dynamic"]
    if table_on == "cpu":
        move_and_return(layer)  # from now on a twin stands on the GPU
        assert layer.quant_state.state2.code is not name2qmap["dynamic"]
    objects = Objects(layer)
    for _ in range(2):
        park_and_restore(layer)
        objects.assert_same()
        assert layer.quant_state.state2.code.device.type == "cuda"


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


# Methods, and layers of another class -------------------------------------------------------------


@odd_values
@pytest.mark.parametrize("name", ["to", "cpu", "half", "materialize"])
def test_methods_that_a_model_had_come_back(gpu: GPU, name: str, value: Any) -> None:
    model = nn.Linear(4, 4)
    put(model, name, value)
    before = dict(model.__dict__)
    qmove.disable_to(qmove.enable_to(model))
    assert type(model) is nn.Linear
    assert model.__dict__.keys() == before.keys()
    assert all(model.__dict__[key] is kept for key, kept in before.items())


def quantize_again(model: Any) -> None:
    qmove.dequantize_and_move(model, "cpu")
    qmove.move_and_requantize(model, "cuda")


@pytest.mark.parametrize(
    "slot", ["compute_type_is_set", "support_avx512bf16_for_cpu", "dtype", "compute_dtype", "note"]
)
@odd_values
def test_a_4_bit_layer_is_quantized_again_with_what_it_had(gpu: GPU, slot: str, value: Any) -> None:
    model = nn.Sequential(linear_4bit())
    put(model[0], slot, value)
    before = list(model[0].__dict__.items())
    quantize_again(model)
    assert type(model[0]) is bnb.nn.Linear4bit
    _assert_as_before(model[0], before, new={"quant_state"})


@pytest.mark.parametrize(
    "slot", ["threshold", "has_fp16_weights", "use_pool", "note", "is_training"]
)
@odd_values
def test_an_8_bit_layer_is_quantized_again_with_what_it_had(
    gpu: GPU, slot: str, value: Any
) -> None:
    model = nn.Sequential(linear_8bit())
    put(model[0].state, slot, value)
    before, state = list(model[0].__dict__.items()), list(model[0].state.__dict__.items())
    quantize_again(model)
    assert type(model[0]) is bnb.nn.Linear8bitLt
    _assert_as_before(model[0], before, new={"state"})
    _assert_as_before(model[0].state, state, new={"CB", "SCB"})


def _assert_as_before(obj: Any, before: list[tuple[str, Any]], new: set[str]) -> None:
    now = obj.__dict__
    assert list(now) == [name for name, _value in before]
    assert not [name for name, value in before if name not in new and now[name] is not value]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_a_layer_of_quanto_is_quantized_again_as_it_was(gpu: GPU, requires_grad: bool) -> None:
    quanto = pytest.importorskip("optimum.quanto")
    model = nn.Sequential(nn.Linear(128, 128)).cuda()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    model.requires_grad_(requires_grad)
    before = list(model[0].__dict__.items())
    quantize_again(model)
    _assert_as_before(model[0], before, new=set())
    assert model[0].weight.requires_grad is requires_grad


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit])
def test_a_layer_that_cannot_change_stays_as_it_was(
    gpu: GPU, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nn.Sequential(make())
    model[0].forward = functools.partial(type(model[0]).forward, model[0])
    qmove.enable_to(model[0])
    objects = Objects(model)

    def fails(*arguments: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr("qmove_core.requantize.requantize.move", fails)
        qmove.dequantize_and_move(model, "cpu")
    objects.assert_same()


@pytest.mark.parametrize("make", [linear_4bit, linear_8bit])
def test_a_forward_of_ones_own_survives_dequantizing(gpu: GPU, make: Any) -> None:
    """accelerate keeps the forward that its hook replaces; only the class's own one changes with
    the class."""
    model = nn.Sequential(make())

    def forward(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return x

    mine = forward.__get__(model[0])
    model[0].__dict__["forward"] = mine
    quantize_again(model)
    assert model[0].__dict__["forward"] is mine
