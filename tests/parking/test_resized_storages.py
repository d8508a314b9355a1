"""Storages that their owner has resized: emptied ones stay as they are, cut ones are refused by name,
and no host copy of another size ever comes back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot


def a_restored_model() -> nn.Module:
    """Two layers that were parked, restored, and multiplied by 3 since: their host copies are old."""
    model = layers(2, width=256)
    qmove.park(model)
    qmove.restore(model)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    return model


def test_an_emptied_storage_stays_empty_and_takes_no_memory(gpu: GPU) -> None:
    model = a_restored_model()
    other = model[1].weight.clone()
    emptied = model[0].weight.untyped_storage()
    emptied.resize_(0)
    before = gpu.allocated()

    parked = qmove.park(model)
    assert parked.nbytes == qmove.inventory(model[1]).nbytes + model[0].bias.nbytes
    assert model[0].weight.device == gpu.device
    assert parked.emptied == ["0.weight"]
    assert qmove.restore(model).emptied == ["0.weight"]

    assert emptied.nbytes() == 0
    assert gpu.allocated() == before
    assert torch.equal(model[1].weight, other)
    moved = qmove.move(model, "cpu")
    assert (moved.nbytes, moved.emptied) == (parked.nbytes, ["0.weight"])


def test_a_storage_that_was_emptied_and_filled_again_comes_back_with_its_new_bytes(
    gpu: GPU,
) -> None:
    model = a_restored_model()
    storage = model[0].weight.untyped_storage()
    nbytes = storage.nbytes()
    storage.resize_(0)
    storage.resize_(nbytes)
    model[0].weight.data.fill_(7)
    before = snapshot(model)

    qmove.park(model)
    qmove.restore(model)

    assert snapshot(model) == before


def test_a_storage_that_has_grown_meets_no_host_copy_of_the_old_size(gpu: GPU) -> None:
    model = a_restored_model()
    storage = model[0].weight.untyped_storage()
    storage.resize_(storage.nbytes() + 4096)
    before = snapshot(model)

    parked = qmove.park(model)
    qmove.restore(model)

    assert parked.copied_bytes == parked.nbytes
    assert snapshot(model) == before


def test_a_cut_storage_is_refused_by_name_and_nothing_is_allocated(gpu: GPU) -> None:
    model = a_restored_model()
    model[0].weight.untyped_storage().resize_(1024)
    before = gpu.allocated()
    gpu.reset_peak()

    with pytest.raises(qmove.CannotMove, match=r"0\.weight: its storage was cut to 1\.00 KiB"):
        qmove.park(model)

    assert gpu.allocated() == gpu.peak() == before
    assert model[1].weight.device == gpu.device


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.t(),
        lambda t: t[:, ::2],
        lambda t: t[3:4].expand(50, 64),
        lambda t: t[64:],
        lambda t: t.reshape(-1)[5:].as_strided((3, 4), (0, 1)),
    ],
    ids=["transposed", "strided", "expanded", "empty at the end", "overlapping"],
)
def test_views_of_all_shapes_lack_nothing(gpu: GPU, view: object) -> None:
    base = torch.arange(64 * 64, dtype=torch.float32, device=gpu.device).reshape(64, 64)
    model = [view(base)]  # type: ignore[operator]
    before = snapshot(model)

    assert qmove.park(model).nbytes == base.nbytes
    qmove.restore(model)

    assert snapshot(model) == before
