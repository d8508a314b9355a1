"""Mirrors: the RAM that they take, and when they give it up."""

from __future__ import annotations

import gc

import psutil
import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory import arena, limits, mirrors
from tests.builders.device import GPU
from tests.builders.mirrors import BIAS, WEIGHT, WIDTH, held, mirrored, round_trip
from tests.builders.models import layers
from tests.builders.snapshots import contents, snapshot

pytestmark = pytest.mark.simulated


def resident_and_mirrored(*counts: int) -> list[nn.Sequential]:
    """Models with mirrors, the first one restored first."""
    models = [layers(count) for count in counts]
    for model in models:
        round_trip(model)
    return models


def arena_bytes(model: object) -> int:
    return arena.bytes_for([holding.nbytes for holding in qmove.inventory(model).holdings])


def has_mirrors(model: object) -> bool:
    """Whether all storages of a resident model have one; asked of what decides it, and put back."""
    storages = [holding.storage for holding in qmove.inventory(model).holdings]
    found = mirrors.take(storages)
    mirrors.put_back(storages, found)
    assert len({mirror is None for mirror in found}) == 1, "some of them"
    return found[0] is not None


def test_stats_show_the_ram_that_mirrors_take(gpu: GPU) -> None:
    first, second = layers(2), layers(3)
    sizes = [arena_bytes(first), arena_bytes(second)]
    round_trip([first, second])
    assert (qmove.stats().mirror_bytes, qmove.stats().arena_bytes) == (sum(sizes), 0)
    qmove.park([first, second])
    assert (qmove.stats().mirror_bytes, qmove.stats().arena_bytes) == (0, sum(sizes))
    qmove.restore(first)
    assert (qmove.stats().mirror_bytes, qmove.stats().arena_bytes) == tuple(sizes)
    assert held() == sum(sizes)


def test_without_keep_mirrors_each_park_copies_and_no_ram_is_held(gpu: GPU) -> None:
    qmove.configure(keep_mirrors=False)
    model = layers(4)
    before = snapshot(model)
    for _ in range(2):
        parked = qmove.park(model)
        assert parked.copied_bytes == parked.nbytes
        parked.restore()
        assert (arena.bytes_in_use(), qmove.stats().mirror_bytes) == (0, 0)
    assert snapshot(model) == before


def test_mirrors_made_before_keep_mirrors_was_switched_off_end_with_the_next_restore(
    gpu: GPU,
) -> None:
    model = mirrored()
    before = snapshot(model)
    qmove.configure(keep_mirrors=False)
    round_trip(model)
    assert arena.bytes_in_use() == 0
    assert qmove.park(model).copied_bytes == 4 * (WEIGHT + BIAS)
    qmove.restore(model)
    assert snapshot(model) == before


def test_ram_limit_counts_mirrors_and_gives_the_least_recently_used_up_first(gpu: GPU) -> None:
    first, second, third = resident_and_mirrored(4, 4, 4)
    fourth = layers(4)
    round_trip(first)  # so that the second was used longest ago
    one = arena_bytes(first)
    qmove.configure(ram_limit=3 * one + one // 2)

    qmove.park(fourth)

    assert [has_mirrors(model) for model in (first, second, third)] == [True, False, True]
    assert held() == 3 * one


def test_what_is_parked_is_never_given_up(gpu: GPU) -> None:
    parked, resident = layers(4), layers(4)
    before = snapshot(parked)
    round_trip([parked, resident])
    qmove.park(parked)
    bytes_parked = contents(parked)

    assert qmove.trim() == arena_bytes(resident) or arena.bytes_in_use() == held()
    qmove.configure(ram_limit=arena_bytes(parked))
    with pytest.raises(qmove.NotEnoughMemory, match=r"ram_limit of qmove\.configure"):
        qmove.park(resident)

    assert contents(parked) == bytes_parked
    qmove.configure(ram_limit=None)
    qmove.restore(parked)
    assert snapshot(parked) == before


@pytest.fixture(params=["pinned", "pageable"])
def both_kinds_of_host_memory(request: pytest.FixtureRequest) -> None:
    if request.param == "pageable":
        qmove.configure(pin_limit=0)


@pytest.mark.usefixtures("both_kinds_of_host_memory")
@pytest.mark.parametrize("limit", ["ram_limit", "cgroup limit", "available RAM"])
def test_mirrors_are_given_up_before_a_park_fails(
    gpu: GPU, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrored_one, other = layers(4), layers(3)
    before = snapshot(mirrored_one), snapshot(other)
    round_trip(mirrored_one)
    allowed = arena_bytes(mirrored_one)

    def free(stays: int = limits.HEADROOM) -> int:
        return allowed - held() + stays

    if limit == "ram_limit":
        qmove.configure(ram_limit=allowed)
    elif limit == "cgroup limit":
        monkeypatch.setattr(limits, "cgroup_free", free)
    else:
        real = psutil.virtual_memory()
        stays = limits.stays_free()
        monkeypatch.setattr(psutil, "virtual_memory", lambda: real._replace(available=free(stays)))

    parked = qmove.park(other)

    assert not has_mirrors(mirrored_one)
    assert held() <= allowed
    parked.restore()
    assert (snapshot(mirrored_one), snapshot(other)) == before


def test_a_model_that_is_parked_needs_no_room_beside_its_own_mirrors(gpu: GPU) -> None:
    model = mirrored()
    qmove.configure(ram_limit=held())
    model[1].weight.data.add_(1)
    wanted = contents(model)
    assert qmove.park(model).copied_bytes == WEIGHT
    assert contents(model) == wanted


@pytest.mark.usefixtures("both_kinds_of_host_memory")
def test_trim_gives_mirrors_back_and_says_how_much(gpu: GPU) -> None:
    model = mirrored()
    before, size = snapshot(model), arena_bytes(model)
    assert arena.spare_bytes() + mirrors.nbytes() == size

    assert qmove.trim() == size

    assert (held(), qmove.stats().mirror_bytes, qmove.trim()) == (0, 0, 0)
    assert qmove.park(model).copied_bytes == 4 * (WEIGHT + BIAS)
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.usefixtures("both_kinds_of_host_memory")
def test_trim_gives_no_more_mirrors_up_than_it_was_asked_for(gpu: GPU) -> None:
    models = resident_and_mirrored(2, 2, 2)
    one = arena_bytes(models[0])

    assert qmove.trim(one + 1) == 2 * one

    assert [has_mirrors(model) for model in models] == [False, False, True]


def test_the_mirror_of_a_model_that_is_deleted_goes_with_it(gpu: GPU) -> None:
    model, other = resident_and_mirrored(4, 2)
    del model
    gc.collect()
    assert qmove.stats().mirror_bytes == arena.bytes_in_use() == arena_bytes(other)


def test_the_mirror_of_a_weight_that_is_replaced_goes_with_it(gpu: GPU) -> None:
    model = mirrored()
    before = qmove.stats().mirror_bytes
    model[1].weight = nn.Parameter(torch.ones(2, WIDTH, device="cuda"), requires_grad=False)
    assert qmove.stats().mirror_bytes == before - WEIGHT
