"""The fixtures of memory."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

import simcuda
from qmove_core.memory import arena, pinning
from tests.builders.arena import wait_until_prepared


@pytest.fixture
def empty_arena(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test starts and ends with an arena that holds nothing, and a log that has said nothing."""
    monkeypatch.setattr(pinning, "_said", set())
    monkeypatch.setattr(arena, "_most_held", 0)
    arena.trim()
    gc.collect()
    simcuda.reset_counters()
    assert (arena.bytes_in_use(), arena.spare_bytes(), pinning.registered_bytes()) == (0, 0, 0)
    yield
    simcuda.set_pinned_limit(None)
    wait_until_prepared()
    gc.collect()
    arena.trim()
    assert simcuda.host_counters().registered == 0, "something stayed page-locked"
