"""`materialize_meta_tensors`: refusals before the first byte, memory that is lacking, and errors
that change nothing."""

from __future__ import annotations

import gc
from pathlib import Path

import accelerate
import pytest
import torch

import qmove_core as qmove
from qmove_core.errors import MetaTensorsPresent, NotEnoughMemory, UnknownDevice
from tests.builders.device import GPU
from tests.builders.dispatched_models import (
    IN_RAM,
    ON_DISK,
    RELOADED_TIES,
    SPREAD,
    dispatched,
    meta_names,
    spread_llama,
    tokens,
    tower,
)


def test_a_device_that_is_not_there_changes_nothing(tmp_path: Path) -> None:
    model = dispatched(tmp_path, IN_RAM)
    missing = meta_names(model)
    with pytest.raises(UnknownDevice, match="cuda:9"):
        qmove.materialize_meta_tensors(model, "cuda:9")
    assert meta_names(model) == missing


def test_meta_tensors_that_nobody_has_data_for_are_refused() -> None:
    with accelerate.init_empty_weights():
        model = tower()
    with pytest.raises(MetaTensorsPresent, match=r"embedding\.weight.*init_empty_weights"):
        qmove.materialize_meta_tensors(model)


@RELOADED_TIES
def test_after_removed_hooks_the_error_says_why(tmp_path: Path, gpu: GPU) -> None:
    model = spread_llama(tmp_path, "disk")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    with pytest.raises(MetaTensorsPresent, match="hooks were removed after the dispatch"):
        qmove.materialize_meta_tensors(model)


def test_too_little_ram_is_said_before_the_first_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dispatched(tmp_path, ON_DISK)
    missing = meta_names(model)
    needed = sum(
        parameter.nbytes
        for name, parameter in tower().named_parameters()
        if not name.startswith("blocks.0.")
    )
    monkeypatch.setattr(
        "qmove_core.materialize.materialize.read", lambda *_: pytest.fail("something was read")
    )
    gc.collect()  # what earlier tests had in the arena
    qmove.configure(ram_limit=qmove.stats().arena_bytes + needed - 1)
    try:
        with pytest.raises(NotEnoughMemory, match=r"ram_limit.*smaller device_map") as caught:
            qmove.materialize_meta_tensors(model)
    finally:
        qmove.configure(ram_limit=None)
    assert (caught.value.needed, caught.value.free) == (needed, needed - 1)
    assert meta_names(model) == missing and hasattr(model.blocks[1].linear, "_hf_hook")


def test_too_little_vram_is_said_before_the_first_byte(
    tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dispatched(tmp_path, ON_DISK)
    missing = meta_names(model)
    monkeypatch.setattr("qmove_core.devices.free_memory", lambda device: 1000)
    with pytest.raises(NotEnoughMemory, match=r"free VRAM.*target_device='cpu'"):
        qmove.materialize_meta_tensors(model, "cuda:0")
    assert meta_names(model) == missing


def test_weights_in_ram_need_no_ram(tmp_path: Path) -> None:
    model = dispatched(tmp_path, IN_RAM)
    qmove.configure(ram_limit=0)
    try:
        qmove.materialize_meta_tensors(model)
    finally:
        qmove.configure(ram_limit=None)
    assert not meta_names(model)


@pytest.mark.parametrize("source", ["dat", "safetensors"])
def test_progress_counts_the_bytes_and_what_it_raises_changes_nothing(
    tmp_path: Path, gpu: GPU, source: str
) -> None:
    truth = tower().to(gpu.device)(tokens()).cpu()
    model = dispatched(tmp_path, ON_DISK, source)
    missing = meta_names(model)
    allocated = gpu.allocated()

    def give_up(done: int, in_all: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qmove.materialize_meta_tensors(model, progress=give_up)
    assert meta_names(model) == missing
    assert gpu.allocated() == allocated
    assert torch.equal(model(tokens()).cpu(), truth)

    calls: list[tuple[int, int]] = []
    # The dispatch separated the tie, and the weight is read once all the same.
    needed = sum(
        parameter.nbytes
        for name, parameter in tower().named_parameters()
        if not name.startswith("blocks.0.")
    )
    qmove.materialize_meta_tensors(
        model, progress=lambda done, in_all: calls.append((done, in_all))
    )
    assert calls[-1] == (needed, needed)
    assert calls == sorted(calls)


def test_an_error_in_the_commit_leaves_the_dispatch_as_it_was(
    tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dispatched(tmp_path, SPREAD)
    expected = model(tokens()).cpu()
    missing = meta_names(model)
    hooks = [module.__dict__.get("_hf_hook") for module in model.modules()]

    def fail(_inventory: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("qmove_core.model.kinds.refresh", fail)
        qmove.materialize_meta_tensors(model)

    assert meta_names(model) == missing
    assert [module.__dict__.get("_hf_hook") for module in model.modules()] == hooks
    assert torch.equal(model(tokens()).cpu(), expected)
