"""Streaming restore: a weight that is used in any way, by anybody, waits for its bytes first."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qmove_core as qmove
from qmove_core import homes
from qmove_core.parking import sleeping, streaming
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.odd_models import BUILDERS
from tests.builders.snapshots import snapshot, traces
from tests.builders.streaming import is_arriving, pickled, saved, stream_in

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("tried_out")]


def raw_bytes(model: nn.Module) -> bytes:
    """What somebody's own kernel finds behind `data_ptr()`; the simulated device's memory lies on
    the host."""
    import ctypes

    return ctypes.string_at(model[3].weight.data_ptr(), model[3].weight.nbytes)


USES: dict[str, Callable[[Any], Any]] = {
    "matmul": lambda model: inputs() @ model[3].weight.T,
    "keyword": lambda model: F.linear(inputs(), weight=model[3].weight, bias=model[3].bias),
    "in a list": lambda model: torch.cat([model[2].weight, model[3].weight]),
    "in a dict": lambda model: torch.func.functional_call(
        nn.Linear(64, 64), {"weight": model[3].weight, "bias": model[3].bias}, inputs()
    ),
    "foreach": lambda model: torch._foreach_mul(list(model.parameters()), 2.0)[6],
    "index": lambda model: model[3].weight[3, 5],
    "rows": lambda model: next(iter(model[3].weight)),
    "item": lambda model: model[3].bias[0].item(),
    "tolist": lambda model: model[3].bias.tolist(),
    "repr": lambda model: repr(model[3].bias),
    "data": lambda model: model[3].weight.data + 0,
    "detach": lambda model: model[3].weight.detach().clone(),
    "to the host": lambda model: model[3].weight.cpu(),
    "in place": lambda model: model[3].weight.mul_(2).clone(),
    "in place through data": lambda model: (model[3].weight.data.mul_(2), model[3].weight.clone())[
        1
    ],
    "comparison": lambda model: model[3].weight > 0,
    "data_ptr": raw_bytes,
    "storage": lambda model: bytes(model[3].weight.untyped_storage().cpu().tolist()[:64]),
    "dlpack": lambda model: torch.from_dlpack(model[3].weight).clone(),
    "state_dict": lambda model: model.state_dict()["3.weight"].clone(),
    "saved": lambda model: saved(model.state_dict())["3.weight"],
    "saved module": lambda model: saved(model)[3].weight,
    "pickled tensor": lambda model: pickled(model[3].weight),
    "pickled module": lambda model: pickled(model)[3].weight,
    "copied tensor": lambda model: copy.copy(model[3].weight),
    "deep copied tensor": lambda model: copy.deepcopy(model[3].weight),
    "deep copied module": lambda model: copy.deepcopy(model)[3].weight,
    "half": lambda model: model.half()[3].weight,
    "vector": lambda model: nn.utils.parameters_to_vector(model.parameters()),
    "vmap": lambda model: torch.vmap(lambda row: row * 2)(model[3].weight),
    "gradient": lambda model: torch.autograd.functional.vjp(
        lambda x: x @ model[3].weight, inputs(), inputs()
    )[1],
}


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_whoever_uses_a_weight_outside_its_module_waits_for_it(
    gpu: GPU, use: Callable[[Any], Any]
) -> None:
    expected = use(layers(4))
    model = layers(4)
    qmove.park(model)
    stream_in(model)

    result = use(model)

    if isinstance(expected, torch.Tensor):
        assert type(result) is type(expected)
        assert torch.equal(result, expected)
    else:
        assert result == expected
    assert type(model[3].weight) is nn.Parameter


@pytest.mark.parametrize(
    "make_copy", [copy.deepcopy, pickled, saved], ids=["deepcopy", "pickle", "save"]
)
def test_a_copy_of_a_model_that_arrives_is_an_ordinary_one(
    gpu: GPU, make_copy: Callable[[Any], Any]
) -> None:
    model = layers(3)
    model[1].weight.note = "a Parameter's deepcopy drops it, its pickle does not"
    expected, ordinary = model(inputs()), traces(make_copy(model), identities=False)
    qmove.park(model)
    stream_in(model)
    made = make_copy(model)
    assert traces(made, identities=False) == ordinary
    assert torch.equal(made(inputs()), expected)
    assert torch.equal(model(inputs()), expected)


class Scaled(nn.Parameter):
    """A Parameter subclass with its own idea of operators."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        return result * 2 if func is torch.Tensor.sum else result


