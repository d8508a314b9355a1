"""Wrapper subclasses (torchao, optimum-quanto, our own): outer tensors without bytes around inner
tensors that have them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nested._internal.nested_tensor import NestedTensor

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import quanto_layers, torchao_layers
from tests.builders.places import place_of, places
from tests.builders.snapshots import snapshot

FORMATS: dict[str, Callable[[], nn.Module]] = {
    **{
        f"torchao {kind}": lambda kind=kind: torchao_layers(kind)
        for kind in ("int8", "int4", "float8", "nf4")
    },
    **{
        f"quanto {kind}": lambda kind=kind: quanto_layers(kind)
        for kind in ("qint8", "qint4", "qint2", "qfloat8")
    },
}
every_format = pytest.mark.parametrize("build", FORMATS.values(), ids=FORMATS.keys())


class Scaled(torch.Tensor):
    """`data * scale`: a wrapper subclass as one writes it by hand. `data` may be one as well."""

    @staticmethod
    def __new__(cls, data: torch.Tensor, scale: torch.Tensor) -> Scaled:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, data.shape, strides=data.stride(), dtype=scale.dtype, device=data.device
        )

    def __init__(self, data: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale = data, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner", "scale"], None

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any
    ) -> Scaled:
        return cls(inner["inner"], inner["scale"])

    def dequantize(self) -> torch.Tensor:
        data = self.inner.dequantize() if isinstance(self.inner, Scaled) else self.inner
        return data.to(self.scale.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].inner.detach(), args[0].scale.detach())
        args, kwargs = torch.utils._pytree.tree_map_only(
            Scaled, Scaled.dequantize, (args, kwargs or {})
        )
        return func(*args, **kwargs)


class Unbuildable(Scaled):
    """Like optimum-quanto's AWQPackedTensor, whose `__tensor_unflatten__` raises."""

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], context: None, size: Any, stride: Any
    ) -> Scaled:
        raise AssertionError("only on CUDA")


def scaled(cls: type[Scaled] = Scaled, rows: int = 8) -> Scaled:
    data = torch.arange(rows * 16, device="cuda", dtype=torch.int8).reshape(rows, 16)
    return cls(data, torch.full((16,), 0.5, device="cuda"))


def holder(tensor: torch.Tensor) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(tensor, requires_grad=False)
    return model


def jagged() -> torch.Tensor:
    parts = [torch.ones(2, 3, device="cuda"), torch.ones(4, 3, device="cuda")]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def dequantized(model: nn.Module) -> list[torch.Tensor]:
    # NF4Tensor.dequantize is a lookup in its table; the whole tensor has another name there
    weights = [layer.weight for layer in model]
    return [getattr(w, "get_original_weight", w.dequantize)().detach().cpu() for w in weights]


@every_format
def test_a_parked_format_leaves_no_byte_behind_and_says_it_is_on_the_cpu(gpu: GPU, build) -> None:  # type: ignore[no-untyped-def]
    before = gpu.allocated()
    model = build()
    expected = dequantized(model)

    parked = qmove.park(model)

    assert gpu.allocated() == before
    assert parked.stragglers == []
    assert places(model) == {"cpu"}
    assert all(
        torch.equal(now, then) for now, then in zip(dequantized(model), expected, strict=True)
    )


@every_format
def test_a_format_comes_back_as_it_was_with_equal_outputs(gpu: GPU, build) -> None:  # type: ignore[no-untyped-def]
    model = build()
    dtype = model[0].bias.dtype
    inputs = torch.linspace(-1, 1, 256, device="cuda", dtype=dtype).reshape(2, 128)
    with torch.no_grad():
        expected = model(inputs)
    before, allocated = snapshot(model), gpu.allocated()

    qmove.park(model)
    assert gpu.allocated() < allocated
    qmove.restore(model)

    assert snapshot(model) == before
    assert gpu.allocated() == allocated
    with torch.no_grad():
        assert torch.equal(model(inputs), expected)


