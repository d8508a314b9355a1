"""`park(model, free=bytes)`: as many layers leave as it takes, the last used first, and no more."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.link import copies
from tests.builders.models import inputs, layers, llama_inputs, tiny_llama
from tests.builders.places import parked_names
from tests.builders.snapshots import contents, snapshot

LAYER = 4 * (64 * 64 + 64)  # bytes of a layer of `layers`


@pytest.mark.parametrize(
    ("free", "leave"),
    [(1, 1), (LAYER - 1, 1), (LAYER, 1), (LAYER + 1, 2), (3 * LAYER, 3), (100 * LAYER, 4)],
)
def test_as_many_layers_leave_as_it_takes_and_no_more(gpu: GPU, free: int, leave: int) -> None:
    model, x = layers(4), inputs()
    expected, before = model(x), snapshot(model)
    there = gpu.allocated()

    parked = qmove.park(model, free=free)

    assert parked.nbytes == leave * LAYER
    assert parked_names(model) == {
        f"{layer}.{name}" for layer in range(4 - leave, 4) for name in ("weight", "bias")
    }
    assert there - gpu.allocated() == leave * LAYER
    assert qmove.is_parked(model)
    assert torch.equal(model(x), expected)
    streaming.wait_for()
    assert snapshot(model) == before and not qmove.is_parked(model)


def test_nothing_leaves_for_0_bytes(gpu: GPU) -> None:
    model = layers(2)
    before = snapshot(model)
    assert qmove.park(model, free=0).nbytes == 0
    assert snapshot(model) == before and not qmove.is_parked(model)


def test_a_negative_number_of_bytes_is_refused(gpu: GPU) -> None:
    model = layers(2)
    before = snapshot(model)
    with pytest.raises(ValueError, match="free is a number of bytes, not -1; leave it out"):
        qmove.park(model, free=-1)
    with pytest.raises(qmove.UnknownDevice, match="cuda:9"):
        qmove.park(model, free={"cuda:9": 1})
    assert snapshot(model) == before


def test_one_call_after_the_other_frees_its_bytes_until_all_is_parked(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    expected, before = model(x), snapshot(model)
    freed = [qmove.park(model, free=LAYER).nbytes for _ in range(5)]
    assert freed == [LAYER] * 4 + [0]
    assert torch.equal(model(x), expected)
    streaming.wait_for()
    assert snapshot(model) == before


def test_what_a_partly_parked_model_has_left_is_parked_by_a_plain_park(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    expected = model(x)
    qmove.park(model, free=LAYER)
    assert qmove.park(model).nbytes == 3 * LAYER
    assert len(qmove.parked_models()) == 1
    assert torch.equal(model(x), expected)


def test_a_device_map_frees_each_devices_bytes_there(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(4)
    model[1].to("cuda:1")
    model[2].to("cuda:1")
    before = snapshot(model)

    qmove.park(model, free={"cuda:1": 1})
    assert parked_names(model) == {"2.weight", "2.bias"}
    qmove.park(model, free={"cuda:0": LAYER + 1, "cuda:1": 0})
    assert {name[0] for name in parked_names(model)} == {"0", "2", "3"}

    qmove.restore(model)
    assert snapshot(model) == before


class Backwards(nn.Module):
    """Uses its blocks in another order than they are registered in."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(64, 64, device="cuda") for _ in range(4))
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in reversed(self.blocks):
            x = block(x)
        return x


def test_the_order_is_that_in_which_the_model_used_its_layers_also_those_that_were_home(
    gpu: GPU,
) -> None:
    model, x = Backwards(), inputs()
    expected = model(x)
    qmove.park(model, free=1)  # the order is not known yet: the one registered last
    assert parked_names(model) == {"blocks.3.weight", "blocks.3.bias"}
    assert torch.equal(model(x), expected)
    streaming.wait_for()

    for leave in ("2", "1", "0", "10", "210", "0"):  # each use tells of the order up to the last
        qmove.park(model, free=len(leave) * LAYER)
        assert {name.split(".")[1] for name in parked_names(model)} == set(leave)
        assert torch.equal(model(x), expected)
        streaming.wait_for()