class Final(nn.Parameter):
    def __init_subclass__(cls) -> None:
        raise TypeError("Final is final")


class Slotted(torch.Tensor):
    __slots__ = ("note",)


@pytest.mark.parametrize(
    "kind", [Scaled, Final, Slotted, nn.Buffer], ids=lambda kind: kind.__name__
)
def test_tensor_subclasses_keep_their_class_and_their_ways(gpu: GPU, kind: Any) -> None:
    model = layers(2)
    content = model[1].weight.data.clone()
    weight = content.as_subclass(Slotted) if kind is Slotted else kind(content)
    del model[1].weight
    model[1].weight = weight.requires_grad_(False)
    expected, result = model[1].weight.sum().clone(), model(inputs())
    qmove.park(model)
    stream_in(model)
    assert isinstance(model[1].weight, kind)
    assert torch.equal(model[1].weight.sum(), expected)
    assert type(model[1].weight) is (torch.Tensor if kind is nn.Buffer else kind)
    assert torch.equal(model(inputs()), result)


@pytest.mark.usefixtures("singly")
def test_tied_weights_and_views_wait_for_the_bytes_that_they_share(gpu: GPU) -> None:
    model = layers(3)
    model[2].weight = model[0].weight
    model.register_buffer("row", model[1].weight[3])
    outside = model[1].weight[4]
    uses = [lambda: model(inputs()), lambda: model.row.clone(), lambda: outside.clone()]
    expected = [use() for use in uses]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        qmove.park(model)
        stream_in(model)
        for index in order:
            assert torch.equal(uses[index](), expected[index])
        assert model[2].weight is model[0].weight
        assert model.row.untyped_storage()._cdata == model[1].weight.untyped_storage()._cdata


def test_hooks_see_weights_that_are_there(gpu: GPU) -> None:
    model = layers(3)
    seen: list[float] = []
    model[2].register_forward_pre_hook(
        lambda module, _inputs: seen.append(module.weight.sum().item())
    )
    model.register_forward_pre_hook(
        lambda module, _inputs: seen.append(module[1].weight.sum().item())
    )
    model(inputs())
    expected = seen[:]
    seen.clear()
    qmove.park(model)
    stream_in(model)
    model(inputs())
    assert seen == expected


@pytest.mark.usefixtures("singly")
def test_two_threads_use_a_model_that_arrives(gpu: GPU) -> None:
    model = layers(8)
    expected = [layer(inputs()) for layer in model]
    together = threading.Barrier(2)

    def call(order: Any, results: dict[int, Any]) -> None:
        together.wait()
        for index in order:
            results[index] = model[index](inputs())

    for _ in range(5):
        qmove.park(model)
        stream_in(model)
        found: list[dict[int, Any]] = [{}, {}]
        threads = [
            threading.Thread(target=call, args=(range(8), found[0])),
            threading.Thread(target=call, args=(range(7, -1, -1), found[1])),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for results in found:
            assert [torch.equal(results[index], expected[index]) for index in range(8)] == [
                True
            ] * 8
        assert not is_arriving()


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("inside_inference_mode", [False, True])
def test_everything_is_as_it_was(
    gpu: GPU, build: Callable[[], nn.Module], inside_inference_mode: bool
) -> None:
    model = build()
    before, quiet = snapshot(model), traces(model)
    for _ in range(2):
        with torch.inference_mode(inside_inference_mode):
            qmove.park(model)
            qmove.restore(model, stream=True)
        streaming.wait_for()
        assert snapshot(model) == before
        assert traces(model) == quiet


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_of_inference_tensors_streams(gpu: GPU, mode: Any) -> None:
    with torch.inference_mode():
        model = layers(3)
    with mode():
        expected = model(inputs())
        qmove.park(model)
        stream_in(model)
        assert torch.equal(model(inputs()), expected)
    assert model[0].weight.is_inference()
    assert qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("order", ["registered", "backwards"])
def test_after_the_last_byte_nothing_is_left_on_the_model(gpu: GPU, order: str) -> None:
    model = layers(4)
    before = traces(model)
    qmove.park(model)
    stream_in(model)
    assert traces(model) != before
    for layer in model if order == "registered" else reversed(model):
        layer(inputs())
    streaming.wait_for()
    assert traces(model) == before
    assert not is_arriving()
    assert not sleeping._wakers
    assert not any(origin.arrival for origin in homes._origins.values())
    gc.collect()
    assert not any(type(thing).__name__ in ("Arrival", "_Part") for thing in gc.get_objects())
