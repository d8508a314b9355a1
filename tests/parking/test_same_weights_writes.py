"""Two models that share host memory: what one writes, in whatever way, the other never sees."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory import pages, shared
from tests.builders.device import GPU
from tests.builders.mirrors import held
from tests.builders.twins import KINDS, both_parked, loaded, weights_of

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.usefixtures("small_models_share"),
    pytest.mark.skipif(not shared.is_possible(), reason="needs memfd, which Linux has"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def nothing_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system does not tell which pages of a map were written to."""
    monkeypatch.setattr(pages, "is_unwritten", lambda address, nbytes: False)


def _through_its_address(weight: torch.Tensor) -> None:
    ctypes.memset(weight.data_ptr() + 16, 7, 100)


def _through_its_storage(weight: torch.Tensor) -> None:
    weight.untyped_storage()[5] = 9


def _load_state(weight: torch.Tensor) -> None:
    holder = nn.Module()
    holder.weight = weight
    holder.load_state_dict({"weight": torch.ones_like(weight.cpu())})


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda weight: weight.fill_(1),
    "one element": lambda weight: weight.view(-1)[3:4].fill_(1),
    "data": lambda weight: weight.data.copy_(torch.ones(weight.shape).to(weight.dtype)),
    "numpy": lambda weight: weight.data.numpy().reshape(-1).__setitem__(2, 1),
    "address": _through_its_address,
    "storage": _through_its_storage,
    "state dict": _load_state,
    "set_": lambda weight: weight.data.set_(torch.ones(weight.shape).to(weight.dtype)),
    "other data": lambda weight: setattr(weight, "data", torch.ones(weight.shape).to(weight.dtype)),
}


@every_kind
@pytest.mark.parametrize("writer", ["first", "second"])
@pytest.mark.parametrize("way", WRITES)
def test_what_one_writes_is_its_own(gpu: GPU, kind: str, writer: str, way: str) -> None:
    each_writes_its_own(kind, writer, way)


@pytest.mark.usefixtures("nothing_told")
@pytest.mark.parametrize("writer", ["first", "second"])
@pytest.mark.parametrize("way", ["in place", "address", "other data"])
def test_where_the_system_does_not_tell_what_was_written(gpu: GPU, writer: str, way: str) -> None:
    each_writes_its_own("plain", writer, way)


def each_writes_its_own(kind: str, writer: str, way: str) -> None:
    one, other, before = both_parked(kind)
    mine, others = (one, other) if writer == "first" else (other, one)
    twin = loaded(kind).cpu()
    with torch.no_grad():
        for model in (mine, twin):
            WRITES[way](model[0].weight)
    written = bytes(twin[0].weight.data.contiguous().view(torch.uint8).numpy().tobytes())
    assert written != before["0.weight"] or way == "set_"

    def are_right() -> None:
        assert weights_of(others) == before
        now = mine[0].weight.data.cpu().contiguous().view(torch.uint8)
        assert bytes(now.numpy().tobytes()) == written
        rest = {name: content for name, content in before.items() if name != "0.weight"}
        assert {n: c for n, c in weights_of(mine).items() if n in rest} == rest

    are_right()
    for _ in range(2):
        for move in (qmove.restore, qmove.park):
            for model in (mine, others):
                move(model)
                are_right()


@pytest.mark.parametrize("told", [True, False])
def test_what_was_changed_is_parked_in_memory_that_is_counted(
    gpu: GPU, told: bool, request: pytest.FixtureRequest
) -> None:
    if not told:
        request.getfixturevalue("nothing_told")
    one, _other, _before = both_parked()
    in_ram = held()
    with torch.no_grad():
        one[0].weight.mul_(2)
    changed = weights_of(one)
    qmove.restore(one)
    assert qmove.park(one).copied_bytes == one[0].weight.nbytes
    assert held() == in_ram + one[0].weight.nbytes
    assert weights_of(one) == changed


def test_storages_that_models_share_cannot_be_resized(gpu: GPU) -> None:
    one, other, before = both_parked()
    weight = one[0].weight.data
    with pytest.raises(RuntimeError, match="resiz"):
        weight.resize_(2 * weight.numel())
    weight.resize_(4).fill_(3)
    assert weights_of(other) == before
    qmove.restore(one)
    qmove.restore(other)
    assert weights_of(other) == before and weight.tolist() == [3] * 4


def test_an_array_over_the_first_keeps_it_where_it_is(gpu: GPU) -> None:
    one, other = loaded("plain"), loaded("plain")
    before = weights_of(other)
    qmove.park(one)
    array, in_ram = one[-1].weight.data.numpy(), held()
    assert qmove.park(other).copied_bytes == qmove.inventory(other).nbytes
    assert held() == 2 * in_ram, "nothing of the first was moved"
    array[:] = 3
    assert one[-1].weight.data.eq(3).all() and weights_of(other) == before


def test_whoever_holds_the_storage_itself_keeps_it_where_it_is(gpu: GPU) -> None:
    one, other = loaded("plain"), loaded("plain")
    before = weights_of(other)
    qmove.park(one)
    storage = one[1].weight.untyped_storage()
    qmove.park(other)
    storage.fill_(3)
    assert bytes([3]) * len(storage) == weights_of(one)["1.weight"]
    assert weights_of(other) == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_child_that_writes_changes_nothing_here(gpu: GPU) -> None:
    one, other, before = both_parked()
    address = one[0].weight.data_ptr()
    child = os.fork()
    if child == 0:
        ctypes.memset(address, 7, 4096)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert weights_of(one) == weights_of(other) == before
