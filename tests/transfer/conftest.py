"""The fixtures of transfer: what crosses the link, and how small a model is copied in pieces."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import qmove_core as qmove
import simcuda
from qmove_core.digests import choosing
from qmove_core.memory import blocks
from qmove_core.parking import streaming
from qmove_core.transfer import copies as engine
from tests.builders.byte_tensors import MIB
from tests.builders.device import GPU


@pytest.fixture
def tried_out(gpu: GPU) -> Iterator[None]:
    """Digests are tried out once for each device: what is counted and timed is the model's."""
    assert choosing.available(gpu.device)
    simcuda.reset_counters()
    yield
    simcuda.link.use("pcie4")


@pytest.fixture
def no_digests() -> None:
    """Only the model's own bytes cross the link; conftest.py sets it back."""
    qmove.configure(keep_mirrors=False)


@pytest.fixture
def scaled_down(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registrations of 4 MiB, buffers of 2 MiB and "large" from 1 MiB on: a 16th of each."""
    qmove.trim()
    monkeypatch.setattr(blocks, "PIECE", blocks.PIECE // 16)
    monkeypatch.setattr(engine, "STAGING", engine.STAGING // 16)
    monkeypatch.setattr(engine, "SMALL", engine.SMALL // 16)
    assert (blocks.PIECE, engine.STAGING, engine.SMALL) == (4 * MIB, 2 * MIB, MIB)
    yield
    streaming.wait_for()
    gc.collect()
    qmove.trim()  # what was registered in such pieces must be unregistered so
