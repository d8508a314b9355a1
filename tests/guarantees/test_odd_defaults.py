"""What PyTorch is set to for the whole process or thread changes nothing in a park and a restore."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.digests import digest
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


ODD = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "device context": lambda: torch.device("cuda"),
    "meta device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "inference mode": lambda: torch.inference_mode(),
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "autocast": lambda: torch.autocast("cuda", torch.float16),
    "warnings as errors": warnings_as_errors,
    "none": nullcontext,
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", ODD)
def test_a_round_trip_is_exact_and_the_second_park_copies_nothing(gpu: GPU, name: str) -> None:
    digest._products.cache_clear()  # what a device can do is found out under the odd setting
    model: nn.Module = layers(3, width=256)
    before = snapshot(model)
    seed = torch.random.get_rng_state()
    context: AbstractContextManager[object] = ODD[name]()

    with context:
        first = qmove.park(model)
        assert qmove.restore(model).nbytes == first.nbytes
        second = qmove.park(model)
        qmove.restore(model, stream=True)
    digest._products.cache_clear()

    assert (first.stragglers, second.stragglers) == ([], [])
    assert first.copied_bytes == first.nbytes
    assert second.copied_bytes == 0
    x = torch.ones(1, 256, device=gpu.device)
    model(x)
    qmove.restore(model)
    assert snapshot(model) == before
    assert torch.equal(torch.random.get_rng_state(), seed)