@every_format
def test_a_parked_format_wakes_in_its_forward(gpu: GPU, build) -> None:  # type: ignore[no-untyped-def]
    model = build()
    inputs = torch.linspace(-1, 1, 256, device="cuda", dtype=model[0].bias.dtype).reshape(2, 128)
    with torch.no_grad():
        expected = model(inputs)
        qmove.park(model)
        assert torch.equal(model(inputs), expected)
    assert model[0].weight.device == gpu.device


@every_format
def test_weak_references_stay_alive_and_parameters_the_same_objects(gpu: GPU, build) -> None:  # type: ignore[no-untyped-def]
    model = build()
    weights = list(model.parameters())
    references = [weakref.ref(weight) for weight in weights]

    qmove.park(model)
    assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
    assert all(reference() is weight for reference, weight in zip(references, weights, strict=True))

    qmove.restore(model)
    assert all(now is then for now, then in zip(model.parameters(), weights, strict=True))
    assert all(reference() is weight for reference, weight in zip(references, weights, strict=True))


@every_format
def test_a_format_moved_to_the_cpu_runs_there(gpu: GPU, build) -> None:  # type: ignore[no-untyped-def]
    model = build()
    before = snapshot(model)
    inputs = torch.linspace(-1, 1, 256, dtype=model[0].bias.dtype).reshape(2, 128)

    qmove.move(model, "cpu")

    with torch.no_grad():
        assert model(inputs).device.type == "cpu"
    qmove.move(model, "cuda:0")
    assert snapshot(model) == before


@pytest.mark.parametrize("requires_grad", [False, True])
def test_wrappers_in_wrappers_in_wrappers(gpu: GPU, requires_grad: bool) -> None:
    before = gpu.allocated()
    model = nn.Module()
    nested = Scaled(
        Scaled(scaled(), torch.full((16,), 3.0, device="cuda")),
        torch.full((16,), 7.0, device="cuda"),
    )
    model.weight = nn.Parameter(nested, requires_grad)
    model.weight.grad = scaled(rows=8) if requires_grad else None
    del nested
    then, value = snapshot(model), model.weight.dequantize().cpu()

    qmove.park(model)
    levels = [
        model.weight,
        model.weight.inner,
        model.weight.inner.inner,
        model.weight.inner.inner.inner,
    ]
    assert [place_of(level) for level in levels] == ["cpu"] * 4
    assert torch.equal(model.weight.dequantize(), value)
    assert gpu.allocated() == before

    qmove.restore(model)
    assert [level.device for level in levels] == [gpu.device] * 4
    assert torch.equal(model.weight.dequantize().cpu(), value)
    assert snapshot(model) == then


def test_an_inner_tensor_that_was_met_under_another_name_before(gpu: GPU) -> None:
    model = nn.Sequential(holder(scaled()))
    model.register_buffer("shared", model[0].weight.inner)
    before = snapshot(model)

    qmove.park(model)
    assert model.shared is model[0].weight.inner
    assert (place_of(model.shared), place_of(model[0].weight)) == ("cpu", "cpu")

    qmove.restore(model)
    assert snapshot(model) == before
    assert before["shared"][3] == ("shared", "0.weight.inner")


def test_two_wrappers_around_one_inner_tensor(gpu: GPU) -> None:
    first = scaled()
    model = nn.ModuleList(
        [holder(first), holder(Scaled(first.inner, torch.ones(16, device="cuda")))]
    )
    del first
    before = snapshot(model)

    qmove.park(model)
    assert places(model) == {"cpu"}
    assert model[0].weight.inner.data_ptr() == model[1].weight.inner.data_ptr()

    qmove.restore(model)
    assert snapshot(model) == before


def test_a_transposed_wrapper_keeps_its_strides(gpu: GPU) -> None:
    whole = scaled()
    model = holder(Scaled(whole.inner.t(), torch.full((8,), 0.5, device="cuda")))
    del whole
    before = snapshot(model)
    assert model.weight.stride() == (1, 16)

    qmove.park(model)
    assert model.weight.stride() == (1, 16)
    qmove.restore(model)

    assert snapshot(model) == before


