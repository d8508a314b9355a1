"""A pool's models, and that each pool is closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

import qmove_core as qmove
from qmove_core.memory import giving_back
from qmove_core.pool import ModelPool
from tests.builders.device import GPU
from tests.builders.pooled_models import Loaders, full_pool


@pytest.fixture
def loaders(gpu: GPU) -> Loaders:
    return Loaders()


@pytest.fixture
def make(loaders: Loaders, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ModelPool]]:
    """Makes pools that end with the test. Nobody looks at this machine's RAM meanwhile."""
    monkeypatch.setattr(giving_back.watch, "start", lambda: None)
    qmove.configure(share_from=None)
    pools: list[ModelPool] = []

    def make_pool(names: str, **budgets: float) -> ModelPool:
        pools.append(full_pool(loaders, names, **budgets))
        return pools[-1]

    yield make_pool
    for pool in pools:
        pool.close()
