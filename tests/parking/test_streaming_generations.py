"""What waits for one streaming restore is left alone when an earlier one ends."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


def test_a_part_that_is_parked_again_while_the_rest_of_its_pipeline_still_arrives(gpu: GPU) -> None:
    pipe = nn.ModuleDict({"unet": layers(3, width=256), "enc": layers(2, width=256)})
    before, x = snapshot(pipe), torch.ones(1, 256, device=gpu.device)
    expected = [pipe["unet"](x), pipe["enc"](x)]
    empty = gpu.allocated() - sum(h.nbytes for h in qmove.inventory(pipe).holdings)
    unet = qmove.inventory(pipe["unet"]).nbytes
    qmove.park(pipe)

    pipe["unet"](x)  # wakes the pipeline by streaming; `enc` was not used yet
    qmove.park(pipe["unet"])
    assert gpu.allocated() <= empty + qmove.inventory(pipe).nbytes - unet
    qmove.prefetch(pipe["unet"])
    of_enc = pipe["enc"](x)
    of_unet = pipe["unet"](x)

    assert torch.equal(of_unet, expected[0]) and torch.equal(of_enc, expected[1])
    streaming.wait_for()
    assert snapshot(pipe) == before


def test_an_end_releases_only_what_waits_for_that_restore(gpu: GPU) -> None:
    model = layers(3, width=256)
    before, x = snapshot(model), torch.ones(1, 256, device=gpu.device)
    expected = model(x)
    qmove.park(model)
    qmove.restore(model, stream=True)
    [first] = streaming._under_way
    qmove.park(model)
    qmove.restore(model, stream=True)
    waiting = [type(parameter) for parameter in model.parameters()]

    first.finish()  # late, and it is over

    assert [type(parameter) for parameter in model.parameters()] == waiting
    assert torch.equal(model(x), expected)
    streaming.wait_for()
    assert snapshot(model) == before
