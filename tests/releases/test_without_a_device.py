"""What needs no device, on any release: modules load, structure is found, bytes move in host memory
under the same tensor objects, meta tensors get their data, casts are refused."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.model import kinds
from qmove_core.moving import ordinary_state
from qmove_core.storages import as_bytes, rebind_all, use_count
from tests.builders.snapshots import snapshot
from tests.kinds.formats.wrappers import Scaled

WIDTH = 64


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed beside this release")


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def tied() -> nn.Module:
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)))
    model[2].weight = model[0].weight
    model[1].weight.data = model[0].weight.data.t()
    model.register_buffer("part", model[0].weight.data.view(-1)[7:40:3])
    return model


def half() -> nn.Module:
    return plain().bfloat16()


class Fp8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        codes = torch.randn(WIDTH, WIDTH).to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.scale = torch.tensor(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale)


def wrapped(depth: int) -> nn.Module:
    codes: Any = torch.randint(-8, 8, (WIDTH, WIDTH), dtype=torch.int8)
    for _ in range(depth):
        codes = Scaled(codes, torch.rand(WIDTH, 1))
    layer = nn.Linear(WIDTH, WIDTH)
    layer.weight = nn.Parameter(codes, requires_grad=False)
    return nn.Sequential(layer)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return plain()


def of_bitsandbytes(build: Callable[[Any], nn.Module]) -> Callable[[], nn.Module]:
    def built() -> nn.Module:
        needs("bitsandbytes")
        import bitsandbytes

        layer = build(bitsandbytes.nn).eval()
        layer.weight.data.normal_(0, 0.02)
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # else a forward here packs it for this CPU
        model = nn.Sequential(layer)
        try:
            model.to("cpu")
            model(torch.ones(2, WIDTH))
        except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
            pytest.skip(f"bitsandbytes {bitsandbytes.__version__} computes on no CPU: {error}")
        return model

    return built


def of_torchao() -> nn.Module:
    needs("torchao")
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        pytest.skip(f"torchao does not fit this release: {error}")
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16)).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig())
    return model


def of_quanto() -> nn.Module:
    needs("optimum.quanto" if importlib.util.find_spec("optimum") else "optimum")
    from optimum import quanto

    model = plain()
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    return model


def scripted() -> nn.Module:
    return torch.jit.script(plain())


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": plain,
    "tied and views": tied,
    "bf16": half,
    "fp8 with a scale in an attribute": Fp8,
    "wrapper": lambda: wrapped(1),
    "wrapper in a wrapper": lambda: wrapped(2),
    "inference tensors": in_inference_mode,
    "TorchScript": scripted,
    "bitsandbytes int8": of_bitsandbytes(
        lambda bnb: bnb.Linear8bitLt(WIDTH, WIDTH, has_fp16_weights=False)
    ),
    "bitsandbytes nf4": of_bitsandbytes(
        lambda bnb: bnb.Linear4bit(WIDTH, WIDTH, compute_dtype=torch.float32, quant_type="nf4")
    ),
    "torchao int8": of_torchao,
    "optimum-quanto qint8": of_quanto,
}
every_model = pytest.mark.parametrize("name", MODELS)


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def outputs(model: nn.Module) -> torch.Tensor:
    dtypes = {p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    dtype = next(iter(dtypes), torch.float32)
    with torch.no_grad():
        return model(torch.linspace(-1, 1, 2 * WIDTH).reshape(2, WIDTH).to(dtype))


def test_every_module_loads() -> None:
    for found in pkgutil.walk_packages(qmove.__path__, "qmove_core."):
        if not found.name.endswith("__main__"):
            importlib.import_module(found.name)


@every_model
def test_every_byte_is_found(name: str) -> None:
    model = model_of(name)
    held = qmove.inventory(model)
    expected = sum(
        t.untyped_storage().nbytes()
        for t in {t.untyped_storage()._cdata: t for t in plain_tensors(model)}.values()
    )
    assert held.nbytes >= expected > 0
    assert set(held.by_device) == {"cpu"}
    assert not held.immovable and not held.meta


def plain_tensors(model: nn.Module) -> list[torch.Tensor]:
    named = [*model.parameters(), *model.buffers()]
    return [tensor for tensor in named if not hasattr(type(tensor), "__tensor_flatten__")]


@every_model
def test_bytes_move_under_the_same_objects(name: str) -> None:
    """The heart of every move, from one piece of host memory to another."""
    model = model_of(name)
    expected, before = outputs(model), snapshot(model)
    with ordinary_state():
        held = qmove.inventory(model)
        old = [holding.storage for holding in held.holdings]
        new = [storage.clone() for storage in old]
        rebind_all(
            (holding.tensors, storage) for holding, storage in zip(held.holdings, new, strict=True)
        )
        kinds.refresh(held)
    assert [use_count(storage) for storage in old] == [1] * len(old), "somebody holds the old bytes"
    for storage in old:
        as_bytes(storage).fill_(0xDB)
    assert snapshot(model) == before
    assert torch.equal(outputs(model), expected)


@every_model
def test_what_is_on_the_host_stays_there(name: str) -> None:
    model = model_of(name)
    before = snapshot(model)
    assert qmove.park(model).copied_bytes == 0
    assert qmove.restore(model).copied_bytes == 0
    assert qmove.move(model, "cpu").copied_bytes == 0
    assert snapshot(model) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(qmove.UnknownDevice):
        qmove.move(plain(), "cuda")


@pytest.mark.parametrize(
    "name", ["fp8 with a scale in an attribute", "bitsandbytes nf4", "torchao int8"]
)
def test_casts_of_quantized_weights_are_refused(name: str) -> None:
    model = qmove.enable_to(model_of(name))
    before = snapshot(model)
    for cast in (model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(qmove.DtypeCastRefused):
            cast()
    assert snapshot(model) == before
    qmove.disable_to(model)


@pytest.mark.parametrize("place", ["ram", "disk"])
@pytest.mark.parametrize("name", ["plain", "bf16", "bitsandbytes nf4", "torchao int8"])
def test_meta_tensors_get_their_data(name: str, place: str, tmp_path: Path) -> None:
    needs("accelerate")
    import accelerate

    model = model_of(name)
    expected = outputs(model)
    if place == "disk" and name == "torchao int8":
        pytest.skip("accelerate writes no wrapper subclass to the disk")
    if place == "ram":
        accelerate.cpu_offload(model, execution_device="cpu")
    else:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    meta = [id(item.tensor) for item in qmove.inventory(model).meta]
    assert meta
    with qmove.materialized(model):
        assert not qmove.inventory(model).meta
        assert torch.equal(outputs(model), expected)
    assert [id(item.tensor) for item in qmove.inventory(model).meta] == meta
    qmove.materialize_meta_tensors(model)
    assert not qmove.inventory(model).meta
    assert torch.equal(outputs(model), expected)


def test_a_saved_model_is_listed_from_its_header(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from qmove_core.saved_tensors import open_safetensors

    save_file(
        {"weight": torch.arange(6, dtype=torch.float16).reshape(2, 3)}, tmp_path / "a.safetensors"
    )
    reader, header = open_safetensors(tmp_path / "a.safetensors")
    assert (header["weight"].dtype, header["weight"].shape) == (torch.float16, (2, 3))
    assert reader.get_tensor("weight")[1, 2] == 5
