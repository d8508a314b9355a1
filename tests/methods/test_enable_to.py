"""`.to()` that works: it moves the model past its library's guards, and refuses bad casts."""

from __future__ import annotations

import copy
import functools
import gc
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers, llama_inputs, quanto_layers, tiny_llama
from tests.builders.snapshots import contents, snapshot

pytestmark = pytest.mark.usefixtures("avx512_bf16")

Call = Callable[[Any], Any]


def linear_4bit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    layer = (
        bnb.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float16, **options)
        .half()
        .eval()
    )
    return nn.Sequential(
        layer.cuda(), nn.LayerNorm(32, device="cuda", dtype=torch.float16)
    ).requires_grad_(False)


def linear_8bit() -> nn.Module:
    torch.manual_seed(0)
    layer = bnb.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=6.0).half().eval()
    return nn.Sequential(layer.cuda()).requires_grad_(False)


@pytest.mark.parametrize("precision", ["int8", "nf4"])
@pytest.mark.parametrize(
    ("leave", "come_back"),
    [
        (lambda model: model.to("cpu"), lambda model: model.to("cuda:0")),
        (lambda model: model.cpu(), lambda model: model.cuda()),
        (lambda model: model.to(device=torch.device("cpu")), lambda model: model.cuda(0)),
        (lambda model: model.to("cpu", non_blocking=True), lambda model: model.to(0)),
        (lambda model: model.to(device="cpu"), lambda model: model.cuda(device="cuda:0")),
    ],
    ids=["to", "cpu and cuda", "to(device=)", "to(index)", "cuda(device=)"],
)
def test_the_models_own_methods_move_it_where_transformers_forbids_it(
    gpu: GPU, tmp_path: Path, precision: str, leave: Call, come_back: Call
) -> None:
    before = gpu.allocated()
    model = qmove.enable_to(tiny_llama(precision, tmp_path))
    with torch.no_grad():
        expected = model(llama_inputs()).logits
    reference = lasting_contents(model)

    assert leave(model) is model
    assert qmove.inventory(model).by_device.keys() == {"cpu"}
    assert gpu.allocated() - before <= expected.nbytes + 2 * 1024  # tables of bitsandbytes' own
    assert not qmove.is_parked(model)
    with torch.no_grad():
        on_cpu = model(llama_inputs("cpu")).logits
    torch.testing.assert_close(on_cpu, expected.cpu(), rtol=2e-2, atol=2e-2)

    assert come_back(model) is model
    assert lasting_contents(model) == reference
    with torch.no_grad():
        assert torch.equal(model(llama_inputs()).logits, expected)


def lasting_contents(model: nn.Module) -> dict[str, bytes]:
    """The bytes by name, without the outlier columns that bitsandbytes notes in each forward."""
    return {name: held for name, held in contents(model).items() if not name.endswith("state.idx")}


def test_without_enable_to_transformers_forbids_it(tmp_path: Path) -> None:
    """If this fails transformers has changed, and the tests above no longer show what they say."""
    with pytest.raises(ValueError, match="not supported for `8-bit`"):
        tiny_llama("int8", tmp_path).cuda()


def test_the_flags_of_a_quantized_model_are_not_edited(tmp_path: Path) -> None:
    model = tiny_llama("int8", tmp_path)
    names = ("is_quantized", "is_loaded_in_8bit", "quantization_method", "hf_quantizer")
    flags = {name: getattr(model, name) for name in names}
    config = model.config.to_dict()

    qmove.enable_to(model).to("cpu").cuda()

    assert {name: getattr(model, name) for name in names} == flags
    assert model.config.to_dict() == config


def test_a_pipeline_moves_with_its_components_and_stays_what_it_is(gpu: GPU) -> None:
    diffusers = pytest.importorskip("diffusers")
    before = gpu.allocated()
    unet = diffusers.UNet1DModel(block_out_channels=(32, 32, 64), extra_in_channels=16)
    pipe = diffusers.DanceDiffusionPipeline(unet.cuda(), diffusers.IPNDMScheduler())
    cls, attributes = type(pipe), set(vars(pipe))

    qmove.enable_to(pipe)

    assert pipe.to("cpu", silence_dtype_warnings=True) is pipe
    assert gpu.allocated() == before
    assert pipe.cuda() is pipe
    assert pipe.device.type == "cuda"
    assert pipe.to(torch.float16) is pipe
    assert unet.dtype == torch.float16
    assert pipe.to("cpu", torch.float32).unet.dtype == torch.float32
    qmove.disable_to(pipe)
    assert (type(pipe), set(vars(pipe))) == (cls, attributes)


