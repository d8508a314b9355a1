"""Mirrors: parking again copies what was changed since, and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.link import copies
from tests.builders.mirrors import BIAS, WEIGHT, WIDTH, digest_bytes, mirrored, round_trip
from tests.builders.models import layers
from tests.builders.places import place_of
from tests.builders.snapshots import contents, snapshot

pytestmark = pytest.mark.simulated


def merge_lora(model: nn.Sequential, sign: int = 1) -> None:
    """Adds a low-rank product to two of the weights where they lie, in place, as LoRA loaders do
    it; whole numbers, so that it can be undone."""
    for layer in (model[0], model[2]):
        up, down = (
            torch.ones(WIDTH, 2, device=place_of(layer.weight)),
            torch.ones(2, WIDTH, device=place_of(layer.weight)),
        )
        layer.weight.data += sign * (up @ down)


def write_through_data(model: nn.Sequential) -> None:
    model[1].weight.data[3, 5] += 1


def write_one_byte(model: nn.Sequential) -> None:
    model[1].weight.data.view(torch.uint8)[-1, -1] ^= 1


def write_through_a_view(model: nn.Sequential) -> None:
    model[1].weight[7:9].t()[4].add_(1)


def write_through_the_storage(model: nn.Sequential) -> None:
    model[1].weight.untyped_storage()[WEIGHT - 1] = 77


def write_what_lies_in_many_pieces(model: nn.Sequential) -> None:
    model[1].weight.neg_()


def replace_the_weight(model: nn.Sequential) -> None:
    model[1].weight = nn.Parameter(torch.ones(WIDTH, WIDTH, device="cuda"), requires_grad=False)


def replace_the_data(model: nn.Sequential) -> None:
    model[1].weight.data = torch.ones(WIDTH, WIDTH, device="cuda")


CHANGES: list[tuple[Callable[[nn.Sequential], None], int]] = [
    (write_through_data, WEIGHT),
    (write_one_byte, WEIGHT),
    (write_through_a_view, WEIGHT),
    (write_through_the_storage, WEIGHT),
    (write_what_lies_in_many_pieces, WEIGHT),
    (replace_the_weight, WEIGHT),
    (replace_the_data, WEIGHT),
    (merge_lora, 2 * WEIGHT),
    (lambda model: model[2].bias.data.zero_(), BIAS),
]


@pytest.mark.parametrize(("change", "changed_bytes"), CHANGES)
def test_what_was_changed_is_copied_again_alone(
    gpu: GPU, change: Callable[[nn.Sequential], None], changed_bytes: int
) -> None:
    model = mirrored()
    before = contents(model)
    change(model)
    wanted = snapshot(model)
    names = {name for name, content in contents(model).items() if before[name] != content}
    assert sum(len(before[name]) for name in names) == changed_bytes
    read = digest_bytes(model)

    with copies() as seen:
        parked = qmove.park(model)

    assert parked.copied_bytes == changed_bytes
    assert changed_bytes <= sum(notice.nbytes for notice in seen) <= changed_bytes + read
    assert contents(model) == {name: content[1] for name, content in wanted.items()}
    parked.restore()
    assert snapshot(model) == wanted
    assert qmove.park(model).copied_bytes == 0


def test_a_view_outside_the_model_writes_to_the_models_bytes_before_and_after(gpu: GPU) -> None:
    model = layers(2, width=WIDTH)
    row = model[1].weight[3]
    for number in range(3):
        round_trip(model)
        row.fill_(number)
        assert model[1].weight[3].sum().item() == number * WIDTH
        assert qmove.park(model).copied_bytes == WEIGHT
        assert place_of(row) == "cpu" and row.device == gpu.device  # its home
        assert row.sum().item() == number * WIDTH
        qmove.restore(model)
    del row
    assert qmove.park(model).copied_bytes == 0
    qmove.restore(model)
    assert model[1].weight[3].sum().item() == 2 * WIDTH


def test_a_change_that_is_undone_is_none(gpu: GPU) -> None:
    model = mirrored()
    model[1].weight.data.neg_()
    model[1].weight.data.neg_()
    assert qmove.park(model).copied_bytes == 0


def test_a_change_made_while_parked_comes_home_and_the_next_park_copies_nothing(gpu: GPU) -> None:
    model = mirrored()
    qmove.park(model)
    merge_lora(model)
    model[1].bias.fill_(7)
    wanted = contents(model)

    qmove.restore(model)
    assert contents(model) == wanted

    assert qmove.park(model).copied_bytes == 0
    assert contents(model) == wanted
    qmove.restore(model)
    assert contents(model) == wanted


@pytest.mark.parametrize("parks_before", [1, 2])
def test_unmerged_on_the_device_what_was_merged_on_the_host(gpu: GPU, parks_before: int) -> None:
    model = layers(4, width=WIDTH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1000).round_().add_(
                0
            )  # no -0, and whole numbers: what is added is taken away again without a trace
    before = contents(model)
    for _ in range(parks_before - 1):
        round_trip(model)
    qmove.park(model)
    merge_lora(model)
    qmove.restore(model)
    merge_lora(model, sign=-1)
    assert contents(model) == before

    parked = qmove.park(model)

    assert parked.copied_bytes == 2 * WEIGHT  # the mirrors hold the merged ones
    assert contents(model) == before
    parked.restore()
    assert contents(model) == before


def test_what_is_replaced_while_parked_comes_home_right(gpu: GPU) -> None:
    model = mirrored()
    qmove.park(model)
    model[1].weight = nn.Parameter(torch.full((WIDTH, WIDTH), 3.0), requires_grad=False)
    model[2].weight.data = torch.full((WIDTH, WIDTH), 4.0)
    wanted = contents(model)
    qmove.restore(model)
    assert contents(model) == wanted
    qmove.park(model)
    assert contents(model) == wanted


def test_a_weight_tied_between_two_models_is_right_in_both(gpu: GPU) -> None:
    first, second = layers(2, width=WIDTH), layers(2, width=WIDTH)
    second[0].weight = first[0].weight
    before = contents(first), contents(second)
    for turn in range(3):
        for model in (first, second):
            copied = qmove.park(model).copied_bytes
            assert copied == 0 or not turn
            assert (contents(first), contents(second)) == before
            qmove.restore([first, second])
    first[0].weight.data.add_(1)
    changed = contents(first), contents(second)
    assert qmove.park(second).copied_bytes == WEIGHT
    assert (contents(first), contents(second)) == changed
    qmove.restore([first, second])
    assert (contents(first), contents(second)) == changed
