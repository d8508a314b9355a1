"""ComfyUI manages what it did not load: the same stories on a fake host and, with COMFYUI_DIR, on a
real one."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from qmove_pack.nodes.host import hooks
from qmove_pack.nodes.host.models import entries, pins, residency
from qmove_pack.nodes.host.models.adopted import adopted_of
from qmove_pack.nodes.host.stages import pinning
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core import hosting
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

MIB = 1 << 20


def big(mib: int = 16, device: str = "cuda:0") -> nn.Sequential:
    """Four layers of `mib` MiB in all."""
    return layers(4, width=int((mib * MIB / 16) ** 0.5), device=device)


def nbytes(model: nn.Module) -> int:
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())


def entries_of(host: Any, model: object) -> list[Any]:
    return [
        line.model for line in host.management.current_loaded_models if line.model.model is model
    ]


def test_an_adopted_model_is_one_entry_with_its_true_size(any_host: Any, gpu: GPU) -> None:
    model = big()

    residency.take_in([model])
    residency.take_in([model])

    (entry,) = entries_of(any_host, model)
    assert len(any_host.management.current_loaded_models) == 1
    assert entry.model_size() == entry.loaded_size() == nbytes(model)
    assert entry.load_device == any_host.management.get_torch_device() == gpu.device


def test_when_comfyui_needs_vram_it_parks_the_model_by_itself(any_host: Any, gpu: GPU) -> None:
    model, empty = big(), torch.cuda.memory_allocated()
    residency.take_in([model])
    before = snapshot(model)

    any_host.management.free_memory(1e30, gpu.device)

    assert gpu.allocated() == empty - nbytes(model) == 0
    assert qmove.is_parked(model)
    assert entries_of(any_host, model) == []
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("choice", [pins.PIN, "cuda:0", pins.FORGET])
def test_a_pinned_model_is_not_evicted_until_it_is_unpinned(
    any_host: Any, gpu: GPU, choice: str
) -> None:
    model, other = big(), big(17)
    residency.take_in([model, other])
    before = snapshot(model)
    pinning.pin_value(model, choice)

    for _ in range(2):
        any_host.management.free_memory(1e30, gpu.device)
        any_host.management.unload_all_models()
        assert gpu.allocated() == nbytes(model)
    assert any_host.management.current_loaded_models == []

    assert snapshot(model) == before
    pinning.pin_value(model, pins.UNPIN)
    any_host.management.free_memory(1e30, gpu.device)
    assert gpu.allocated() == 0 and qmove.is_parked(model)


def test_a_request_that_is_met_already_parks_nothing(any_host: Any, gpu: GPU) -> None:
    model = big()
    residency.take_in([model])

    any_host.management.free_memory(MIB, gpu.device)

    assert gpu.allocated() == nbytes(model)
    assert len(entries_of(any_host, model)) == 1


def test_unload_all_models_parks_it(any_host: Any, gpu: GPU) -> None:
    model = big()
    residency.take_in([model])

    any_host.management.unload_all_models()

    assert gpu.allocated() == 0
    assert any_host.management.current_loaded_models == []


def test_after_an_eviction_the_allocators_cache_is_given_back(
    any_host: Any, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = big()
    residency.take_in([model])
    emptied: list[bool] = []
    monkeypatch.setattr(
        any_host.management, "soft_empty_cache", lambda *_args: emptied.append(True)
    )

    residency.park(residency.take_in([model]))

    assert emptied
    assert torch.cuda.memory_reserved() == 0


@pytest.mark.simulated
def test_loading_a_model_makes_comfyui_evict_others_and_brings_it_home_bit_for_bit(
    any_host: Any, gpu: GPU
) -> None:
    simcuda.set_memory(256 * MIB)
    first = big(100)
    before = snapshot(first)
    adopted = residency.take_in([first])
    residency.park(adopted)
    second, third = big(100), big(100)
    residency.take_in([second, third])

    residency.bring_home(adopted)

    assert snapshot(first) == before
    assert qmove.is_parked(second) or qmove.is_parked(third)
    assert len(entries_of(any_host, first)) == 1


@pytest.mark.simulated
def test_models_that_are_loaded_together_do_not_evict_each_other(any_host: Any, gpu: GPU) -> None:
    simcuda.set_memory(256 * MIB)
    pair = [big(100), big(100)]
    adopted = residency.take_in(pair)
    residency.park(adopted)

    residency.bring_home(adopted)

    assert gpu.allocated() == nbytes(pair[0]) + nbytes(pair[1])
    assert [len(entries_of(any_host, model)) for model in pair] == [1, 1]


def test_asking_again_for_a_resident_model_moves_nothing(any_host: Any, gpu: GPU) -> None:
    model = big()
    (adopted,) = residency.take_in([model])
    moves: list[bool] = []
    hosting.on_move(lambda: moves.append(True))

    any_host.management.load_models_gpu(entries.entries_of(adopted), force_full_load=True)

    assert moves == []
    assert len(entries_of(any_host, model)) == 1
    assert gpu.allocated() == nbytes(model)


def test_no_entry_outlives_its_model_and_nothing_stays_in_memory(any_host: Any, gpu: GPU) -> None:
    model = big()
    residency.take_in([model])

    del model

    assert any_host.management.current_loaded_models == []
    assert gpu.allocated() == 0


def test_a_parked_model_that_is_deleted_leaves_no_host_memory(any_host: Any) -> None:
    model = big()
    residency.park(residency.take_in([model]))
    assert qmove.stats().arena_bytes >= nbytes(model)

    del model
    gc.collect()

    assert qmove.stats().arena_bytes == 0
    assert any_host.management.current_loaded_models == []


def test_a_model_over_two_gpus_has_an_entry_for_each_with_that_ones_bytes(
    any_host: Any, gpu: GPU, second_gpu: GPU
) -> None:
    model = nn.ModuleList([big(16, "cuda:0"), big(8, "cuda:1")])
    before = snapshot(model)

    (adopted,) = residency.take_in([model])

    sizes = {str(entry.load_device): entry.loaded_size() for entry in entries_of(any_host, model)}
    assert sizes == {"cuda:0": nbytes(model[0]), "cuda:1": nbytes(model[1])}
    residency.park([adopted])
    assert gpu.allocated() == second_gpu.allocated() == 0
    assert entries_of(any_host, model) == []
    residency.bring_home([adopted])
    assert snapshot(model) == before
    assert len(entries_of(any_host, model)) == 2


def test_what_one_gpu_needs_takes_the_model_off_both(
    any_host: Any, gpu: GPU, second_gpu: GPU
) -> None:
    model = nn.ModuleList([big(16, "cuda:0"), big(8, "cuda:1")])
    residency.take_in([model])

    any_host.management.free_memory(1e30, second_gpu.device)

    assert gpu.allocated() == second_gpu.allocated() == 0
    assert sum(entry.loaded_size() for entry in entries_of(any_host, model)) == 0


def test_a_model_and_its_part_are_counted_once(any_host: Any) -> None:
    whole = nn.Sequential(big(16), big(8))
    residency.take_in([whole[0]])

    residency.take_in([whole])
    residency.take_in([whole[1]])

    lines = any_host.management.current_loaded_models
    assert sum(line.model.loaded_size() for line in lines) == nbytes(whole)
    assert [line.model.model for line in lines] == [whole]
    assert adopted_of(whole[0]) is adopted_of(whole)


def test_tied_weights_of_two_models_are_counted_once(any_host: Any) -> None:
    first, second = big(16), big(16)
    second[0].weight = first[0].weight

    residency.take_in([first, second])

    lines = any_host.management.current_loaded_models
    assert sum(line.model.loaded_size() for line in lines) == torch.cuda.memory_allocated()


def test_sizes_stay_true_when_the_owner_moves_the_model_himself(any_host: Any) -> None:
    model = big()
    (adopted,) = residency.take_in([model])
    (entry,) = entries.entries_of(adopted)

    model.to("cpu")

    assert entry.loaded_size() == 0
    assert entry.current_loaded_device() == torch.device("cpu")


def test_sizes_follow_weights_that_are_added_later(any_host: Any) -> None:
    model = big()
    (adopted,) = residency.take_in([model])

    model.append(nn.Linear(512, 512, device="cuda:0"))
    residency.take_in([model])

    (entry,) = entries.entries_of(adopted)
    assert entry.loaded_size() == nbytes(model)


def test_an_object_that_is_no_module_is_parked_with_its_plain_tensors(
    any_host: Any, gpu: GPU
) -> None:
    class Opaque:
        def __init__(self) -> None:
            self.tables, self.net = [torch.ones(1024, device=gpu.device)], big()

    model = Opaque()
    residency.park(residency.take_in([model.net, model], registered=False))

    assert gpu.allocated() == 0
    assert not any_host.management.current_loaded_models


def test_a_model_that_cannot_be_parked_does_not_break_comfyuis_eviction(
    any_host: Any, gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    model, other = big(), big(8)
    residency.take_in([model, other])
    qmove.configure(ram_limit=nbytes(other))
    try:
        any_host.management.free_memory(1e30, gpu.device)
    finally:
        qmove.configure(ram_limit=None)

    assert gpu.allocated() == nbytes(model)
    assert qmove.is_parked(other)
    assert "limit: ram_limit of qmove.configure" in caplog.text


def test_a_model_that_is_not_in_the_books_is_parked_as_well_and_its_vram_is_back(
    any_host: Any, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopted = residency.take_in([big()], registered=False)
    emptied: list[bool] = []
    monkeypatch.setattr(
        any_host.management, "soft_empty_cache", lambda *_args: emptied.append(True)
    )

    residency.park(adopted)

    assert adopted[0].resident == {}
    assert emptied == [True]


def test_an_entry_that_is_dropped_leaves_its_model_where_it_is(any_host: Any, gpu: GPU) -> None:
    part = big()
    residency.take_in([part])

    whole = nn.Sequential(part)
    residency.take_in([whole])

    assert gpu.allocated() == nbytes(whole)
    assert not qmove.is_parked(whole)


@pytest.mark.simulated
def test_a_model_that_finds_no_room_stays_parked_and_who_asked_for_it_is_told(
    any_host: Any, gpu: GPU
) -> None:
    adopted = residency.take_in([model := big(100)])
    residency.park(adopted)
    simcuda.set_memory(64 * MIB)

    with pytest.raises(qmove.NotEnoughMemory):
        residency.bring_home(adopted)

    assert qmove.is_parked(model)
    any_host.management.load_models_gpu(
        entries.entries_of(adopted[0]), force_full_load=True
    )  # the host by itself


def test_a_load_that_failed_does_not_keep_the_model_alive(any_host: Any, gpu: GPU) -> None:
    adopted = residency.take_in([model := big(100)])
    residency.park(adopted)
    simcuda.set_memory(64 * MIB)
    with pytest.raises(qmove.NotEnoughMemory):
        residency.bring_home(adopted)
    any_host.management.load_models_gpu(entries.entries_of(adopted[0]), force_full_load=True)
    any_host.management.current_loaded_models.clear()
    died = weakref.ref(model)

    del model, adopted
    gc.collect()

    assert died() is None
    assert qmove.stats().arena_bytes == 0


def test_a_model_that_woke_by_itself_is_in_the_books_again(any_host: Any) -> None:
    model = big()
    hosting.on_move(residency.note_move)
    residency.park(residency.take_in([model]))
    assert entries_of(any_host, model) == []

    model(torch.zeros(1, model[0].in_features, device="cuda:0"))
    residency.register_woken()

    assert len(entries_of(any_host, model)) == 1


def test_a_model_that_a_pack_has_thrown_out_of_the_list_is_evicted_all_the_same(
    any_host: Any, gpu: GPU
) -> None:
    model = big()
    residency.take_in([model])
    assert residency.keep_listed()
    try:
        any_host.management.current_loaded_models.clear()

        any_host.management.free_memory(MIB, gpu.device)
        assert len(entries_of(any_host, model)) == 1
        any_host.management.free_memory(1e30, gpu.device)
    finally:
        hooks.unwrap_all()

    assert gpu.allocated() == 0
    assert any_host.management.current_loaded_models == []


def test_a_model_that_comfyui_lists_anew_is_in_the_list_once(any_host: Any, gpu: GPU) -> None:
    """On a repeated request it takes the line out, makes room, and puts it in again."""
    model = big()
    (adopted,) = residency.take_in([model])
    assert residency.keep_listed()
    try:
        for _ in range(2):
            any_host.management.load_models_gpu(entries.entries_of(adopted), force_full_load=True)
            assert len(entries_of(any_host, model)) == 1
        any_host.management.current_loaded_models.clear()
        any_host.management.free_memory(MIB, gpu.device)
    finally:
        hooks.unwrap_all()

    assert len(entries_of(any_host, model)) == 1
    assert gpu.allocated() == nbytes(model)
