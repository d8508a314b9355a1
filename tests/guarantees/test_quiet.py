"""Guarantee 6, Quiet: a resident model carries no trace of qmove."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import layers


def traces(model: nn.Module) -> list[tuple[Any, ...]]:
    """Classes, attribute names and hooks of every module, and the attribute names of every parameter."""
    modules = [
        (type(m), sorted(vars(m)), len(m._forward_pre_hooks), len(m._forward_hooks))
        for m in model.modules()
    ]
    return [*modules, *((type(p), sorted(vars(p))) for p in model.parameters())]


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
