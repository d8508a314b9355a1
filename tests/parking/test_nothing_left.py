"""What qmove holds of a model, and what it can clear, is gone when it is said to be gone."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory import arena
from qmove_core.parking import streaming
from qmove_core.transfer import transaction
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.streaming import is_arriving, stream_in

pytestmark = pytest.mark.simulated


def test_what_autocast_keeps_of_a_model_leaves_with_it(gpu: GPU) -> None:
    empty = gpu.allocated()
    model = layers(3, width=256).requires_grad_(True)  # it keeps casts of what needs a gradient
    x = inputs(256)
    with torch.autocast("cuda", torch.float16), torch.no_grad():
        expected = model(x).cpu()
        parked = qmove.park(model)
        assert gpu.allocated() == empty + x.nbytes and not parked.stragglers
        assert torch.equal(model(x).cpu(), expected)


def test_trim_ends_what_arrives_and_gives_its_ram_back(gpu: GPU) -> None:
    qmove.configure(keep_mirrors=False)
    model = layers(4, width=512)
    expected = model(inputs(512))
    qmove.park(model)
    stream_in(model)
    model[0](inputs(512))  # the rest of it is never used
    held = arena.bytes_in_use()
    assert held > 0
    qmove.trim()
    assert arena.bytes_in_use() == 0 and not is_arriving()
    assert torch.equal(model(inputs(512)), expected)


@pytest.mark.usefixtures("singly")
def test_a_model_that_is_deleted_while_it_arrives_keeps_nothing(gpu: GPU) -> None:
    empty = gpu.allocated()
    model = layers(4, width=512)
    model[3].weight = model[0].weight
    qmove.park(model)
    stream_in(model)
    del model
    assert (gpu.allocated(), arena.bytes_in_use()) == (empty, 0)
    streaming.wait_for()
    assert not is_arriving()


def test_an_error_while_an_arrival_ends_holds_nothing(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers(4, width=512)
    expected = model(inputs(512))
    qmove.park(model)
    stream_in(model)

    def fails(_jobs: Any, **_options: Any) -> None:
        raise RuntimeError("planted")

    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="planted"):
        patched.setattr(streaming, "keep_as_mirrors", fails)
        streaming.wait_for()
    assert not is_arriving() and transaction.keep_as_mirrors is streaming.keep_as_mirrors
    assert torch.equal(model(inputs(512)), expected)
    gc.collect()
    assert arena.bytes_in_use() == 0
    nbytes = qmove.inventory(model).nbytes
    del model, expected
    gc.collect()
    assert nbytes and gpu.allocated() == 0


class _Scripted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = layers(2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.layers(x)
        return y * 2 if bool(y.sum() > 1e9) else y


def _frozen() -> nn.Module:
    return torch.jit.freeze(torch.jit.script(_Scripted().eval()))  # type: ignore[no-any-return]


def _trace_over(model: nn.Module) -> Any:
    """Its weights are constants, as they belong to no module of it."""

    class Closing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.addmm(bias, x, weight)

    weight, bias = list(model.parameters())[:2]
    # The module of a check lives as long as the process, with constants of its own.
    return torch.jit.trace(Closing(), inputs(), check_trace=False)


SCRIPTS: dict[str, Any] = {
    "frozen": _frozen,
    "frozen in a module": lambda: nn.Sequential(_frozen(), *layers(1)),
    "frozen for inference": lambda: torch.jit.optimize_for_inference(_frozen()),
    "traced over weights": lambda: _trace_over(layers(2)),
}


@pytest.mark.parametrize("calls", [0, 4], ids=["never ran", "optimized by runs"])
@pytest.mark.parametrize("build", SCRIPTS.values(), ids=SCRIPTS.keys())
def test_constants_of_torchscript_leave_and_come_home(gpu: GPU, build: Any, calls: int) -> None:
    empty = gpu.allocated()
    model, x = build(), inputs()
    expected = None
    for _ in range(calls):
        expected = model(x).cpu()
    gc.collect()
    held = gpu.allocated() - empty - x.nbytes
    assert held > 0
    for _ in range(2):
        parked = qmove.park(model)
        assert (gpu.allocated() - empty - x.nbytes, parked.stragglers) == (0, [])
        result = model(x).cpu()
        assert expected is None or torch.equal(result, expected)
        assert gpu.allocated() - empty - x.nbytes == held
        expected = result


def _holder_of_a_function() -> dict[str, Any]:
    weight = torch.ones(64, 64, device="cuda")
    traced = torch.jit.trace(lambda x: x @ weight, (inputs(),))
    return {"function": traced, "other": weight.clone()}


def test_constants_of_a_function_in_torchscript_leave_too(gpu: GPU) -> None:
    gc.collect()
    empty, holder = gpu.allocated(), _holder_of_a_function()
    expected = holder["function"](inputs()).cpu()
    gc.collect()
    assert gpu.allocated() > empty
    parked = qmove.park(holder)
    assert gpu.allocated() == empty and not parked.stragglers
    parked.restore()
    assert torch.equal(holder["function"](inputs()).cpu(), expected)
