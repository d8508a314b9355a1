"""A pinned model stays where it is, whoever asks, until it is unpinned or dies."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core import hosting
from qmove_core.parking import pins, streaming
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.places import places
from tests.builders.snapshots import contents, snapshot, traces


def parked_one() -> nn.Module:
    model = layers(1)
    qmove.park(model)
    return model


def parked_with(model: Any) -> None:
    with qmove.parked(model):
        pytest.fail("the body must not run")


VERBS: dict[str, Callable[[Any], Any]] = {
    "park": qmove.park,
    "strict park": lambda model: qmove.park(model, strict=True),
    "park with an extra": lambda model: qmove.park(model, extra=[layers(1)]),
    "parked": parked_with,
    "move to cpu": lambda model: qmove.move(model, "cpu"),
    "to": lambda model: qmove.enable_to(model).to("cpu"),
    "swap": lambda model: qmove.swap(model, parked_one()),
    "dequantize": lambda model: qmove.dequantize_and_move(model, "cpu"),
}


def refused(act: Callable[[], Any]) -> None:
    with pytest.raises(qmove.Pinned, match=r"a pin \(qmove.pin\) keeps Sequential .* qmove.unpin"):
        act()


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_what_would_take_a_pinned_model_away_is_refused_and_changes_nothing(
    gpu: GPU, verb: Callable[[Any], Any]
) -> None:
    model = layers(2)
    qmove.pin(model)
    before, quiet = snapshot(model), traces(model)

    refused(lambda: verb(model))

    assert snapshot(model) == before
    if verb is not VERBS["to"]:
        assert traces(model) == quiet
    assert qmove.is_pinned(model) and not qmove.is_parked(model)
    assert qmove.unpin(model)
    assert not qmove.is_pinned(model)
    assert qmove.park(model).nbytes > 0


@pytest.mark.parametrize("wrap", [lambda m: m[0], lambda m: {"a": m}, lambda m: nn.Sequential(m)])
def test_a_part_of_it_and_what_is_nothing_but_it_are_refused_too(
    gpu: GPU, wrap: Callable[[Any], Any]
) -> None:
    model = layers(2)
    qmove.pin(model)

    assert qmove.is_pinned(wrap(model))
    refused(lambda: qmove.park(wrap(model)))
    refused(lambda: qmove.move(wrap(model), "cpu"))

    assert places(model) == {"cuda"}
    assert not qmove.unpin(wrap(model))  # the pin is on the model
    assert qmove.is_pinned(model)


@pytest.mark.parametrize(
    "verb",
    [
        qmove.restore,
        lambda model: qmove.move(model, "cuda:0"),
        qmove.prefetch,
        qmove.prepare,
        lambda model: model(inputs()),
    ],
)
def test_what_leaves_it_where_it_is_works_as_ever(gpu: GPU, verb: Callable[[Any], Any]) -> None:
    model = layers(2)
    qmove.pin(model)
    before = snapshot(model)

    verb(model)

    assert snapshot(model) == before and qmove.is_pinned(model)


@pytest.mark.parametrize("streams", [False, True])
def test_a_parked_model_comes_home_when_it_is_pinned(gpu: GPU, streams: bool) -> None:
    model, momentum = layers(2), {"momentum": torch.ones(64, device="cuda")}
    before = snapshot(model)
    qmove.park(model, extra=[momentum])
    if streams:
        qmove.restore(model, stream=True)

    pinned = qmove.pin(model)

    assert streams or pinned.nbytes > 0
    streaming.wait_for()
    assert snapshot(model) == before and momentum["momentum"].is_cuda
    refused(lambda: qmove.park(model))


def test_a_device_moves_it_there_and_keeps_it_there(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(2)
    qmove.pin(model, "cuda:1")
    assert {parameter.device.index for parameter in model.parameters()} == {1}

    for device in ("cuda:0", "cpu"):
        with pytest.raises(qmove.Pinned):
            qmove.move(model, device)
    late = parked_one()
    model.append(late)  # it was parked from cuda:0, and belongs to the pinned model from now on
    assert qmove.is_parked(model)
    qmove.restore(model, "cuda:0")
    assert {parameter.device.index for parameter in model.parameters()} == {1}

    qmove.pin(model, "cuda:0")  # the new pin takes the place of the old one
    assert {parameter.device.index for parameter in model.parameters()} == {0}
    assert qmove.unpin(model) and not qmove.is_pinned(model)


def test_a_parked_model_can_be_kept_on_another_device(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(2)
    before = contents(model)
    qmove.park(model)

    qmove.pin(model, "cuda:1")

    assert {parameter.device.index for parameter in model.parameters()} == {1}
    assert contents(model) == before


@pytest.mark.simulated
def test_where_there_is_no_room_nothing_is_pinned_that_was_not(gpu: GPU, second_gpu: GPU) -> None:
    model, other = layers(4, width=1024), layers(2)
    qmove.park(model)
    qmove.pin(other)
    simcuda.set_memory(8 << 20)
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.pin(model)
    assert qmove.is_parked(model) and not qmove.is_pinned(model)
    with pytest.raises(qmove.UnknownDevice):
        qmove.pin(other, "cuda:9")
    with pytest.raises(qmove.NoTensors):
        qmove.pin(nn.Identity())
    simcuda.set_memory(4096, 1)
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.pin(other, "cuda:1")
    assert qmove.is_pinned(other)  # its old pin holds
    refused(lambda: qmove.park(other))


def test_a_pinned_part_of_a_pipeline_stays_and_is_reported(gpu: GPU) -> None:
    pipe = {"unet": layers(3), "vae": layers(2)}
    qmove.pin(pipe["unet"])
    before, quiet = snapshot(pipe), traces(pipe["unet"])

    parked = qmove.park(pipe)

    assert places(pipe["unet"]) == {"cuda"} and places(pipe["vae"]) == {"cpu"}
    assert traces(pipe["unet"]) == quiet  # it is awake
    (straggler,) = parked.stragglers
    assert straggler.name == "unet.0.weight and 5 more"
    assert straggler.holders == ("the pin of Sequential (qmove.pin)",)
    assert straggler.nbytes == sum(p.nbytes for p in pipe["unet"].parameters())
    assert qmove.park(pipe).nbytes == 0  # it is parked already, as far as it can be
    with pytest.raises(qmove.CannotMove, match="the pin of Sequential"):
        qmove.park({"unet": pipe["unet"], "vae": layers(1)}, strict=True)
    refused(lambda: qmove.move({"unet": pipe["unet"], "vae": layers(1)}, "cpu"))
    qmove.restore(pipe)
    assert snapshot(pipe) == before


def tied_to(model: nn.Sequential, how: str) -> nn.Sequential:
    other = layers(2)
    if how == "module":
        other[0] = model[0]
    elif how == "parameter":
        other[0].weight = model[0].weight
    else:
        other[0].weight = nn.Parameter(model[0].weight.data, requires_grad=False)
    return other


@pytest.mark.parametrize("how", ["module", "parameter", "storage"])
def test_what_another_model_shares_with_a_pinned_one_stays(gpu: GPU, how: str) -> None:
    model = layers(2)
    other = tied_to(model, how)
    expected = other(inputs())
    qmove.pin(model)
    before, quiet = snapshot(model), traces(model)

    parked = qmove.park(other)

    assert snapshot(model) == before and traces(model) == quiet
    assert other[0].weight.untyped_storage().device.type == "cuda"
    assert other[1].weight.untyped_storage().device.type == "cpu"
    (straggler,) = parked.stragglers
    assert straggler.name.startswith("0.weight")
    assert torch.equal(other(inputs()), expected) and not qmove.is_parked(other)
    refused(lambda: qmove.move(other, "cpu"))
    coming = parked_one()
    qmove.swap(other, coming)
    assert places(coming) == {"cuda"} and snapshot(model) == before


def test_what_comes_into_it_later_is_pinned_with_it(gpu: GPU) -> None:
    model, late = layers(2), layers(1)
    qmove.pin(model)
    model.append(late)

    refused(lambda: qmove.park(late))
    refused(lambda: qmove.park(model))

    del model[2]
    assert qmove.park(late).nbytes > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: layers(2)], ids=["deepcopy", "new"])
def test_a_copy_is_not_pinned(gpu: GPU, copied: Callable[[Any], Any]) -> None:
    model = layers(2)
    qmove.pin(model)
    other = copied(model)

    assert not qmove.is_pinned(other) and not qmove.unpin(other)
    assert qmove.park(other).nbytes > 0 and not qmove.is_parked(model)


def test_a_pin_keeps_nothing_alive_and_ends_with_its_model(gpu: GPU) -> None:
    model = layers(2)
    kept = model[0]
    qmove.pin(model)
    qmove.pin(container := {"a": layers(1), "list": [layers(1)]})
    assert qmove.is_pinned(container) and qmove.is_pinned(dict(container))
    dead = weakref.ref(model), weakref.ref(container["a"])
    del model, container
    gc.collect()

    assert [reference() for reference in dead] == [None, None]
    assert not qmove.is_pinned(kept) and qmove.park(kept).nbytes > 0
    with qmove.resident(kept):
        assert [pin.model for pin in pins._pins] == [kept]
    assert pins._pins == []


def test_a_model_that_is_pinned_while_a_thread_keeps_it_home_is_not_parked_after(gpu: GPU) -> None:
    model = layers(2)
    qmove.park(model)

    with qmove.resident(model):
        qmove.pin(model)

    assert places(model) == {"cuda"}
    assert qmove.unpin(model)
    with qmove.resident(model), qmove.resident(model):
        pass
    assert places(model) == {"cuda"} and pins._pins == []


def test_a_host_is_told(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []
    model = layers(2)
    monkeypatch.setattr(hosting, "_moved", [lambda: told.append(qmove.is_pinned(model))])

    qmove.pin(model)
    qmove.unpin(model)
    qmove.unpin(model)

    assert told == [True, False]
