"""Where nothing can move: inside the capture of a graph, and on a device that is lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.errors import may_spoil_the_device
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


def wake(model: torch.nn.Module) -> object:
    return model(torch.ones(1, 64, device="cuda"))


MOVES: dict[str, tuple[bool, Callable[[Any], Any]]] = {  # whether it is parked before
    "park": (False, qmove.park),
    "move": (False, lambda model: qmove.move(model, "cpu")),
    "restore": (True, qmove.restore),
    "restore streaming": (True, lambda model: qmove.restore(model, stream=True)),
    "prefetch": (True, qmove.prefetch),
    "wake": (True, wake),
    "swap": (False, lambda model: qmove.swap(model, waiting[0])),
}
waiting: list[torch.nn.Module] = []


@pytest.fixture(autouse=True)
def a_parked_model() -> Any:
    waiting[:] = [layers(2)]
    qmove.park(waiting[0])
    yield
    waiting.clear()


@pytest.mark.parametrize("name", MOVES)
def test_inside_a_capture_a_move_is_refused_and_the_capture_goes_on(gpu: GPU, name: str) -> None:
    is_parked, act = MOVES[name]
    model, copies = layers(2), []
    before = snapshot(model)
    if is_parked:
        qmove.park(model)
    with simcuda.capturing(), simcuda.on_copy(copies.append):
        with pytest.raises(qmove.CapturingGraph, match=r"captures a graph.* Restore the model bef"):
            act(model)
        assert torch.cuda.is_current_stream_capturing()
    assert copies == [] and simcuda.last_error() == 0
    assert qmove.is_parked(model) == is_parked
    qmove.restore(model)
    assert snapshot(model) == before


def test_a_model_that_arrives_is_not_waited_for_inside_a_capture(gpu: GPU) -> None:
    model = layers(2)
    before = snapshot(model)
    qmove.park(model)
    qmove.restore(model, stream=True)
    with simcuda.capturing(), pytest.raises(qmove.CapturingGraph):
        wake(model)
    wake(model)
    assert snapshot(model) == before


def test_a_resident_model_is_used_inside_a_capture_as_ever(gpu: GPU) -> None:
    model = layers(2)
    with simcuda.capturing():
        qmove.restore(model)
        wake(model)


@pytest.mark.parametrize("name", MOVES)
def test_on_a_lost_device_a_move_says_so_and_what_is_parked_is_whole(gpu: GPU, name: str) -> None:
    is_parked, act = MOVES[name]
    model = layers(2)
    before = snapshot(model)
    if is_parked:
        qmove.park(model)
    with simcuda.lost_context(0):
        with pytest.raises(
            qmove.QMoveError, match=r"can use cuda:0 no more \(CUDA error: an illeg"
        ):
            if name == "wake":
                qmove.restore(model)  # as a wake does; the input's own device is lost as well
            else:
                act(model)
        if is_parked:
            state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if is_parked:
        assert qmove.is_parked(model)
        assert [p.tolist() for p in model.parameters()] == [t.tolist() for t in state.values()]
    qmove.restore(model)
    assert snapshot(model) == before


def test_a_device_that_is_lost_while_a_model_arrives(gpu: GPU) -> None:
    model = layers(2)
    before = snapshot(model)
    qmove.park(model)
    qmove.restore(model, stream=True)
    with simcuda.lost_context(0), pytest.raises(qmove.DeviceLost, match="Restart the program"):
        list(map(torch.Tensor.tolist, model.parameters()))
    assert qmove.is_parked(model)
    qmove.restore(model)
    assert snapshot(model) == before


def test_an_illegal_access_of_one_copy_is_no_lost_device(gpu: GPU) -> None:
    """Only a device that fails again is lost."""
    model = layers(2)
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with simcuda.fail("copy", error=error), pytest.raises(torch.AcceleratorError):
        qmove.park(model)
    qmove.park(model)


@pytest.mark.parametrize(
    ("text", "spoils"),
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA", True),
        ("HIP error: unspecified launch failure", True),
        ("CUDA error: uncorrectable ECC error encountered", True),
        ("CUDA error: out of memory", False),
        ("CUDA error: invalid argument", False),
        ("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasLtMatmul`", False),
    ],
)
def test_which_errors_may_spoil_a_device(text: str, spoils: bool) -> None:
    assert may_spoil_the_device(RuntimeError(text)) == spoils
    assert not may_spoil_the_device(qmove.QMoveError(text))
    assert not may_spoil_the_device(KeyboardInterrupt(text))
