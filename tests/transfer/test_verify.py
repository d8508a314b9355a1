"""`qmove.configure(verify=True)`: digests prove each move, and a bit that flips on its way is an
error with a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.digests.digest import digest_storages
from qmove_core.memory import mirrors
from qmove_core.storages import as_bytes
from qmove_core.transfer import copies
from tests.builders.device import GPU
from tests.builders.models import layers, quanto_layers, tiny_llama, torchao_layers
from tests.builders.odd_models import BUILDERS
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


@pytest.fixture(autouse=True)
def verifying() -> Iterator[None]:
    """conftest.py sets it back."""
    qmove.configure(verify=True)
    yield


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each storage is one copy, in the order of the model."""
    monkeypatch.setattr(copies, "SMALL", 0)


def bytes_of(model: object) -> dict[str, Any]:
    return {name: content[1] for name, content in snapshot(model).items()}


# What is proved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_mirrors", [False, True])
@pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)
def test_every_move_says_that_it_is_verified(
    gpu: GPU, build: Callable[[], nn.Module], keep_mirrors: bool
) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    model = build()
    before = snapshot(model)
    for turn in range(2):
        parked = qmove.park(model)
        assert parked.verified
        assert (parked.copied_bytes == 0) == (keep_mirrors and turn == 1)
        assert parked.restore().verified
    assert qmove.move(model, "cpu").verified
    qmove.restore(model)
    assert {name: content[1:] for name, content in snapshot(model).items()} == {
        name: content[1:] for name, content in before.items()
    }


def test_without_verify_nothing_says_that_it_was(gpu: GPU) -> None:
    qmove.configure(verify=False)
    model = layers(2)
    parked = qmove.park(model)
    assert not parked.verified
    assert not parked.restore().verified


@pytest.mark.parametrize(
    "build",
    [
        lambda tmp: tiny_llama("int8", tmp),
        lambda tmp: tiny_llama("nf4", tmp),
        lambda tmp: torchao_layers("int8"),
    ],
    ids=["int8", "nf4", "torchao"],
)
def test_quantized_models_are_verified(
    gpu: GPU, build: Callable[[Any], Any], tmp_path: Any
) -> None:
    model = build(tmp_path)
    before = bytes_of(model)
    for _ in range(2):
        parked = qmove.park(model)
        assert parked.verified
        assert parked.restore().verified
    assert bytes_of(model) == before


def test_quanto_is_verified(gpu: GPU) -> None:
    model = quanto_layers("qint8")
    before = bytes_of(model)
    parked = qmove.park(model)
    assert parked.verified and parked.restore().verified
    assert bytes_of(model) == before


@pytest.mark.parametrize("where", ["on the way out", "on the way in"])
def test_where_a_device_has_no_room_for_digests_nothing_claims_to_be_proved(
    gpu: GPU, where: str
) -> None:
    qmove.configure(
        verify=False
    )  # the digests of parked bytes are not there to be compared with either
    model = layers(8, width=512)
    before, resident = snapshot(model), torch.cuda.memory_allocated()
    if where == "on the way in":
        qmove.park(model)
    qmove.configure(verify=True)
    simcuda.set_memory(resident)
    moved = qmove.restore(model) if where == "on the way in" else qmove.park(model)
    assert not moved.verified
    assert moved.copied_bytes == moved.nbytes
    qmove.restore(model)
    assert snapshot(model) == before


# A bit flips --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize(("nth", "name"), [(1, "0.weight"), (2, "0.bias"), (8, "3.bias")])
def test_a_bit_that_flips_on_the_way_out_leaves_the_model_where_it_was(
    gpu: GPU, nth: int, name: str
) -> None:
    model = layers(4)
    digest_storages(
        [model[0].weight.untyped_storage()]
    )  # the device is tried out: what follows is the model's
    before, allocated, x = snapshot(model), gpu.allocated(), torch.ones(1, 64, device="cuda")
    expected = model(x)
    copies: list[simcuda.CopyNotice] = []
    with simcuda.on_copy(copies.append):
        qmove.park(model)
        qmove.restore(model)
    weights = [
        number
        for number, notice in enumerate(copies, 1)
        if notice.direction == "d2h" and notice.non_blocking
    ]
    qmove.trim()

    with (
        pytest.raises(qmove.CorruptedCopy) as raised,
        simcuda.flip_bit("copy", nth=weights[nth - 1]) as fault,
    ):
        qmove.park(model)

    assert fault.fired == 1
    assert raised.value.names == [name]
    assert name in str(raised.value)
    assert not qmove.is_parked(model)
    assert torch.equal(model(x), expected)
    assert snapshot(model) == before
    assert gpu.allocated() == allocated + expected.nbytes + x.nbytes
    assert qmove.stats().arena_bytes == 0
    assert qmove.park(model).verified
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.usefixtures("singly")
@pytest.mark.parametrize(("nth", "name"), [(1, "0.weight"), (2, "0.bias"), (8, "3.bias")])
@pytest.mark.parametrize("stream", [False, True])
def test_a_bit_that_flips_on_the_way_in_leaves_the_model_parked(
    gpu: GPU, nth: int, name: str, stream: bool
) -> None:
    model = layers(4)
    before = snapshot(model)
    qmove.park(model)
    parked = snapshot(model)

    with pytest.raises(qmove.CorruptedCopy) as raised, simcuda.flip_bit("copy", nth=nth) as fault:
        qmove.restore(model, stream=stream)

    assert fault.fired == 1
    assert raised.value.names == [name]
    assert qmove.is_parked(model)
    assert (snapshot(model), gpu.allocated()) == (parked, 0)
    assert qmove.restore(model).verified
    assert snapshot(model) == before
    assert qmove.park(model).copied_bytes == 0


