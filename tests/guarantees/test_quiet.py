"""Guarantee 6, Quiet: a resident model carries no trace of qmove."""

from __future__ import annotations

import torch

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import traces


def test_after_a_restore_nothing_of_qmove_stays_on_the_model(gpu: GPU) -> None:
    model = layers()
    before = traces(model)

    qmove.park(model)
    assert traces(model) != before
    qmove.restore(model)

    assert traces(model) == before


def test_after_waking_nothing_of_qmove_stays_on_the_model(gpu: GPU) -> None:
    model = layers()
    before = traces(model)
    qmove.park(model)

    model(torch.ones(1, 64, device="cuda"))

    assert traces(model) == before


def test_after_moves_nothing_of_qmove_stays_on_the_model(gpu: GPU) -> None:
    model = layers()
    before = traces(model)

    qmove.move(model, "cpu")
    assert traces(model) == before
    qmove.move(model, "cuda:0")

    assert traces(model) == before
