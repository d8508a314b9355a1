"""`resident(model, at_most=bytes)`: a model that is larger than that runs, exact, and its peak stays
below the limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.parking import rolling
from tests.builders.device import GPU
from tests.builders.link import copies
from tests.builders.models import inputs, layers
from tests.builders.places import parked_names
from tests.builders.snapshots import contents, snapshot

MIB = 1 << 20
WIDTH = 1024
LAYER = 4 * (WIDTH * WIDTH + WIDTH)  # bytes of a layer: a little more than 4 MiB


def big(count: int = 12) -> nn.Sequential:
    return layers(count, width=WIDTH)


def peak_of_computing(gpu: GPU, model: nn.Module, x: torch.Tensor) -> int:
    """Bytes that a forward of a model that is home takes beside it."""
    there = torch.cuda.memory_allocated()
    gpu.reset_peak()
    model(x)
    return torch.cuda.max_memory_allocated() - there


@pytest.mark.simulated
@pytest.mark.parametrize("start", ["home", "parked", "parked in part"])
def test_a_model_three_times_the_limit_runs_exact_with_the_peak_below_it(
    gpu: GPU, start: str
) -> None:
    twin, x = big(), inputs(WIDTH)
    expected, computing = twin(x), peak_of_computing(gpu, twin, x)
    del twin
    model = big()
    before = snapshot(model)
    if start != "home":
        qmove.park(model, free=5 * LAYER if start == "parked in part" else None)
    limit = 4 * LAYER + LAYER // 2

    with qmove.resident(model, at_most=limit):
        there = torch.cuda.memory_allocated() - gpu.before - x.nbytes - expected.nbytes
        assert there <= limit
        gpu.reset_peak()
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert gpu.peak() - x.nbytes - expected.nbytes - computing <= limit
        assert qmove.is_parked(model)

    assert len(parked_names(model)) >= {"home": 0, "parked": 24, "parked in part": 10}[start]
    assert qmove.is_parked(model) == (start != "home")
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.simulated
def test_it_runs_on_a_device_that_is_too_small_for_it(gpu: GPU) -> None:
    model, x = big(), inputs(WIDTH)
    expected = model(x)
    qmove.park(model)
    simcuda.set_memory(str(6 * LAYER // MIB) + "MiB", device=0)
    with pytest.raises(qmove.NotEnoughMemory):
        model(x)

    with qmove.resident(model, at_most=5 * LAYER):
        for _ in range(2):
            assert torch.equal(model(x), expected)

    assert qmove.is_parked(model)
    assert len(parked_names(model)) == 24


@pytest.mark.simulated
def test_only_what_does_not_fit_crosses_the_link_and_nothing_goes_back_out(gpu: GPU) -> None:
    model, x = big(), inputs(WIDTH)
    expected = model(x)
    qmove.park(model)
    with qmove.resident(model, at_most=6 * LAYER + LAYER // 2):
        stay = 24 - len(parked_names(model))
        assert stay == 8, "four of twelve layers stay, and two are there at a time"
        model(x)
        for _ in range(2):
            with copies() as seen:
                assert torch.equal(model(x), expected)
            came = sum(copy.nbytes for copy in seen if copy.direction == "h2d")
            went = sum(copy.nbytes for copy in seen if copy.direction == "d2h")
            assert came <= 8 * LAYER + 4096
            assert went < LAYER // 8, "digests alone"


@pytest.mark.simulated
def test_the_next_layer_is_under_way_while_one_computes(gpu: GPU) -> None:
    model, x = big(), inputs(WIDTH)
    under_way: list[set[str]] = []
    qmove.park(model)
    with qmove.resident(model, at_most=4 * LAYER + LAYER // 2):
        for _ in range(2):
            model(x)
        (running,) = rolling._running
        for layer in model:
            layer.register_forward_hook(
                lambda *_: under_way.append({u.name for u in running._units if u.waits})
            )
        model(x)
        streaming_names = [unit.name for unit in running._units]
    following = dict(zip(streaming_names, streaming_names[1:] + streaming_names[:1], strict=True))
    for index, names in enumerate(under_way):
        if str(index) in following:
            assert names == {following[str(index)]}


def test_a_model_that_fits_is_home_and_nothing_is_on_it(gpu: GPU) -> None:
    model, x = layers(4), inputs()
    expected, before = model(x), snapshot(model)
    qmove.park(model)
    with qmove.resident(model, at_most=qmove.inventory(model).nbytes) as restored:
        assert restored.nbytes == qmove.inventory(model).nbytes
        assert snapshot(model) == before
        assert {type(module) for module in model.modules()} == {nn.Sequential, nn.Linear}
        assert torch.equal(model(x), expected)
    assert qmove.is_parked(model)


def test_what_stays_carries_nothing(gpu: GPU) -> None:
    model, x = big(), inputs(WIDTH)
    with qmove.resident(model, at_most=6 * LAYER + LAYER // 2):
        model(x)
        for layer in model[:4]:
            assert type(layer) is nn.Linear and type(layer.weight) is nn.Parameter
            assert not layer._forward_hooks and "forward" not in layer.__dict__
        assert type(model) is nn.Sequential
    assert {type(module) for module in model.modules()} == {nn.Sequential, nn.Linear}


@pytest.mark.parametrize("how", ["in place", "through data", "by an operator"])
def test_a_change_inside_of_the_body_is_not_lost(gpu: GPU, how: str) -> None:
    model, twin, x = big(), big(), inputs(WIDTH)
    qmove.park(model)

    def change(layer: Any) -> None:
        with torch.no_grad():
            if how == "in place":
                layer.weight.mul_(0.5)
            elif how == "through data":
                layer.weight.data[3, 7] += 1
            else:
                layer.bias.copy_(torch.ones(WIDTH, device="cuda"))

    with qmove.resident(model, at_most=4 * LAYER + LAYER // 2):
        for index in (0, 3, 7, 11):
            change(model[index])
            change(twin[index])
            for _ in range(2):
                assert torch.equal(model(x), twin(x))
    qmove.restore(model)
    assert contents(model) == contents(twin)


def test_an_exception_in_the_body_leaves_the_model_as_it_was(gpu: GPU) -> None:
    for parked in (True, False):
        model, x = big(), inputs(WIDTH)
        before = snapshot(model)
        if parked:
            qmove.park(model)
        with pytest.raises(KeyError), qmove.resident(model, at_most=4 * LAYER):
            model(x)
            raise KeyError("from the body")
        assert qmove.is_parked(model) == parked
        assert rolling._running == []
        qmove.restore(model)
        assert snapshot(model) == before


def test_a_layer_larger_than_the_limit_is_refused_with_its_name(gpu: GPU) -> None:
    model = big(3)
    before = snapshot(model)
    qmove.park(model)
    with (
        pytest.raises(qmove.NotEnoughMemory, match=r"at_most of qmove.resident.*layer '0'") as e,
        qmove.resident(model, at_most=LAYER - 1),
    ):
        pass
    assert e.value.needed == LAYER and e.value.place == "cuda:0"
    assert rolling._running == [] and len(parked_names(model)) == 6
    qmove.restore(model)
    assert snapshot(model) == before


def test_a_negative_limit_is_refused(gpu: GPU) -> None:
    with (
        pytest.raises(ValueError, match="at_most is a number of bytes, not -1"),
        qmove.resident(layers(1), at_most=-1),
    ):
        pass


@pytest.mark.simulated
def test_with_room_for_one_layer_it_runs_one_layer_at_a_time(gpu: GPU) -> None:
    model, x = big(4), inputs(WIDTH)
    expected = model(x)
    qmove.park(model)
    with qmove.resident(model, at_most=LAYER + LAYER // 2):
        gpu.reset_peak()
        for _ in range(2):
            assert torch.equal(model(x), expected)
        assert gpu.peak() < 2 * LAYER


class Block(nn.Module):
    """A layer of four weights, each of which runs alone."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(
            {name: layers(1, width=WIDTH)[0] for name in ("q", "k", "v", "out")}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in self.parts.values():
            x = part(x)
        return x


