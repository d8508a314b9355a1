"""The fixtures of all tests: the devices, and what no test may leave behind."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import simcuda
from tests.builders.collector import set_everything_aside
from tests.builders.device import GPU, HOSTILE, SIMULATED, hostile, requested_bytes

import torch  # isort: skip  (after the simulated device)

# On a CPU with AVX512-BF16 its import logs an exception. In a test, the log record would keep every
# frame of that test, and with them its models.
import bitsandbytes  # noqa: F401  # isort: skip


@pytest.fixture
def gpu() -> GPU:
    return _gpu(0)


@pytest.fixture
def second_gpu() -> GPU:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    return _gpu(1)


@pytest.fixture(params=[0, 1], ids=["no avx512_bf16", "avx512_bf16"])
def avx512_bf16(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU without AVX512-BF16 and on one with it, whatever this machine has."""
    from tests.builders.cpu_features import set_avx512_bf16

    set_avx512_bf16(request.param, monkeypatch)


def _gpu(index: int) -> GPU:
    gc.collect()
    device = torch.device("cuda", index)
    return GPU(device, requested_bytes(device))


_modules_set_aside = 0


def _set_imports_aside() -> None:
    """Imported libraries are a million objects that are never garbage: frozen, they cost
    `gc.collect` no second each time."""
    global _modules_set_aside
    if len(sys.modules) != _modules_set_aside:
        set_everything_aside()
        _modules_set_aside = len(sys.modules)


@pytest.fixture(autouse=True)
def _no_test_leaves_anything_behind() -> Iterator[None]:
    """Each test starts with empty devices of 4 GiB, fresh counters, qmove's own settings, no host
    memory kept by it, and none of the callbacks that an earlier test registered."""
    import qmove_core as qmove
    from qmove_core import hosting
    from qmove_core.digests import choosing
    from qmove_core.memory import arena, giving_back, unlocking
    from qmove_core.parking import pins, streaming
    from tests.builders import dispatched_models

    giving_back.watch.end()  # nothing is given back behind a test's back
    _set_imports_aside()
    for device, _way in choosing._failed:  # a fault of an earlier test made digests slower
        choosing._chosen.pop(device, None)
    choosing._failed.clear()
    callbacks: list[list[Any]] = [
        *(hosting._moved, hosting._ask_for_room, hosting._give_up),
        *(hosting._yielding, hosting._page_locked),
    ]
    kept = [list(some) for some in callbacks]
    with hostile():
        yield
    for some, before in zip(callbacks, kept, strict=True):
        some[:] = before
    dispatched_models.loaded_in_test.clear()
    streaming.wait_for()
    gc.collect()
    held = [pin.name for pin in pins._pins if pin.model is not None]
    pins._pins.clear()
    assert not held, f"still pinned: {held}"
    qmove.configure(
        ram_limit=None,
        keep_mirrors=True,
        verify=False,
        pin_limit=None,
        share_from=16 << 20,
        disk_folder=None,
    )
    qmove.trim()
    if SIMULATED:
        unlocking.wait()
        locked = sum(block.pinned_bytes for block in list(arena._blocks.values()))
        left = simcuda.host_counters().registered - locked
        assert left == 0, f"{left} bytes are page-locked that qmove no longer has"
        for index in range(2):
            simcuda.set_memory("4GiB", device=index)
        simcuda.reset_counters()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "simulated: needs the simulated GPU (faults, exact counters)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # First, as they look at all that lies on the GPU: bitsandbytes keeps tables there for the whole
    # process once a test has used it. (Stable: the order is otherwise that of the files.)
    items.sort(key=lambda item: "nodes" not in item.path.parts)
    if SIMULATED:
        return
    for item in items:
        if item.get_closest_marker("simulated") or "simcuda" in item.path.parts:
            item.add_marker(
                pytest.mark.skip(
                    reason="runs on the simulated GPU only; this machine has a real one"
                )
            )


def pytest_report_header() -> str:
    kind = "hostile simulated" if HOSTILE else "simulated"
    where = f"{kind} GPUs (2 x 4 GiB)" if SIMULATED else torch.cuda.get_device_name()
    return f"qmove: tests run on {where}, torch {torch.__version__}"