def test_flipped_bits_of_two_tensors_of_a_batch_are_both_named(
    gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "STAGING", 33_000)  # two layers of 16,640 bytes in each batch
    model = layers(4)
    before = snapshot(model)
    qmove.park(model)
    real, done = torch._foreach_copy_, []

    def flipping(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        real(targets, sources)
        if not done:
            done.extend(targets)
            targets[0][5] ^= 1
            targets[1][7] ^= 128

    with monkeypatch.context() as patched, pytest.raises(qmove.CorruptedCopy) as raised:
        patched.setattr(torch, "_foreach_copy_", flipping)
        qmove.restore(model)

    assert raised.value.names == ["0.weight", "0.bias"]
    qmove.restore(model)
    assert snapshot(model) == before


def test_a_waking_model_whose_bit_flips_stays_parked_and_wakes_the_next_time(gpu: GPU) -> None:
    model, x = layers(4), torch.ones(1, 64, device="cuda")
    expected = model(x)
    qmove.park(model)
    with pytest.raises(qmove.CorruptedCopy), simcuda.flip_bit("copy"):
        model(x)
    assert qmove.is_parked(model)
    assert torch.equal(model(x), expected)


def test_without_verify_a_flipped_bit_goes_unseen(gpu: GPU) -> None:
    """What the tests above rest on: the fault is a silent one."""
    qmove.configure(verify=False)
    model = layers(2)
    before = bytes_of(model)
    qmove.park(model)
    with simcuda.flip_bit("copy"):
        qmove.restore(model)
    assert bytes_of(model) != before


# What is no error ---------------------------------------------------------------------------------


def add_in_place(model: nn.Sequential) -> None:
    with torch.no_grad():
        model[1].weight.add_(torch.ones(64, 2) @ torch.ones(2, 64))


def add_through_data(model: nn.Sequential) -> None:
    model[1].weight.data += torch.ones(64, 2) @ torch.ones(2, 64)


def exchange_the_data(model: nn.Sequential) -> None:
    model[1].weight.data = torch.ones(64, 64)


def replace_the_weight(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.ones(64, 64), requires_grad=False)


@pytest.mark.parametrize(
    "change", [add_in_place, add_through_data, exchange_the_data, replace_the_weight]
)
def test_a_lora_that_is_merged_while_the_model_is_parked_is_no_error(
    gpu: GPU, change: Callable[[nn.Sequential], None]
) -> None:
    model = layers(3)
    for _ in range(2):
        qmove.park(model)
        change(model)
        wanted = bytes_of(model)
        assert qmove.restore(model).verified
        assert bytes_of(model) == wanted
    assert qmove.park(model).verified
    assert bytes_of(model) == wanted


@pytest.mark.usefixtures("singly")
def test_a_bit_that_flips_in_a_weight_that_was_changed_while_parked_is_one(gpu: GPU) -> None:
    model = layers(3)
    qmove.park(model)
    add_in_place(model)
    wanted = bytes_of(model)
    with pytest.raises(qmove.CorruptedCopy, match=r"1\.weight"), simcuda.flip_bit("copy", nth=3):
        qmove.restore(model)
    assert bytes_of(model) == wanted
    qmove.restore(model)
    assert bytes_of(model) == wanted


# Together with streaming and mirrors --------------------------------------------------------------


def test_a_streaming_restore_waits_and_is_verified(gpu: GPU) -> None:
    model = layers(4)
    classes = [type(module) for module in model.modules()]
    before = snapshot(model)
    qmove.park(model)

    assert qmove.restore(model, stream=True).verified

    assert [type(module) for module in model.modules()] == classes
    assert snapshot(model) == before


def test_a_mirror_that_went_bad_in_ram_is_found_by_the_park_that_would_use_it(gpu: GPU) -> None:
    model = layers(2)
    before = snapshot(model)
    qmove.park(model).restore()
    storages = [model[1].weight.untyped_storage()]
    found = mirrors.take(storages)
    assert found[0] is not None
    as_bytes(found[0].host)[100] ^= 4
    mirrors.put_back(storages, found)
    del found

    with pytest.raises(qmove.CorruptedCopy) as raised:
        qmove.park(model)

    assert raised.value.names == ["1.weight"]
    assert snapshot(model) == before
    assert qmove.park(model).verified  # by copying it again
    qmove.restore(model)
    assert snapshot(model) == before