@pytest.mark.parametrize("moved_in_inference_mode", [False, True])
def test_wrappers_that_are_inference_tensors(gpu: GPU, moved_in_inference_mode: bool) -> None:
    with torch.inference_mode():
        model = nn.ModuleList([holder(scaled()), torchao_layers("int8"), quanto_layers("qint4")])
    assert all(parameter.is_inference() for parameter in model.parameters())
    before = snapshot(model)

    with torch.inference_mode(moved_in_inference_mode):
        qmove.park(model)
        assert places(model) == {"cpu"}
        qmove.restore(model)

    assert snapshot(model) == before


def test_a_wrapper_comes_home_to_another_device(gpu: GPU, second_gpu: GPU) -> None:
    model = torchao_layers("int8")
    expected = dequantized(model)
    qmove.park(model)

    qmove.restore(model, "cuda:1")

    assert {parameter.device for parameter in model.parameters()} == {second_gpu.device}
    assert all(
        torch.equal(now, then) for now, then in zip(dequantized(model), expected, strict=True)
    )


def test_a_wrapper_that_cannot_be_unflattened_moves_all_the_same(gpu: GPU) -> None:
    model = holder(scaled(Unbuildable))
    before = snapshot(model)

    qmove.park(model)
    assert places(model) == {"cpu"}
    qmove.restore(model)

    assert snapshot(model) == before


def test_quantos_packing_for_awq_kernels_moves_though_it_refuses_the_host(gpu: GPU) -> None:
    from optimum.quanto.tensor.weights.awq import AWQPackedTensor

    values = torch.randint(0, 16, (64, 64), dtype=torch.uint8, device="cuda")
    model = {"packed": AWQPackedTensor.pack(values)}
    before = snapshot(model)

    qmove.park(model)
    assert place_of(model["packed"]._data) == place_of(model["packed"]) == "cpu"
    qmove.restore(model)

    assert snapshot(model) == before
    assert torch.equal(model["packed"].unpack(), values)


def tile_packed() -> torch.Tensor:
    from torchao.quantization.quantize_.workflows.int4.int4_tile_packed_to_4d_tensor import (
        Int4TilePackedTo4dTensor,
    )

    packed = torch.arange(16 * 32 * 4, dtype=torch.int32, device="cuda").reshape(16, 1, 32, 4)
    scales = torch.ones(1, 128, 2, dtype=torch.bfloat16, device="cuda")
    return Int4TilePackedTo4dTensor(packed, scales, [1, 128], torch.Size([128, 128]))


def test_int4_packed_for_cuda_kernels_is_parked_exactly_and_not_moved_to_run_on_the_cpu(
    gpu: GPU,
) -> None:
    model = nn.ModuleList([holder(tile_packed())])
    before = snapshot(model)

    with pytest.raises(
        qmove.CannotMove,
        match=r"0\.weight: Int4TilePackedTo4dTensor is packed for the kernels of cuda",
    ):
        qmove.move(model, "cpu")
    assert snapshot(model) == before

    qmove.park(model)
    with pytest.raises(qmove.CannotMove, match="Int4TilePackedTo4dTensor"):
        qmove.move(model, "cpu")
    qmove.restore(model)
    assert snapshot(model) == before


# As torchao had them up to 0.13 (dtypes/uintx, dtypes/floatx): what `__tensor_flatten__` names.
OLD_TORCHAO = {
    "TensorCoreTiledAQTTensorImpl": ("packed_weight", "scale_and_zero"),
    "GemliteAQTTensorImpl": ("packed_weight", "scale", "zero_point"),
    "MarlinSparseAQTTensorImpl": ("int_data", "scale", "zero", "meta"),
    "MarlinQQQAQTTensorImpl": ("int_data", "s_group", "s_channel"),
    "Int4PackedTensorImpl": ("int_data", "scale"),
    "FloatxTensorCoreAQTTensorImpl": ("packed_floatx_data", "scale"),
}