@pytest.mark.simulated
def test_a_layer_larger_than_the_limit_comes_module_by_module(gpu: GPU) -> None:
    model, x = nn.Sequential(Block(), Block()), inputs(WIDTH)
    expected, computing = model(x), peak_of_computing(gpu, model, x)
    before, limit = snapshot(model), 2 * LAYER + LAYER // 2
    qmove.park(model)
    with qmove.resident(model, at_most=limit):
        gpu.reset_peak()
        for _ in range(3):
            assert torch.equal(model(x), expected)
        assert gpu.peak() - x.nbytes - expected.nbytes - computing <= limit
    with (
        pytest.raises(qmove.NotEnoughMemory, match=r"layer '0\.parts\.q'"),
        qmove.resident(model, at_most=LAYER - 1),
    ):
        pass
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.simulated
def test_many_small_layers_come_and_go_a_batch_at_a_time(gpu: GPU) -> None:
    """Each time costs the host some milliseconds: half of the room for layers that do not fit goes,
    and comes, in one move."""
    model, x = layers(240, width=256), inputs(256)
    layer = 4 * (256 * 256 + 256)
    expected, computing = model(x), peak_of_computing(gpu, model, x)
    qmove.park(model)
    with qmove.resident(model, at_most=80 * layer):
        (running,) = rolling._running
        units, room = len(running._units), running._room[gpu.device]
        model(x)
        moves: list[list[str]] = []
        bring = rolling.Rolling._bring

        def noting(self: rolling.Rolling, units: list[Any]) -> None:
            moves.append([unit.name for unit in units])
            bring(self, units)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rolling.Rolling, "_bring", noting)
            gpu.reset_peak()
            assert torch.equal(model(x), expected)
        assert units == 240 - 56, "a quarter of the limit is for those that come and go"
        assert sum(map(len, moves)) >= units - room // layer
        assert len(moves) <= units // (room // layer // 2) + 1
        assert gpu.peak() - x.nbytes - expected.nbytes - computing <= 80 * layer


def test_what_its_layers_have_on_the_host_stays_there(gpu: GPU) -> None:
    """On a model that was never parked before, too: nothing has said yet what is home there."""
    model = layers(3)
    for layer in model:
        layer.register_buffer("on_host", torch.ones(64))
    before = snapshot(model)
    with torch.no_grad():
        expected = model(inputs())
        with qmove.resident(model, at_most=gpu.allocated() - 1):
            assert torch.equal(model(inputs()), expected)
    qmove.restore(model)

    assert snapshot(model) == before
