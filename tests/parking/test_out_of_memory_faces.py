"""Out of memory has many faces. A move that meets one goes on when there is room after all, and is
else a NotEnoughMemory with figures, the model where it was."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Callable
from typing import Any

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import devices, errors, for_hosts
from qmove_core.memory import arena, blocks
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated


def accelerator_error(text: str, code: int) -> BaseException:
    error = torch.AcceleratorError(text)
    error.error_code = code
    return error


def commit_limit() -> BaseException:
    error = OSError(errno.EINVAL, "The paging file is too small for this operation to complete")
    error.winerror = 1455  # type: ignore[attr-defined, unused-ignore]
    return error


# Made anew each time: an exception that is kept keeps the frames that it went through.
FACES: dict[str, Callable[[], BaseException]] = {
    "OutOfMemoryError": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..."),
    "AcceleratorError": lambda: accelerator_error("CUDA error: out of memory", 2),
    "AcceleratorError by its code": lambda: accelerator_error("cudaErrorMemoryAllocation", 2),
    "RuntimeError of the driver": lambda: RuntimeError(
        "CUDA error: out of memory\nCUDA kernel ..."
    ),
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."),
    "HIP": lambda: RuntimeError("HIP out of memory. Tried to allocate 2 GiB"),
    "MPS": lambda: RuntimeError("MPS backend out of memory (MPS allocated: 9.07 GB)"),
    "XPU": lambda: RuntimeError("XPU out of memory. Tried to allocate 2 GiB"),
}
ON_HOST: dict[str, Callable[[], BaseException]] = {
    "MemoryError": MemoryError,
    "a map": lambda: OSError(errno.ENOMEM, "Cannot allocate memory"),
    "the commit limit of Windows": commit_limit,
    "PyTorch's CPU allocator": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"
    ),
}
OTHERS: dict[str, Callable[[], BaseException]] = {
    "another RuntimeError": lambda: RuntimeError("CUDA error: an illegal memory access was ..."),
    "another AcceleratorError": lambda: accelerator_error("CUDA error: invalid argument", 1),
    "another OSError": lambda: FileNotFoundError(errno.ENOENT, "No such file"),
    "an error of qmove": lambda: qmove.QMoveError("a model is out of memory"),
}


@pytest.mark.parametrize("name", FACES)
def test_every_face_of_a_full_device_is_known(name: str) -> None:
    assert errors.is_out_of_memory(FACES[name]())
    assert not errors.is_out_of_host_memory(FACES[name]())


@pytest.mark.parametrize("name", ON_HOST)
def test_every_face_of_a_full_host_is_known_and_none_is_taken_for_a_full_device(name: str) -> None:
    """Who takes it for one parks models, which takes more RAM."""
    assert errors.is_out_of_host_memory(ON_HOST[name]())
    assert not errors.is_out_of_memory(ON_HOST[name]())


@pytest.mark.parametrize("name", OTHERS)
def test_no_other_error_is_taken_for_one(name: str) -> None:
    assert not errors.is_out_of_memory(OTHERS[name]())
    assert not errors.is_out_of_host_memory(OTHERS[name]())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FACES)
def test_a_restore_is_tried_once_more_with_what_the_host_program_gives(
    gpu: GPU, name: str, stream: bool
) -> None:
    model = layers()
    before = snapshot(model)
    nbytes = qmove.park(model).nbytes
    free, asked = devices.free_memory(gpu.device) or 0, []
    planned = simcuda.fail("alloc", times=999, error=FACES[name]())
    planned.__enter__()

    def make_room(device: torch.device, wanted: int) -> None:
        asked.append((device, wanted))
        planned.__exit__(None, None, None)

    for_hosts.on_shortage(make_room)
    qmove.restore(model, stream=stream)
    assert snapshot(model) == before
    assert asked == [(gpu.device, nbytes + free)], "as much again as seemed to be free"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", FACES)
def test_a_restore_that_finds_no_room_twice_says_so_with_figures(
    gpu: GPU, name: str, stream: bool
) -> None:
    model = layers()
    before = snapshot(model)
    nbytes = qmove.park(model).nbytes
    asked: list[int] = []
    for_hosts.on_shortage(lambda _device, wanted: asked.append(wanted))
    with (
        simcuda.fail("alloc", times=999, error=FACES[name]()),
        pytest.raises(qmove.NotEnoughMemory, match="in pieces") as caught,
    ):
        qmove.restore(model, stream=stream)
    assert (caught.value.place, caught.value.needed) == ("cuda:0", nbytes)
    assert caught.value.free > nbytes and len(asked) == 1
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert qmove.is_parked(model) and gpu.allocated() == 0
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("act", [qmove.park, lambda m: qmove.move(m, "cpu")], ids=["park", "move"])
@pytest.mark.parametrize("name", FACES)
def test_a_park_on_a_full_device_needs_none_of_it(
    gpu: GPU, name: str, act: Callable[[Any], Any]
) -> None:
    model = layers()
    before = {k: v.cpu() for k, v in model.state_dict().items()}
    with simcuda.fail("alloc", times=999, error=FACES[name]()):
        act(model)
    assert gpu.allocated() == 0
    assert all(torch.equal(v.cpu(), before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", FACES)
def test_a_park_that_the_driver_has_no_room_for_is_tried_once_more(gpu: GPU, name: str) -> None:
    """A stream, an event, a kernel's code: the driver takes memory by itself."""
    model = layers()
    before = snapshot(model)
    with simcuda.fail("copy", error=FACES[name]()) as fault:
        qmove.park(model)
    assert fault.fired == 1 and gpu.allocated() == 0
    qmove.restore(model)
    assert snapshot(model) == before
    with (
        simcuda.fail("copy", times=99, error=FACES[name]()),
        pytest.raises(qmove.NotEnoughMemory, match=r"on cuda:0\. Free there"),
    ):
        qmove.configure(keep_mirrors=False)
        qmove.park(model)
    assert not qmove.is_parked(model) and snapshot(model) == before


@pytest.mark.parametrize("name", ["MemoryError", "a map", "the commit limit of Windows"])
def test_a_park_for_which_the_system_gives_no_ram_says_so_with_figures(
    gpu: GPU, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = layers()
    before = snapshot(model)
    qmove.trim()

    error = ON_HOST[name]()

    def refused(_nbytes: int) -> mmap.mmap:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(blocks, "map_memory", refused)
        with pytest.raises(qmove.NotEnoughMemory, match="what the system gives") as caught:
            qmove.park(model)
    assert caught.value.place == "cpu"
    assert caught.value.needed == arena.bytes_for([t.nbytes for t in model.parameters()])
    assert caught.value.__cause__ is error
    assert snapshot(model) == before
    qmove.park(model)
