"""A registration that the driver refuses leaves no error behind: not in this thread, not queued on
the device, also where the device has no byte left."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena, pinning
from simcuda.library import sim
from tests.builders.arena import MIB, block_of, nothing
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("empty_arena")]

READ_ONLY = 8  # cudaHostRegisterReadOnly


def nothing_is_left() -> bool:
    """What an operator, a wait and a free of somebody else find."""
    assert simcuda.last_error() == 0
    torch.cuda.synchronize()
    torch.cuda.current_stream().synchronize()
    return torch.ones(3, device="cuda").sum().item() == 3


def test_a_refused_registration_is_seen_again_at_the_next_operator_and_at_the_next_wait() -> None:
    """So does the simulator, as drivers do: what the tests below would find."""
    with simcuda.fail("pin"):
        code = torch.cuda.cudart().cudaHostRegister(4096, 4096, pinning.PORTABLE)
    assert int(code) == simcuda.last_error() == 2
    with pytest.raises(torch.AcceleratorError, match="an earlier runtime call failed"):
        torch.cuda._sleep(0)
    with pytest.raises(torch.AcceleratorError, match="a refused registration left its error"):
        torch.cuda.synchronize()
    assert nothing_is_left()


def test_a_refusal_leaves_no_error_in_the_thread_and_none_on_the_device() -> None:
    (storage,) = arena.allocate([MIB], nothing)
    with simcuda.fail("pin") as fault:
        assert not block_of(storage).pin(0, MIB)
    assert fault.fired == 1 and nothing_is_left()


def test_a_refusal_on_a_full_device_leaves_none_either() -> None:
    """An allocation would fail before any kernel could take the error away."""
    (storage,) = arena.allocate([MIB], nothing)
    simcuda.set_memory(torch.cuda.memory_allocated())
    with simcuda.fail("pin"), simcuda.fail("alloc", times=99) as allocations:
        assert not block_of(storage).pin(0, MIB)
    assert allocations.fired == 0
    assert simcuda.last_error() == 0
    torch.cuda.synchronize()


def test_the_error_of_a_copy_under_way_is_not_taken_for_that_of_a_refusal() -> None:
    (storage,) = arena.allocate([MIB], nothing)
    host, there = torch.zeros(8).pin_memory(), torch.ones(8, device="cuda")
    with simcuda.fail("copy", late=True):
        host.copy_(there, non_blocking=True)
        with simcuda.fail("pin"):
            assert not block_of(storage).pin(0, MIB)
        with pytest.raises(torch.AcceleratorError, match="injected into a device-to-host copy"):
            torch.cuda.synchronize()
    assert nothing_is_left()


def test_an_unlocking_that_is_refused_leaves_none() -> None:
    pinning._registered[4096] = 0  # which the driver knows nothing of
    assert not pinning.unregister(4096)
    assert nothing_is_left()


def test_the_runtime_that_is_loaded_is_asked_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "libcudart-d0da41ae.so.12"
    runtime.symlink_to(sim()._name)
    libraries = {"/usr/lib/libc.so.6", str(runtime), str(tmp_path / "libcudart.so.11")}
    monkeypatch.setattr(pinning, "_loaded_libraries", lambda: libraries)
    pinning._get_last_error.cache_clear()
    try:
        (get_last_error,) = pinning._get_last_error()
        sim().sim_set_last_error(712)
        assert get_last_error() == 712 and simcuda.last_error() == 0
        seen: list[int] = []
        monkeypatch.setattr(torch.cuda, "_sleep", lambda _: seen.append(simcuda.last_error()))
        with simcuda.fail("pin"):
            assert not pinning.register(4096, 4096)
        assert seen == [0], "it was taken away before any kernel"
    finally:
        pinning._get_last_error.cache_clear()
    assert nothing_is_left()


def test_the_libraries_that_are_loaded_are_found() -> None:
    assert sim()._name in pinning._loaded_libraries()


def test_a_model_is_parked_and_restored_where_the_driver_refuses_from_some_piece_on() -> None:
    model = layers(3, width=256)
    before = snapshot(model)
    for nth in range(1, 6):
        with simcuda.fail("pin", nth=nth, times=99):
            qmove.park(model)
            assert nothing_is_left()
            qmove.restore(model)
            assert nothing_is_left()
        assert snapshot(model) == before
        qmove.trim()


def test_registering_a_file_read_only_is_refused_as_on_cards_without_the_hosts_page_tables() -> (
    None
):
    code = torch.cuda.cudart().cudaHostRegister(4096, 4096, pinning.PORTABLE | READ_ONLY)
    assert int(code) == 801
    pinning._clear_error(0)
    assert nothing_is_left()