def test_what_is_used_after_the_last_layer_that_was_parked_stays_the_last(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    expected = model(x)
    qmove.park(model)
    model(x)  # the order is known
    streaming.wait_for()
    qmove.park(model[1])
    assert torch.equal(model(x), expected)
    for leave in ("3", "32"):
        qmove.park(model, free=len(leave) * LAYER)
        assert {name[0] for name in parked_names(model)} == set(leave)
        qmove.restore(model)


def test_what_two_layers_share_leaves_with_the_first_of_them(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    model[3].weight = model[0].weight
    expected = model(x)
    assert qmove.park(model, free=LAYER).nbytes == LAYER + 256
    assert parked_names(model) == {"3.bias", "2.weight", "2.bias"}
    assert torch.equal(model(x), expected)
    assert model[3].weight is model[0].weight


def test_a_tensor_of_a_parked_layer_is_home_when_it_is_used_by_itself(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    expected = x @ model[3].weight.t()
    qmove.park(model, free=LAYER)
    assert model[3].weight.device == gpu.device
    assert torch.equal(x @ model[3].weight.t(), expected)


def test_a_part_that_did_not_change_since_its_last_park_copies_nothing(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    qmove.park(model, free=2 * LAYER)
    model(x)
    streaming.wait_for()
    model[3].weight.data += 1
    expected = model(x)
    with copies() as seen:
        parked = qmove.park(model, free=2 * LAYER)
    assert parked.nbytes == 2 * LAYER and parked.copied_bytes == 64 * 64 * 4
    assert sum(n.nbytes for n in seen if n.direction == "d2h" and n.nbytes > 4096) == 64 * 64 * 4
    assert torch.equal(model(x), expected)


def test_a_graph_holds_only_the_layers_that_it_needs(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    model[0].requires_grad_(True)
    loss = model[0](x).sum()
    assert qmove.park(model, free=LAYER).nbytes == LAYER
    with pytest.raises(qmove.LiveAutogradGraph, match=r"the first is '0\."):
        qmove.park(model)
    loss.backward()


@pytest.mark.usefixtures("avx512_bf16")
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_a_llama_parked_in_part_generates_as_before(
    gpu: GPU, precision: str, tmp_path: Any
) -> None:
    model = tiny_llama(precision, tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(llama_inputs(), **options)
    before, total = contents(model), qmove.inventory(model).nbytes
    for share in (0.1, 0.5, 0.9):
        freed = qmove.park(model, free=int(share * total)).nbytes
        assert share * total <= freed + 1 and 0 < freed <= total
        assert torch.equal(model.generate(llama_inputs(), **options), expected)
        streaming.wait_for()
        assert contents(model) == before


def test_all_sequences_of_four_calls_are_as_for_a_twin_that_never_moved(gpu: GPU) -> None:
    x = inputs()
    twin = layers(3)
    expected = twin(x)
    calls = {
        "park a layer": lambda m: qmove.park(m, free=LAYER),
        "park two": lambda m: qmove.park(m, free=2 * LAYER),
        "park": qmove.park,
        "restore": qmove.restore,
        "prefetch": qmove.prefetch,
        "use": lambda m: torch.testing.assert_close(m(x), expected, rtol=0, atol=0),
    }
    for sequence in itertools.product(calls, repeat=4):
        model = layers(3)
        for call in sequence:
            freed, home = None, _home_bytes(model)
            freed = calls[call](model)
            if call.startswith("park "):
                wanted = LAYER if call == "park a layer" else 2 * LAYER
                assert freed.nbytes == min(wanted, home), sequence
        assert torch.equal(model(x), expected), sequence
    streaming.wait_for()


def _home_bytes(model: nn.Module) -> int:
    """Bytes of it that are on the device, or on their way."""
    return qmove.inventory(model).by_device.get("cuda:0", 0)
