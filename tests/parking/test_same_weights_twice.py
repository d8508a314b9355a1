"""The same checkpoint loaded twice: in host memory once, and what one model writes no other sees."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, shared, sharing
from tests.builders.byte_tensors import MIB, equal, on_host, tensors
from tests.builders.device import GPU
from tests.builders.mirrors import digest_bytes, held
from tests.builders.models import layers, quanto_layers, torchao_layers
from tests.builders.snapshots import snapshot
from tests.builders.twins import KINDS, both_parked, loaded, weights_of

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.usefixtures("small_models_share"),
    pytest.mark.skipif(not shared.is_possible(), reason="needs memfd, which Linux has"),
]
every_kind = pytest.mark.parametrize("kind", KINDS)


# The second copy ---------------------------------------------------------------------------------


@every_kind
def test_the_second_one_copies_nothing_out_and_takes_no_memory(gpu: GPU, kind: str) -> None:
    one, other = loaded(kind), loaded(kind)
    before = weights_of(one)
    first = qmove.park(one)
    in_ram, read = held(), digest_bytes(other)
    assert (first.copied_bytes, in_ram) == (first.nbytes, arena.bytes_in_use())
    simcuda.reset_counters()

    second = qmove.park(other)

    samples = len(second.home) * (sharing.SAMPLE + 1)
    assert simcuda.counters().d2h_bytes <= read + samples
    assert (second.copied_bytes, second.nbytes, held()) == (0, first.nbytes, in_ram)
    stats = qmove.stats()
    assert (stats.arena_bytes, stats.mirror_bytes, stats.file_bytes) == (in_ram, 0, 0)
    assert sum(stats.parked_bytes.values()) == 2 * first.nbytes
    assert stats.shared_bytes == first.nbytes
    assert second.stragglers == []
    assert weights_of(one) == weights_of(other) == before
    for parked in (second, first):
        parked.restore()
    assert weights_of(one) == weights_of(other) == before
    assert places_of(one) == places_of(other) == {"cuda"}
    stats = qmove.stats()
    assert (stats.arena_bytes, stats.mirror_bytes) == (0, in_ram), "one copy mirrors both"
    assert stats.shared_bytes == 0
    assert (qmove.park(one).copied_bytes, qmove.park(other).copied_bytes, held()) == (0, 0, in_ram)


def places_of(model: nn.Module) -> set[str]:
    return {parameter.device.type for parameter in model.parameters()}


@pytest.mark.parametrize(
    "load",
    [lambda: torchao_layers("int8"), lambda: quanto_layers("qint4")],
    ids=["torchao", "quanto"],
)
def test_tensors_of_wrapper_subclasses_share_too(gpu: GPU, load: Callable[[], Any]) -> None:
    one, other = load(), load()
    before = snapshot(one), snapshot(other)
    x = torch.ones(2, 128, device="cuda", dtype=next(one.parameters()).dtype)
    expected = one(x)
    qmove.park(one)
    in_ram = held()
    assert (qmove.park(other).copied_bytes, held()) == (0, in_ram)
    assert torch.equal(one(x), expected) and torch.equal(other(x), expected)
    assert (snapshot(one), snapshot(other)) == before


def test_any_number_of_them_share(gpu: GPU) -> None:
    models = [loaded("plain") for _ in range(4)]
    before = weights_of(models[0])
    qmove.park(models[0])
    in_ram = held()
    for model in models[1:]:
        assert (qmove.park(model).copied_bytes, held()) == (0, in_ram)
    del models[0], models[1]
    gc.collect()
    assert held() == in_ram
    assert [weights_of(model) for model in models] == [before] * 2
    for model in models:
        qmove.restore(model)
        assert weights_of(model) == before


@every_kind
def test_what_mirrors_a_model_at_home_is_what_the_other_is_parked_in(gpu: GPU, kind: str) -> None:
    one, other = loaded(kind), loaded(kind)
    before = weights_of(one)
    qmove.park(one).restore()
    in_ram = held()
    assert (qmove.park(other).copied_bytes, held()) == (0, in_ram)
    assert (qmove.stats().mirror_bytes, qmove.stats().arena_bytes) == (0, in_ram)
    assert qmove.trim() == 0, "a parked model lies in it"
    with torch.no_grad():
        next(iter(other.parameters())).data.zero_()
    assert qmove.park(one).copied_bytes in (0, qmove.inventory(one).nbytes)
    assert weights_of(one) == before
    qmove.restore(one)
    assert weights_of(one) == before


def test_only_what_is_equal_is_shared(gpu: GPU) -> None:
    one, other = layers(6, width=64), layers(6, width=64)
    with torch.no_grad():
        other[1].weight[0, 0] += 1  # far from the sample: found by comparing all
        other[2].weight[32] += 1  # in the sample
    before = weights_of(one), weights_of(other)
    qmove.park(one)
    assert qmove.park(other).copied_bytes == 2 * other[1].weight.nbytes
    assert (weights_of(one), weights_of(other)) == before
    qmove.restore(other)
    qmove.restore(one)
    assert (weights_of(one), weights_of(other)) == before


def test_what_differs_in_one_bit_anywhere_is_not_shared(gpu: GPU) -> None:
    size = 4096
    qmove.park(one := [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2)])
    for at in (0, 1, size // 2, size - 1):
        other = [torch.zeros(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
        other[1][at] = 1
        assert qmove.park(other).copied_bytes == size
        assert other[1].cpu().nonzero().flatten().tolist() == [at] and not other[0].any()
    assert not any(tensor.any() for tensor in one)


def test_digests_that_are_equal_prove_nothing(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if somebody had made a checkpoint whose digests are those of another one."""
    one, other = layers(2), layers(2)
    with torch.no_grad():
        other[0].weight[0, 0] += 1
    before = weights_of(other)
    monkeypatch.setattr(
        sharing.mirrors, "current_digests", lambda storages, **_options: [7 for _ in storages]
    )
    qmove.park(one)
    assert qmove.park(other).copied_bytes == other[0].weight.nbytes
    assert weights_of(other) == before