# Casts

CASTS: dict[str, Call] = {
    "to(dtype)": lambda model: model.to(torch.bfloat16),
    "to(device, dtype)": lambda model: model.to("cpu", torch.float32),
    "to(tensor)": lambda model: model.to(torch.ones(1)),
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "bfloat16": lambda model: model.bfloat16(),
    "type": lambda model: model.type(torch.float32),
}
QUANTIZED: dict[str, Callable[[], nn.Module]] = {
    "int8": linear_8bit,
    "nf4": linear_4bit,
    "nf4 that poses as bfloat16": lambda: linear_4bit(quant_storage=torch.bfloat16),
    "a wrapper subclass": lambda: quanto_layers("qint8"),
    "fp8": lambda: _with_parameter(torch.ones(4, 4).to(torch.float8_e4m3fn)),
    "packed int4": lambda: _with_parameter(torch.ones(4, 4, dtype=torch.uint8)),
}


def _with_parameter(tensor: torch.Tensor) -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4))
    model.weight = nn.Parameter(tensor, requires_grad=False)
    return model.cuda()


@pytest.mark.parametrize("build", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_a_cast_of_quantized_weights_is_refused_and_changes_nothing(
    build: Callable[[], nn.Module],
) -> None:
    model = qmove.enable_to(build())
    before = snapshot(model)

    for name, cast in CASTS.items():
        with pytest.raises(
            qmove.DtypeCastRefused,
            match=r"weights are quantized, first '.*weight'.*Nothing was changed",
        ):
            cast(model)
        assert snapshot(model) == before, name


@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS.keys())
@pytest.mark.parametrize("was_parked", [False, True], ids=["resident", "parked"])
def test_other_models_are_cast_as_ever(cast: Call, was_parked: bool) -> None:
    model, ordinary = qmove.enable_to(_with_statistics()), _with_statistics()
    weight = model[0].weight
    if was_parked:
        qmove.park(model)

    assert cast(model) is model

    expected = cast(ordinary).state_dict()
    assert model.state_dict().keys() == expected.keys()
    for name, tensor in model.state_dict().items():
        assert (tensor.dtype, tensor.device) == (expected[name].dtype, expected[name].device)
        assert torch.equal(tensor, expected[name])
    assert model[0].weight is weight
    assert not qmove.is_parked(model)


def _with_statistics() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).cuda().eval().requires_grad_(False)


def test_channels_last_reaches_the_convolutions_of_a_quantized_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, device="cuda"), *linear_4bit()).requires_grad_(False)
    codes = torch.arange(54, dtype=torch.uint8, device="cuda").reshape(
        2, 3, 3, 3
    )  # such as a packed convolution has
    model[0].codes = nn.Parameter(codes, requires_grad=False)
    packed = model[1].weight.data.clone()

    qmove.enable_to(model).to(memory_format=torch.channels_last)

    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.is_contiguous()
    assert model[0].codes.is_contiguous()
    assert torch.equal(model[1].weight.data, packed)


def test_the_meta_device_is_refused_with_what_to_do_instead() -> None:
    model = qmove.enable_to(linear_4bit())
    before = snapshot(model)

    with pytest.raises(qmove.UnknownDevice, match=r"use qmove\.park"):
        model.to("meta")

    assert snapshot(model) == before


# On and off


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("was_parked", [False, True], ids=["resident", "parked"])
def test_disable_to_leaves_no_trace(times: int, was_parked: bool) -> None:
    model = layers()
    cls, attributes = type(model), dict(vars(model))
    if was_parked:
        qmove.park(model)

    for _ in range(times):
        qmove.enable_to(model)
    assert isinstance(model, cls)
    assert model.__class__ is cls
    assert type(model).to is not cls.to
    qmove.disable_to(model)

    assert qmove.is_parked(model) is was_parked
    qmove.restore(model)
    assert type(model) is cls
    assert vars(model) == attributes
    qmove.disable_to(model)
    assert type(model) is cls


def test_a_parked_model_wakes_and_stays_enabled(gpu: GPU) -> None:
    model = qmove.enable_to(layers())
    x = torch.ones(2, 64, device="cuda")
    expected = model(x)

    qmove.park(model)

    assert torch.equal(model(x), expected)
    before = gpu.allocated()
    model.to("cpu")
    assert gpu.allocated() < before
    assert model(x.cpu()).device.type == "cpu"


