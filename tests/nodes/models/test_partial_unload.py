"""ComfyUI asks for a part of a model's VRAM: `partially_unload` of its entry parks as many layers as
it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qmove_pack.nodes.host.models import managers, pins, residency
from qmove_pack.nodes.host.models.adopted import adopted_of
from qmove_pack.nodes.host.stages import pinning
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core import hosting
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.snapshots import snapshot
from tests.nodes.builders.guarded import Guarded

WIDTH = 1024
LAYER = 4 * (WIDTH * WIDTH + WIDTH)


def taken_in(host: Any, count: int = 4) -> tuple[nn.Sequential, Any]:
    """A model of some layers, and its entry in ComfyUI's list."""
    model = layers(count, width=WIDTH)
    residency.take_in([model])
    (entry,) = [e for e in listed(host) if e.model is model]
    return model, entry


def listed(host: Any) -> list[Any]:
    return [line.model for line in host.management.current_loaded_models]


def ask_for(host: Any, gpu: GPU, nbytes: int) -> None:
    """Has ComfyUI make room for so many bytes more than are free."""
    free = host.management.get_free_memory(gpu.device)
    host.management.free_memory(free + nbytes, gpu.device)


def test_a_request_for_a_little_parks_the_last_layer_and_the_entry_stays_with_its_true_size(
    any_host: Any, gpu: GPU
) -> None:
    model, entry = taken_in(any_host)
    before = snapshot(model)

    ask_for(any_host, gpu, LAYER // 2)

    assert gpu.allocated() == 3 * LAYER
    assert listed(any_host) == [entry]
    assert (entry.loaded_size(), entry.model_size()) == (3 * LAYER, 4 * LAYER)
    assert entry.current_loaded_device() == gpu.device
    qmove.restore(model)
    assert snapshot(model) == before


def test_the_memory_is_free_for_others_and_not_only_in_the_allocators_cache(
    any_host: Any, gpu: GPU
) -> None:
    _model, _entry = taken_in(any_host)
    ask_for(any_host, gpu, LAYER)
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < LAYER


def test_one_request_after_the_other_parks_the_rest_and_the_last_takes_it_out_of_the_list(
    any_host: Any, gpu: GPU
) -> None:
    model, entry = taken_in(any_host)
    for left in (3, 2, 1):
        ask_for(any_host, gpu, LAYER)
        assert (entry.loaded_size(), listed(any_host)) == (left * LAYER, [entry])
    ask_for(any_host, gpu, LAYER)
    assert gpu.allocated() == 0 and listed(any_host) == []
    assert qmove.is_parked(model)


def test_a_partly_parked_model_wakes_as_a_whole_and_is_in_the_books_once(
    any_host: Any, gpu: GPU
) -> None:
    hosting.on_move(residency.note_move)
    model, entry = taken_in(any_host)
    x = inputs(WIDTH)
    expected = model(x)
    ask_for(any_host, gpu, LAYER)

    assert torch.equal(model(x), expected)
    streaming.wait_for()

    residency.register_woken()
    assert listed(any_host) == [entry]
    assert entry.loaded_size() == entry.model_size() == 4 * LAYER


def test_when_comfyui_loads_a_partly_parked_model_again_it_is_home_whole(
    any_host: Any, gpu: GPU
) -> None:
    model, entry = taken_in(any_host)
    before = snapshot(model)
    ask_for(any_host, gpu, LAYER)

    any_host.management.load_models_gpu([entry])

    assert snapshot(model) == before
    assert [e for e in listed(any_host) if e is entry] == [entry]
    assert entry.loaded_size() == 4 * LAYER


def test_a_node_that_is_given_a_partly_parked_model_finds_it_home(any_host: Any, gpu: GPU) -> None:
    model, entry = taken_in(any_host)
    before = snapshot(model)
    ask_for(any_host, gpu, LAYER)
    adopted = adopted_of(model)
    assert adopted is not None and adopted.parked == {gpu.device: LAYER}

    residency.bring_home([adopted])

    assert snapshot(model) == before
    assert listed(any_host) == [entry]


def test_a_model_of_one_layer_is_parked_whole_and_leaves_the_list(any_host: Any, gpu: GPU) -> None:
    model, _entry = taken_in(any_host, 1)
    ask_for(any_host, gpu, LAYER // 2)
    assert gpu.allocated() == 0 and listed(any_host) == []
    assert qmove.is_parked(model)


@pytest.mark.parametrize("choice", [pins.PIN, pins.FORGET])
def test_a_pinned_model_gives_no_part_of_itself(any_host: Any, gpu: GPU, choice: str) -> None:
    model, entry = taken_in(any_host)
    pinning.pin_value(model, choice)
    assert entry.partially_unload(torch.device("cpu"), LAYER) == 0
    assert gpu.allocated() == 4 * LAYER
    pinning.pin_value(model, pins.UNPIN)


def test_what_another_manager_moves_gives_no_part_of_itself(
    any_host: Any, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    _model, entry = taken_in(any_host)
    monkeypatch.setattr(managers, "manager_of", lambda module: "a block swap")
    assert entry.partially_unload(torch.device("cpu"), LAYER) == 0
    assert gpu.allocated() == 4 * LAYER


@pytest.mark.parametrize("wanted", [0, -1.0, 0.5, 1e30])
def test_odd_requests(any_host: Any, gpu: GPU, wanted: float) -> None:
    """ComfyUI computes in floats, and asks for all with 1e30: then it detaches the entry next."""
    _model, entry = taken_in(any_host)
    assert entry.partially_unload(torch.device("cpu"), wanted) == (LAYER if wanted == 0.5 else 0)
    entry.partially_unload(torch.device("cpu"), wanted, force_patch_weights=True)


def test_where_the_host_has_no_ram_for_it_nothing_leaves(any_host: Any, gpu: GPU) -> None:
    model, entry = taken_in(any_host)
    before = snapshot(model)
    qmove.configure(ram_limit=LAYER // 2)
    assert entry.partially_unload(torch.device("cpu"), LAYER) == 0
    assert snapshot(model) == before


def test_a_part_of_a_model_over_two_gpus_is_freed_on_the_one_that_was_asked_for(
    any_host: Any, gpu: GPU, second_gpu: GPU
) -> None:
    model = layers(4, width=WIDTH)
    model[2].to("cuda:1")
    model[3].to("cuda:1")
    residency.take_in([model])
    on_first, on_second = sorted(listed(any_host), key=lambda entry: entry.load_device.index)

    assert on_first.partially_unload(torch.device("cpu"), LAYER) == LAYER

    assert (on_first.loaded_size(), on_second.loaded_size()) == (LAYER, 2 * LAYER)
    qmove.restore(model)


@pytest.mark.simulated
def test_a_copy_that_fails_leaves_the_model_home_and_comfyui_is_told_0(
    any_host: Any, gpu: GPU, guarded: Guarded
) -> None:
    guarded.expect("park a part of a model for ComfyUI, which needs its memory")
    model, entry = taken_in(any_host)
    before = snapshot(model)
    with simcuda.fail("copy", nth=1):
        assert entry.partially_unload(torch.device("cpu"), LAYER) == 0
    assert snapshot(model) == before