def test_what_was_written_to_the_first_before_the_second_came_is_its_own(gpu: GPU) -> None:
    one, other = layers(4), layers(4)
    before = weights_of(other)
    qmove.park(one)
    with torch.no_grad():
        one[0].weight.mul_(2)
    changed = weights_of(one)
    assert qmove.park(other).copied_bytes == other[0].weight.nbytes
    assert (weights_of(one), weights_of(other)) == (changed, before)
    for model in (one, other):
        qmove.restore(model)
    assert (weights_of(one), weights_of(other)) == (changed, before)


# One goes, the other stays -----------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("goes", ["first", "second"])
def test_dropping_one_keeps_the_others_bytes(gpu: GPU, kind: str, goes: str) -> None:
    one, other, before = both_parked(kind)
    in_ram = held()
    stays = other if goes == "first" else one
    del one, other
    gc.collect()
    qmove.trim()
    assert held() == in_ram and weights_of(stays) == before
    qmove.restore(stays)
    assert weights_of(stays) == before
    del stays
    gc.collect()
    qmove.trim()
    assert held() == 0


def test_restoring_one_and_trimming_keeps_the_others_bytes(gpu: GPU) -> None:
    one, other, before = both_parked()
    in_ram = held()
    qmove.restore(one)
    assert (qmove.trim(), held()) == (0, in_ram)
    qmove.restore(other)
    assert (qmove.trim(), held()) == (in_ram, 0)
    assert weights_of(one) == weights_of(other) == before
    assert qmove.park(one).copied_bytes == qmove.inventory(one).nbytes


