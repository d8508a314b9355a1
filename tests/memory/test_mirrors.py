"""Mirrors: parking again copies nothing that is unchanged, and what comes home is always right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.digests import digest
from qmove_core.digests.digest_tree import FloatProducts
from tests.builders.device import GPU
from tests.builders.link import copies
from tests.builders.mirrors import BIAS, WEIGHT, WIDTH, digest_bytes, mirrored, ones, round_trip
from tests.builders.models import layers, llama_inputs, quanto_layers, tiny_llama, torchao_layers
from tests.builders.odd_models import BUILDERS
from tests.builders.snapshots import contents, snapshot

pytestmark = pytest.mark.simulated


# Unchanged: nothing is copied --------------------------------------------------------------------


def test_the_second_park_brings_digests_over_the_link_and_nothing_else(gpu: GPU) -> None:
    model = layers(4, width=WIDTH)
    before = contents(model)
    first = qmove.park(model)
    assert first.copied_bytes == first.nbytes == 4 * (WEIGHT + BIAS)
    first.restore()
    read = digest_bytes(model)
    simcuda.reset_counters()

    second = qmove.park(model)

    counters = simcuda.counters()
    assert (second.copied_bytes, second.nbytes) == (0, first.nbytes)
    assert (counters.h2d_bytes, counters.d2d_bytes) == (0, 0)
    assert 0 < counters.d2h_bytes <= read < BIAS * 4
    assert simcuda.host_counters().pins == 0
    assert gpu.allocated() == 0
    assert contents(model) == before


def round_trips_copy_nothing_after_the_first(model: object) -> None:
    before, parked = snapshot(model), qmove.park(model)
    assert parked.copied_bytes == parked.nbytes > 0
    parked.restore()
    for _ in range(2):
        with copies() as seen:
            again = qmove.park(model)
        assert (again.copied_bytes, again.nbytes) == (0, parked.nbytes)
        assert {notice.direction for notice in seen} == {"d2h"}
        assert contents(model) == {
            name: c[1] for name, c in before.items() if isinstance(c[1], bytes)
        }
        again.restore()
    assert snapshot(model) == before


@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("inside_inference_mode", [False, True])
def test_tensors_of_all_kinds_are_copied_once(
    gpu: GPU, build: Callable[[], nn.Module], inside_inference_mode: bool
) -> None:
    with torch.inference_mode(inside_inference_mode):
        round_trips_copy_nothing_after_the_first(build())


@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
def test_torchao_weights_are_copied_once(gpu: GPU, kind: str) -> None:
    round_trips_copy_nothing_after_the_first(torchao_layers(kind))


@pytest.mark.parametrize("kind", ["qint8", "qint4", "qfloat8"])
def test_quanto_weights_are_copied_once(gpu: GPU, kind: str) -> None:
    round_trips_copy_nothing_after_the_first(quanto_layers(kind))


@pytest.mark.usefixtures("avx512_bf16")
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_a_llama_that_computes_between_its_parks_is_copied_once(
    gpu: GPU, precision: str, tmp_path: Any
) -> None:
    model = tiny_llama(precision, tmp_path)
    with torch.no_grad():
        expected = model(llama_inputs()).logits
        round_trip(model)
        for _ in range(2):
            assert torch.equal(model(llama_inputs()).logits, expected)
            assert qmove.park(model).copied_bytes == 0
    assert torch.equal(
        model.generate(llama_inputs(), max_new_tokens=1, do_sample=False)[:, -1],
        expected[:, -1].argmax(-1),
    )


def test_each_device_of_a_spread_model_finds_its_mirrors(gpu: GPU, second_gpu: GPU) -> None:
    model = nn.Sequential(
        layers(1, device="cuda:0"), layers(1, device="cuda:1"), layers(1, device="cpu")
    )
    before = snapshot(model)
    round_trip(model)

    parked = qmove.park(model)

    assert (parked.copied_bytes, gpu.allocated(), second_gpu.allocated()) == (0, 0, 0)
    parked.restore()
    assert snapshot(model) == before


def test_a_mirror_goes_along_to_another_device(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(2)
    before = contents(model)
    qmove.park(model).restore("cuda:1")

    assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert contents(model) == before


def test_a_move_to_the_cpu_finds_the_mirrors_and_a_move_back_makes_them(gpu: GPU) -> None:
    model = mirrored(2)
    expected = model(ones()).cpu()
    assert qmove.move(model, "cpu").copied_bytes == 0
    torch.testing.assert_close(model(torch.ones(1, WIDTH)), expected)
    qmove.move(model, gpu.device)
    assert qmove.park(model).copied_bytes == 0


def test_ten_swaps_of_two_models_copy_each_out_once(gpu: GPU) -> None:
    models = [layers(2), layers(3)]
    before = [snapshot(model) for model in models]
    qmove.park(models[1])
    out = 0
    for turn in range(10):
        out += qmove.park(models[turn % 2]).copied_bytes
        qmove.restore(models[(turn + 1) % 2])
    assert out == qmove.inventory(models[0]).nbytes
    qmove.restore(models)
    assert [snapshot(model) for model in models] == before


# Nobody else can write to a mirror ---------------------------------------------------------------


class Alias:
    """Something that a user keeps of a parked weight, and can write through."""

    def __init__(self, kept: Any, write: Callable[[Any], object]) -> None:
        self.kept, self._write = kept, write

    def write(self) -> None:
        self._write(self.kept)


def unseen_alias(weight: torch.Tensor) -> torch.Tensor:
    """A tensor of plain class: nothing sees that it is given the other's data."""
    alias = torch.empty(0)
    alias.data = weight
    return alias


