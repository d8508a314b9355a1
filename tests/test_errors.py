"""Errors for bad input or missing resources say what was asked, what is in the way, what to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.model.walk import _visitor_of
from tests.builders.device import GPU, SIMULATED
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

ACTIONS = [qmove.park, qmove.restore, lambda model: qmove.move(model, "cpu")]


@pytest.mark.parametrize(
    "nothing",
    [object(), {}, [], nn.ReLU(), "a path", 7, None],
    ids=lambda thing: type(thing).__name__,
)
@pytest.mark.parametrize("act", ACTIONS, ids=["park", "restore", "move"])
def test_an_object_without_tensors(
    gpu: GPU, act: Callable[[object], object], nothing: object
) -> None:
    with pytest.raises(qmove.NoTensors, match=f"{type(nothing).__name__} holds no tensor"):
        act(nothing)


def test_a_module_that_only_refers_to_others_names_them(gpu: GPU) -> None:
    model = nn.Module()
    object.__setattr__(model, "teacher", layers(1))

    with pytest.raises(qmove.NoTensors, match="teacher"):
        qmove.park(model)


@pytest.mark.parametrize("device", ["cuda:7", "gpu", "cuda:-1", "xpu:0", 9, "", "cuda:0:1"])
def test_an_unknown_device_is_refused_and_the_known_ones_are_named(
    gpu: GPU, device: str | int
) -> None:
    model = layers(1)
    qmove.park(model)

    with pytest.raises(qmove.UnknownDevice, match="cuda:0"):
        qmove.restore(model, device)
    with pytest.raises(qmove.UnknownDevice, match="cpu"):
        qmove.move(model, device)

    assert qmove.is_parked(model)


def test_an_unknown_device_in_a_device_map(gpu: GPU) -> None:
    model = layers(1)
    qmove.park(model)

    with pytest.raises(qmove.UnknownDevice, match="cuda:9"):
        qmove.restore(model, {"": "cuda:9"})

    assert qmove.is_parked(model)


def test_moving_to_meta_is_refused_with_the_way_out(gpu: GPU) -> None:
    with pytest.raises(qmove.UnknownDevice, match=r"qmove\.park"):
        qmove.move(layers(1), "meta")


def test_meta_tensors_point_to_materialize(gpu: GPU) -> None:
    model = nn.Sequential(layers(1), nn.Linear(8, 4, device="meta"))
    before = snapshot(model)

    with pytest.raises(qmove.MetaTensorsPresent, match=r"1\.weight.*materialize_meta_tensors"):
        qmove.park(model)
    with pytest.raises(qmove.MetaTensorsPresent, match=r"1\.weight.*materialize_meta_tensors"):
        qmove.move(model, "cpu")

    assert snapshot(model) == before


class NoFlatten(torch.Tensor):
    """A wrapper subclass whose inner tensor nobody can ask for."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> NoFlatten:
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device
        )

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise RuntimeError("not needed here")


class CapturedGraph(torch.cuda.CUDAGraph):
    """A CUDA graph that needs no capture, and no CUDA build of torch."""

    def __new__(cls) -> CapturedGraph:
        return object.__new__(cls)

    def __init__(self) -> None:
        if not SIMULATED:
            super().__init__()


UNMOVABLE = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "to_dense"),
    "nested": (lambda: torch.nested.as_nested_tensor([torch.ones(2), torch.ones(3)]), "jagged"),
    "quantized by torch itself": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8),
        "torchao",
    ),
    "a wrapper without __tensor_flatten__": (
        lambda: NoFlatten(torch.ones(3)),
        "__tensor_flatten__",
    ),
    "a CUDA graph": (CapturedGraph, "raw addresses"),
}


@pytest.mark.parametrize("kind", UNMOVABLE)
@pytest.mark.filterwarnings(
    "ignore:The PyTorch API of nested tensors:UserWarning", "ignore:.*quantize_per_tensor"
)
def test_what_cannot_be_moved_is_named_with_the_reason_and_nothing_moves(
    gpu: GPU, kind: str
) -> None:
    build, reason = UNMOVABLE[kind]
    model = layers(1, device="cpu")
    model.odd = build()
    before = snapshot(model)

    with pytest.raises(qmove.CannotMove, match=reason) as raised:
        qmove.move(model, "cuda:0")

    assert [name for name, _reason in raised.value.reasons] == ["odd"]
    assert "nothing was moved" in str(raised.value)
    assert snapshot(model) == before


def test_what_cannot_be_moved_hinders_nobody_where_it_is(gpu: GPU) -> None:
    model = layers(1)
    model.table = torch.eye(3).to_sparse()

    assert qmove.park(model).stragglers == []


def test_a_cuda_graph_over_the_weights_stops_a_park(gpu: GPU) -> None:
    model = layers(1)
    model.graph = CapturedGraph()

    with pytest.raises(
        qmove.CannotMove, match=r"graph: a CapturedGraph replays kernels with the raw addresses"
    ):
        qmove.park(model)


@pytest.mark.skipif(not hasattr(torch.accelerator, "Graph"), reason="torch before 2.13")
def test_an_accelerators_graph_is_one_as_well() -> None:
    """`torch.accelerator.Graph` is no CUDAGraph; without a capture none can be made here."""
    assert not issubclass(torch.accelerator.Graph, torch.cuda.CUDAGraph)
    assert _visitor_of(torch.accelerator.Graph) is _visitor_of(torch.cuda.CUDAGraph)


def test_all_errors_are_qmove_errors() -> None:
    errors = [
        value
        for value in vars(qmove).values()
        if isinstance(value, type) and issubclass(value, Exception)
    ]

    assert len(errors) >= 9
    assert all(issubclass(error, qmove.QMoveError) for error in errors)