@every_kind
def test_one_that_leaves_lies_where_the_one_that_comes_lay(gpu: GPU, kind: str) -> None:
    one, other = loaded(kind), loaded(kind)
    before = weights_of(one)
    qmove.park(one)
    in_ram = held()
    for leaving, coming in ((other, one), (one, other), (other, one)):
        parked, restored = qmove.swap(leaving, coming)
        assert (parked.copied_bytes, restored.copied_bytes) == (0, restored.nbytes)
        assert qmove.is_parked(leaving) and not qmove.is_parked(coming)
        assert weights_of(one) == weights_of(other) == before
        assert held() == in_ram


def test_a_swap_of_two_that_share(gpu: GPU) -> None:
    one, other, before = both_parked()
    for leaving, coming in ((None, one), (one, other), (other, one)):
        if leaving is None:
            qmove.restore(coming)
        else:
            qmove.swap(leaving, coming)
        assert weights_of(one) == weights_of(other) == before


def test_one_arrives_while_the_other_is_parked_again(gpu: GPU) -> None:
    one, other, before = both_parked()
    with torch.no_grad():
        expected = loaded("plain")(torch.ones(1, 96, device="cuda"))
        qmove.restore(one, stream=True)
        qmove.restore(other, stream=True)
        qmove.park(other)
        assert torch.equal(one(torch.ones(1, 96, device="cuda")), expected)
    assert weights_of(one) == weights_of(other) == before


def test_each_move_is_proved(gpu: GPU) -> None:
    qmove.configure(verify=True)
    one, other, before = both_parked()
    for model in (one, other):
        assert qmove.restore(model).verified and qmove.park(model).verified
    assert weights_of(one) == weights_of(other) == before


# Where it is not possible ------------------------------------------------------------------------


def test_there_is_room_for_both_only_because_they_share(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = [16 * MIB] * 9
    one, other = tensors(*sizes), tensors(*sizes)
    qmove.park(one)
    qmove.configure(ram_limit=sum(sizes) + 90 * MIB, share_from=None)
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.park(other)

    process = psutil.Process()
    storage, before, most = shared.View.storage, process.memory_info().rss, [0]

    def noted(self: shared.View, *args: Any) -> Any:
        most[0] = max(most[0], process.memory_info().rss - before)
        return storage(self, *args)

    monkeypatch.setattr(shared.View, "storage", noted)
    qmove.configure(share_from=1)
    assert qmove.park(other).copied_bytes == 0
    assert held() == sum(sizes)
    assert most[0] < 110 * MIB, "the RAM of the first goes back while its bytes move"
    for model in (one, other):
        qmove.restore(model)
        assert equal(model, on_host(tensors(*sizes)))


@pytest.fixture
def no_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_args: object) -> int:
        raise OSError("not here")

    monkeypatch.setattr(os, "memfd_create", refused)


@pytest.fixture
def no_second_map(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The system refuses maps when half of the first model has moved."""
    storage, calls = shared.View.storage, [0]

    def refuses(self: shared.View, *args: Any) -> Any:
        calls[0] += 1
        if calls[0] == 3:
            raise MemoryError("enough")
        return storage(self, *args)

    monkeypatch.setattr(shared.View, "storage", refuses)
    yield
    assert calls[0] >= 3


@pytest.mark.parametrize("lack", ["no_memfd", "no_second_map"])
def test_without_it_each_has_its_own_copy(
    gpu: GPU, lack: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    request.getfixturevalue(lack)
    one, other = loaded("plain"), loaded("plain")
    before = weights_of(one)
    qmove.park(one)
    with caplog.at_level("INFO", "qmove"):
        assert qmove.park(other).copied_bytes == qmove.inventory(other).nbytes
    assert any("do not share host memory this time" in line for line in caplog.messages)
    assert weights_of(one) == weights_of(other) == before
    for model in (one, other):
        with torch.no_grad():
            model[0].weight.data.zero_()
        qmove.restore(model)
    assert weights_of(one) == weights_of(other) != before


def test_small_models_do_not_share_by_default(gpu: GPU) -> None:
    qmove.configure(share_from=16 << 20)
    one, other = loaded("plain"), loaded("plain")
    qmove.park(one)
    assert qmove.park(other).copied_bytes == qmove.inventory(other).nbytes
