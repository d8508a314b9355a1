"""What people call a model: its kind, from what it holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.for_hosts import describe
from tests.builders import models
from tests.builders.dispatched_models import IN_RAM, ON_DISK, dispatched


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        (torch.float32, "fp32"),
        (torch.float16, "fp16"),
        (torch.bfloat16, "bf16"),
        (torch.float8_e4m3fn, "fp8 e4m3"),
    ],
)
def test_a_plain_model_is_called_by_the_dtype_of_most_of_its_bytes(
    dtype: torch.dtype, kind: str
) -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(256, 256).to(dtype), requires_grad=False)
    model.norm = nn.Parameter(torch.zeros(16))

    assert describe(qmove.inventory(model)).kind == kind


def test_a_quantized_weight_names_the_model_though_the_rest_is_bigger() -> None:
    model = nn.Module()
    model.embedding = nn.Parameter(torch.zeros(1024, 64, dtype=torch.float16))
    model.weight = nn.Parameter(torch.zeros(64, 64, dtype=torch.int8), requires_grad=False)

    assert describe(qmove.inventory(model)).kind == "int8"


def test_gptq_is_known_by_its_packed_weights() -> None:
    model = nn.Module()
    model.layer = nn.Module()
    model.layer.register_buffer("qweight", torch.zeros(64, 64, dtype=torch.int32))
    model.layer.register_buffer("scales", torch.zeros(64, 64, dtype=torch.float16))

    assert describe(qmove.inventory(model)).kind == "GPTQ or AWQ"


def test_a_model_without_tensors_has_no_kind() -> None:
    assert describe(qmove.inventory(nn.Module())).kind == ""


@pytest.mark.parametrize(
    ("precision", "kind"), [("fp16", "fp16"), ("int8", "int8"), ("nf4", "nf4"), ("fp4", "fp4")]
)
def test_a_model_that_bitsandbytes_has_quantized_has_the_name_of_its_format(
    tmp_path: Path, precision: str, kind: str
) -> None:
    pytest.importorskip("transformers")
    if precision != "fp16":
        pytest.importorskip("bitsandbytes")

    assert (
        describe(qmove.inventory(models.tiny_llama(precision, tmp_path, device="cpu"))).kind == kind
    )


def test_a_quantizing_wrapper_names_its_library_or_its_own_type() -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("optimum.quanto")

    assert describe(qmove.inventory(models.torchao_layers("int8"))).kind == "torchao Int8Tensor"
    assert describe(qmove.inventory(models.quanto_layers("qint4"))).kind == "qint4"


@pytest.mark.parametrize("source", ["dat", "safetensors"])
def test_of_a_dispatched_model_it_says_what_lies_on_the_disk_and_what_in_ram(
    tmp_path: Path, source: str
) -> None:
    pytest.importorskip("accelerate")

    on_disk = qmove.inventory(dispatched(tmp_path / "disk", ON_DISK, source))
    in_ram = qmove.inventory(dispatched(tmp_path / "ram", IN_RAM))
    missing = sum(meta.nbytes for meta in on_disk.meta)

    assert missing > 0
    assert (describe(on_disk).on_disk, describe(on_disk).offloaded) == (missing, 0)
    assert (describe(in_ram).on_disk, describe(in_ram).offloaded) == (0, missing)
    assert describe(on_disk).kind == "fp32"