FOLLOWING: dict[str, Callable[[nn.Sequential], Alias]] = {
    "state_dict": lambda model: Alias(model.state_dict(), lambda state: state["1.weight"].fill_(9)),
    "detached view": lambda model: Alias(model[1].weight.detach()[3], lambda row: row.fill_(9)),
}


@pytest.mark.parametrize("keep", FOLLOWING.values(), ids=FOLLOWING.keys())
def test_an_alias_that_is_a_tensor_comes_home_as_one(
    gpu: GPU, keep: Callable[[Any], Alias]
) -> None:
    never_moved = mirrored()
    keep(never_moved).write()
    model = mirrored()
    qmove.park(model)
    alias = keep(model)
    qmove.restore(model)
    alias.write()
    assert contents(model) == contents(never_moved)

    qmove.park(model)
    assert contents(model) == contents(never_moved)
    model[1].weight[3].zero_()
    alias.write()
    assert contents(model) == contents(never_moved)


ALIASES: dict[str, Callable[[nn.Sequential], Alias]] = {
    "set_": lambda model: Alias(
        torch.empty(0).set_(model[1].weight.detach()), lambda tensor: tensor.fill_(9)
    ),
    "data of another": lambda model: Alias(
        unseen_alias(model[1].weight), lambda tensor: tensor.fill_(9)
    ),
    "storage": lambda model: Alias(
        model[1].weight.untyped_storage(), lambda storage: storage.fill_(9)
    ),
    "typed storage": lambda model: Alias(
        model[1].weight.storage(), lambda storage: storage.fill_(9)
    ),
    "numpy view": lambda model: Alias(model[1].weight.numpy(), lambda array: array.fill(9)),
    "tensor over a numpy view": lambda model: Alias(
        torch.from_numpy(model[1].weight.numpy()), lambda tensor: tensor.fill_(9)
    ),
}


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("keep", ALIASES.values(), ids=ALIASES.keys())
def test_an_alias_of_the_parked_bytes_cannot_reach_a_later_park(
    gpu: GPU, keep: Callable[[Any], Alias]
) -> None:
    model = mirrored()
    before = contents(model)
    qmove.park(model)
    alias = keep(model)
    qmove.restore(model)
    alias.write()
    assert contents(model) == before

    parked = qmove.park(model)  # also what has never been looked at since the restore

    assert parked.copied_bytes == WEIGHT
    assert contents(model) == before
    alias.write()
    assert contents(model) == before
    parked.restore()
    alias.write()
    del alias
    assert qmove.park(model).copied_bytes == 0
    assert contents(model) == before
    qmove.restore(model)
    assert contents(model) == before


# Without digests ---------------------------------------------------------------------------------


def test_a_device_with_no_room_for_digests_is_copied_from(gpu: GPU) -> None:
    model = mirrored()
    model[1].weight.data.add_(1)
    before = contents(model)
    simcuda.set_memory(torch.cuda.memory_allocated())

    parked = qmove.park(model)

    assert parked.copied_bytes == parked.nbytes
    assert contents(model) == before
    simcuda.set_memory("4GiB")
    parked.restore()
    assert contents(model) == before


def test_a_device_that_multiplies_inexactly_is_copied_from(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mirrored()
    before = contents(model)
    monkeypatch.setattr(
        digest, "products_on", lambda device: None if device.type == "cuda" else FloatProducts
    )
    for _ in range(2):
        parked = qmove.park(model)
        assert parked.copied_bytes == parked.nbytes
        assert contents(model) == before
        parked.restore()
    assert contents(model) == before