class Flat(torch.Tensor):
    """A wrapper around the tensors that `inner` names."""

    inner: tuple[str, ...] = ()

    def __new__(cls, *tensors: torch.Tensor) -> Flat:
        return torch.Tensor._make_wrapper_subclass(
            cls, (64, 64), dtype=torch.bfloat16, device=tensors[0].device
        )

    def __init__(self, *tensors: torch.Tensor) -> None:
        for name, tensor in zip(self.inner, tensors, strict=True):
            setattr(self, name, tensor)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return list(self.inner), None

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict, _context: None, _size: object, _stride: object
    ) -> Flat:  # type: ignore[type-arg]
        return cls(*inner.values())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        raise NotImplementedError(f"{func} on {cls.__name__}")


@pytest.mark.parametrize("name", [*OLD_TORCHAO, "PlainAQTTensorImpl"])
def test_what_old_torchao_packed_for_kernels_is_parked_and_not_moved_to_run_on_the_cpu(
    gpu: GPU, name: str
) -> None:
    inner = OLD_TORCHAO.get(name, ("int_data", "scale", "zero_point"))
    impl_class = type(name, (Flat,), {"inner": inner})
    outer_class = type("AffineQuantizedTensor", (Flat,), {"inner": ("tensor_impl",)})
    parts = [torch.full((64, 64), i, dtype=torch.uint8, device="cuda") for i in range(len(inner))]
    model = {"weight": outer_class(impl_class(*parts))}

    qmove.park(model)
    assert {part.device for part in parts} == {torch.device("cuda:0")}, "it says its home"
    assert {p.untyped_storage().device.type for p in parts} == {"cpu"} and gpu.allocated() == 0
    qmove.restore(model)
    assert [int(part[0, 0]) for part in parts] == list(range(len(inner)))
    if name in OLD_TORCHAO:
        with pytest.raises(qmove.CannotMove, match=f"weight.*{name} is packed for the kernels"):
            qmove.move(model, "cpu")
        assert gpu.allocated() == 64 * 64 * len(inner)
    else:
        qmove.move(model, "cpu")
        assert model["weight"].device.type == "cpu" and gpu.allocated() == 0


def test_jagged_nested_tensors(gpu: GPU) -> None:
    before = gpu.allocated()
    model = {"nested": jagged()}
    shape, then = model["nested"].shape, snapshot(model)

    qmove.park(model)
    assert gpu.allocated() == before
    assert place_of(model["nested"]) == "cpu"
    assert (model["nested"] * 2).values().sum() == 36

    qmove.restore(model)
    assert snapshot(model) == then
    assert model["nested"].device == gpu.device
    assert model["nested"].shape == shape
    assert (model["nested"] * 2).values().sum() == 36


def test_a_wrapper_that_fails_on_the_way_leaves_all_where_they_were(gpu: GPU, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    model = {"first": scaled(), "second": jagged(), "third": torchao_layers("int8")}
    before, allocated = snapshot(model), gpu.allocated()

    def broken(*args: object) -> None:
        raise ValueError("no such layout")

    with monkeypatch.context() as patched:
        patched.setattr(NestedTensor, "__tensor_unflatten__", broken)
        with pytest.raises(
            qmove.CannotMove, match=r"NestedTensor.*ValueError: no such layout"
        ) as caught:
            qmove.park(model)
    assert isinstance(caught.value.__cause__, ValueError)
    assert snapshot(model) == before
    assert gpu.allocated() == allocated
    assert not qmove.is_parked(model)

    qmove.park(model)
    parked = snapshot(model)
    with monkeypatch.context() as patched:
        patched.setattr(NestedTensor, "__tensor_unflatten__", broken)
        with pytest.raises(qmove.CannotMove, match="NestedTensor"):
            qmove.restore(model)
    assert snapshot(model) == parked
    assert qmove.is_parked(model)

    qmove.restore(model)
    assert snapshot(model) == before
