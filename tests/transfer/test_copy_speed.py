"""The copies are as fast as the link: many small tensors, few large ones, the first park and a
later one."""

from __future__ import annotations

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena
from tests.builders.byte_tensors import MIB, equal, tensors
from tests.builders.device import GPU

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("tried_out")]


@pytest.fixture(params=["pcie4", "pcie5"])
def link(request: pytest.FixtureRequest) -> simcuda.link.Link:
    simcuda.link.use(request.param)
    return simcuda.link.current()


@pytest.mark.parametrize(
    ("name", "keep_mirrors", "reached"),
    [("pcie4", False, 1.05), ("pcie4", True, 1.09), ("pcie5", True, 1.15)],
)
def test_ten_thousand_small_tensors_come_home_at_the_speed_of_the_link(
    gpu: GPU, name: str, keep_mirrors: bool, reached: float
) -> None:
    """The aim is 1.05.

    Each digest that is read by itself takes 15 us, of 3,600 us for all bytes.
    """
    qmove.configure(keep_mirrors=keep_mirrors)
    simcuda.link.use(name)
    model = [part.clone() for part in tensors(10_000 * 20_000)[0].split(20_000)]
    expected = [model[number].cpu() for number in (0, 5000, 9999)]
    parked = qmove.park(model)
    simcuda.clock.reset()

    qmove.restore(model)

    assert parked.nbytes == 200_000_000
    assert simcuda.clock.now() <= reached * parked.nbytes / simcuda.link.current().h2d_pinned
    assert equal([model[number] for number in (0, 5000, 9999)], expected)


@pytest.mark.parametrize(
    ("keep_mirrors", "reached"), [(False, 1.05), (True, 1.08)], ids=["alone", "with digests"]
)
def test_large_tensors_come_home_at_the_speed_of_the_link(
    gpu: GPU, link: simcuda.link.Link, keep_mirrors: bool, reached: float
) -> None:
    qmove.configure(keep_mirrors=keep_mirrors)
    model = tensors(*[20 * MIB] * 10)
    parked = qmove.park(model)
    simcuda.clock.reset()
    qmove.restore(model)
    assert simcuda.clock.now() <= reached * parked.nbytes / link.h2d_pinned


def test_the_first_park_pins_while_it_copies(gpu: GPU, link: simcuda.link.Link) -> None:
    qmove.trim()
    model = tensors(*[20 * MIB] * 10)
    nbytes = sum(tensor.nbytes for tensor in model)
    assert simcuda.host_counters().registered == 0
    simcuda.clock.reset()

    qmove.park(model)

    assert simcuda.host_counters().registered == nbytes
    pinning, copying = nbytes / link.pin_touched, nbytes / link.d2h_pinned
    assert simcuda.clock.now() <= 1.3 * max(pinning, copying)


@pytest.mark.usefixtures("no_digests")
def test_a_later_park_goes_at_the_speed_of_the_link(gpu: GPU, link: simcuda.link.Link) -> None:
    model = tensors(*[20 * MIB] * 10)
    qmove.park(model).restore()
    assert arena.spare_bytes() == 200 * MIB, "its memory is still pinned"
    simcuda.clock.reset()
    parked = qmove.park(model)
    assert simcuda.clock.now() <= 1.05 * parked.nbytes / link.d2h_pinned


def test_storages_travel_together_though_the_walk_meets_them_in_another_order(gpu: GPU) -> None:
    """As int8 layers of bitsandbytes, whose forward changes where their parts hang."""
    copies = []
    for turned_round in (False, True):
        layer = torch.nn.Module()
        for index in range(16):
            setattr(layer, f"part{index}", torch.zeros(5000, device=gpu.device))
        model = torch.nn.ModuleList([layer])
        qmove.park(model)
        qmove.restore(model)  # its host copies stay, as they lie
        if turned_round:
            for index in reversed(range(16)):
                layer.__dict__[f"part{index}"] = layer.__dict__.pop(f"part{index}")
        qmove.park(model)
        simcuda.reset_counters()
        qmove.restore(model)
        copies.append(simcuda.counters().h2d_copies)

    assert copies[0] == copies[1] < 8
