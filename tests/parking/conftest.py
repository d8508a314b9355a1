"""The fixtures of parking: how a small model is copied, and what each test finds and leaves."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import qmove_core as qmove
import simcuda
from qmove_core.digests import choosing
from qmove_core.memory import blocks, pinning
from qmove_core.parking import streaming
from qmove_core.transfer import copies
from tests.builders.device import GPU


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each storage is a copy of its own, as in a big model."""
    monkeypatch.setattr(copies, "SMALL", 0)


@pytest.fixture
def small_models_share() -> None:
    """However few bytes two models have in common, they share them in host memory."""
    qmove.configure(share_from=1)


@pytest.fixture
def none_share() -> None:
    """Two models are different ones, although tests build them alike: they share nothing."""
    qmove.configure(share_from=None)


@pytest.fixture
def tried_out(gpu: GPU) -> None:
    """Digests are tried out once for each device, which waits."""
    assert choosing.available(gpu.device)


@pytest.fixture
def compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """conftest.py switches TorchDynamo off."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)


@pytest.fixture
def no_files_mapped(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts with an arena that holds nothing, and must end without a locked page or an
    open file."""
    monkeypatch.setattr(pinning, "_said", set())
    gc.collect()
    qmove.trim()
    simcuda.reset_counters()
    yield
    simcuda.set_pinned_limit(None)
    streaming.wait_for()
    gc.collect()
    qmove.trim()
    assert (simcuda.host_counters().registered, blocks.file_bytes()) == (0, 0)