def test_accelerates_own_to_is_put_aside_and_put_back(tmp_path: Path) -> None:
    from accelerate import dispatch_model

    model = dispatch_model(
        tiny_llama("int8", tmp_path), {"model": 0, "lm_head": 1}, force_hooks=True
    )
    wrapped = {name: vars(model)[name] for name in ("to", "cuda")}
    order = list(vars(model))

    qmove.enable_to(model)

    assert all(getattr(model, name) is not method for name, method in wrapped.items())
    qmove.disable_to(model)
    assert {name: vars(model)[name] for name in ("to", "cuda")} == wrapped
    assert list(vars(model)) == order
    assert qmove.enable_to(model).to("cpu") is model
    assert qmove.inventory(model).by_device.keys() == {"cpu"}


def test_a_wrapper_made_while_it_was_enabled_outlives_disable_to() -> None:
    model = qmove.enable_to(layers())
    enabled_to = model.to
    model.__dict__["to"] = lambda *args: enabled_to(
        *args
    )  # what accelerate does when it dispatches

    qmove.disable_to(model)

    assert model.to(torch.float16)[0].weight.dtype == torch.float16
    bare = model[0].weight.data
    model.to("cpu")
    assert (
        bare.device.type == "cuda"
    )  # PyTorch's own `to` moves parameters, not the tensors that alias them


@pytest.mark.parametrize("was_parked", [False, True], ids=["resident", "parked"])
def test_a_copy_is_an_ordinary_model_and_does_not_move_the_original(was_parked: bool) -> None:
    model = qmove.enable_to(layers(device="cpu" if not was_parked else "cuda"))
    if was_parked:
        qmove.park(model)
    place = [parameter.device for parameter in model.parameters()]

    copied = copy.deepcopy(model)
    copied.to("cuda:0")

    assert type(copied) is nn.Sequential
    assert [parameter.device for parameter in model.parameters()] == place
    assert {parameter.device.type for parameter in copied.parameters()} == {"cuda"}


def test_a_saved_model_knows_nothing_of_qmove() -> None:
    model = qmove.enable_to(layers())
    file = io.BytesIO()

    torch.save(model, file)

    assert b"qmove" not in file.getvalue()
    file.seek(0)
    assert type(torch.load(file, weights_only=False)) is nn.Sequential


def test_an_enabled_model_dies_with_its_last_reference(gpu: GPU) -> None:
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        model = qmove.enable_to(layers())
        alive = weakref.ref(model)
        model.cpu().cuda()
        del model
        assert alive() is None
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


def test_a_model_that_nobody_else_refers_to_moves_as_well() -> None:
    model = qmove.enable_to(layers()).to("cpu")

    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def test_an_object_that_allows_no_other_class_is_refused() -> None:
    with pytest.raises(qmove.QMoveError, match=r"Call qmove\.move"):
        qmove.enable_to([nn.Linear(2, 2)])


def test_the_very_values_that_were_in_the_way_are_put_back_and_absent_ones_stay_absent() -> None:
    model = layers()
    mine: dict[str, object] = {"to": functools.partial(print), "cuda": None, "half": [1]}
    vars(model).update(mine)
    model.last = 1
    before = dict(vars(model))

    qmove.enable_to(model)
    assert model.half is not mine["half"] and model.cuda is not None
    qmove.disable_to(model)

    assert list(vars(model)) == list(before), "in the very order"
    assert all(vars(model)[name] is value for name, value in before.items())


@pytest.mark.parametrize("before", [None, print], ids=["nothing before", "one before"])
def test_a_method_that_is_set_while_enabled_comes_first_and_stays(before: Any) -> None:
    model = layers()
    if before is not None:
        model.__dict__["to"] = before
    qmove.enable_to(model)
    mine = functools.partial(print, "mine")

    model.to = mine  # type: ignore[method-assign]
    assert model.to is mine
    qmove.disable_to(model)
    assert model.to is mine
    del model.to
    assert "to" not in vars(model)


def test_deleting_a_method_that_was_set_gives_the_enabled_one_back() -> None:
    model = qmove.enable_to(layers())
    model.to = print  # type: ignore[method-assign, assignment]
    del model.to
    assert model.to("cpu") is model
    with pytest.raises(AttributeError):
        del model.to
