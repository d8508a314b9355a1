"""No sequence of ordinary PyTorch on a parked model gives another result than on one that was never
parked, but for a qmove error that says what to do.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.ordinary_pytorch import USES, Net, image, rows
from tests.builders.places import place_of

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]


def seen(result: Any) -> Any:
    """What is compared: values, and all that a tensor says of itself."""
    if isinstance(result, torch.Tensor):
        values = result.detach().cpu().clone().to(torch.complex128).tolist()
        facts = (str(result.device), result.dtype, result.stride(), result.requires_grad)
        return (*facts, result.__class__, repr(values))
    if isinstance(result, dict):
        return {name: seen(value) for name, value in result.items()}
    if isinstance(result, (tuple, list)):
        return [seen(item) for item in result]
    return result


def lives(model: nn.Module) -> dict[str, Any]:
    return {
        name: (tensor.device, tensor.dtype, tensor.shape, tensor.__class__, tensor.requires_grad)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


@pytest.mark.parametrize("how", ["parked", "arriving", "restored"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_sequence_gives_what_it_gives_on_a_model_that_was_never_parked(
    gpu: GPU, second_gpu: GPU, use: Callable[[Net], Any], how: str
) -> None:
    twin, model = Net(), Net()
    qmove.park(model)
    if how != "parked":
        qmove.restore(model, stream=how == "arriving")
    assert seen(use(model)) == seen(use(twin))
    assert seen(model(image())) == seen(twin(image()))
    qmove.restore(model)
    streaming.wait_for()
    assert lives(model) == lives(twin)
    assert seen(model.state_dict()) == seen(twin.state_dict())
    tensors = [*model.parameters(), *model.buffers()]
    assert not any("_qmove_variant" in type(tensor).__dict__ for tensor in tensors)
    assert not qmove.park(model).stragglers
    assert seen(model(image())) == seen(twin(image()))


def test_a_graph_that_was_made_on_the_host_is_refused_with_what_to_do(gpu: GPU) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(_context: Any, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

        @staticmethod
        def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * 2

    model = layers(1).requires_grad_(True)
    qmove.park(model)
    made = Doubled.apply(model[0].weight)
    with pytest.raises(qmove.QMoveError, match=r"Call qmove\.restore\(model\) before it"):
        inputs() @ made
    qmove.restore(model)
    (inputs() @ Doubled.apply(model[0].weight)).sum().backward()
    assert model[0].weight.grad.device.type == "cuda"


def test_a_kernel_of_the_device_is_given_the_address_there(gpu: GPU) -> None:
    """Others compare addresses, to see what is tied, and leave the model parked."""
    model = layers(2)
    qmove.park(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    assert len(set(addresses)) == 4 and qmove.is_parked(model)
    launcher = types.ModuleType("triton.launcher")
    exec("def launch(tensor): return tensor.data_ptr()", launcher.__dict__)
    address = launcher.launch(model[0].weight)
    assert place_of(model[0].weight) == "cuda"
    assert address == model[0].weight.data_ptr() not in addresses


@pytest.mark.parametrize("tensor", ["argument", "closure"])
def test_a_function_is_traced_over_a_parked_weight(gpu: GPU, tensor: str) -> None:
    twin, model = layers(1), layers(1)
    qmove.park(model)
    if tensor == "argument":
        traced = torch.jit.trace(lambda x, w: x @ w, (inputs(), model[0].weight))
        assert torch.equal(traced(inputs(), model[0].weight), inputs() @ twin[0].weight)
    else:
        traced = torch.jit.trace(lambda x: x @ model[0].weight, (inputs(),))
        assert torch.equal(traced(inputs()), inputs() @ twin[0].weight)


def test_functions_of_pytorch_are_wrapped_once_and_only_look_at_what_is_away(gpu: GPU) -> None:
    for _ in range(2):
        qmove.park(layers(1))
    swap = torch.utils.swap_tensors
    assert not hasattr(swap.__wrapped__, "__wrapped__")
    one, other = torch.ones(2), torch.zeros(2)
    swap(one, other)
    assert (one.sum(), other.sum()) == (0, 2)
    assert torch.equal(torch.func.grad(lambda x: (x * rows()).sum())(rows()), rows())


# Compilers ----------------------------------------------------------------------------------------


class Stack(nn.Sequential):
    """With code of its own: what PyTorch's are made of is not compiled by itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def stack() -> Stack:
    return Stack(*layers(2))


FULL: dict[str, Callable[[Any], Any]] = {
    "module": lambda model: torch.compile(model, backend="eager", fullgraph=True)(inputs()),
    "part": lambda model: torch.compile(model[0], backend="eager", fullgraph=True)(inputs()),
    "function with a weight": lambda model: torch.compile(
        lambda x: x @ model[0].weight, backend="eager", fullgraph=True)(inputs()),
    "function of a weight": lambda model: torch.compile(
        lambda x, w: x @ w, backend="eager", fullgraph=True)(inputs(), model[0].weight),
    "function with a module": lambda model: torch.compile(
        lambda x: model(x) + 1, backend="eager", fullgraph=True)(inputs()),
    "ahead of time": lambda model: torch.compile(
        model, backend="aot_eager", fullgraph=True)(inputs()),
    "in place": lambda model: (
        model.compile(backend="eager", fullgraph=True), model(inputs()))[1],
    "one of two branches": lambda model: torch.compile(lambda x: torch.cond(
        x.sum() > 0, lambda x: model[0](x), lambda x: model[1](x), (x,)),
        backend="eager", fullgraph=True)(inputs()),
    "exported": lambda model: torch.export.export(model, (inputs(),)).module()(inputs()),
    "make_fx": lambda model: sys.modules["torch.fx.experimental.proxy_tensor"].make_fx(
        lambda x: model(x))(inputs())(inputs()),
}  # fmt: skip


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("how", ["parked", "arriving"])
@pytest.mark.parametrize("use", FULL.values(), ids=FULL.keys())
def test_a_whole_graph_is_made_of_a_parked_model(
    gpu: GPU, use: Callable[[Any], Any], how: str
) -> None:
    import torch._dynamo
    import torch.fx.experimental.proxy_tensor  # noqa: F401

    twin, model = stack(), stack()
    expected = seen(use(twin))
    for _ in range(2):
        qmove.park(model)
        if how == "arriving":
            qmove.restore(model, stream=True)
        assert seen(use(model)) == expected
        assert seen(use(model)) == expected


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("kind", ["module", "function"])
def test_parking_again_and_again_compiles_nothing_anew(gpu: GPU, kind: str) -> None:
    graphs = 0

    def backend(graph: Any, _inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    model = stack()
    compiled: Any = torch.compile(
        model if kind == "module" else lambda x: model(x) + 1, backend=backend
    )
    expected = compiled(inputs())
    for _ in range(2):
        qmove.park(model)
        assert torch.equal(compiled(inputs()), expected)
    before = graphs
    for _ in range(10):
        qmove.park(model)
        assert torch.equal(compiled(inputs()), expected)
    assert graphs == before
