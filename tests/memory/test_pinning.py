"""How much host memory may be page-locked: each limit, by name."""

from __future__ import annotations

import platform
import sys

import pytest
import torch

import qmove_core as qmove
import simcuda
from qmove_core import hosting
from qmove_core.memory import arena, pinning
from qmove_core.memory.blocks import place_of

GIB = 1 << 30


def limit(**system: object) -> pinning.PinLimit:
    """The limit of a Linux machine of 64 GiB where nobody else locks, apart from what is named."""
    usual = {"windows": False, "wsl": False, "ram": 64 * GIB, "others": 0}
    return pinning.pin_limit(**(usual | system))  # type: ignore[arg-type]


def test_linux_leaves_the_system_a_tenth_of_ram() -> None:
    assert limit().nbytes == int(0.9 * 64 * GIB) and "of RAM" in limit().name


def test_windows_allows_two_fifths_of_ram() -> None:
    found = limit(windows=True)
    assert (
        found.nbytes == int(0.4 * 64 * GIB)
        and "Windows" in found.name
        and "pin_limit=" in found.advice
    )


def test_wsl_allows_less_than_a_gib() -> None:
    found = limit(wsl=True)
    assert found.nbytes == 768 << 20 and "WSL" in found.name and "pin_limit=" in found.advice
    assert limit(wsl=True, ram=GIB // 2).nbytes == int(0.9 * (GIB // 2)), (
        "never more than RAM allows"
    )


def test_what_is_configured_takes_the_place_of_what_is_guessed_of_a_system() -> None:
    assert limit(chosen=5 * GIB).nbytes == 5 * GIB
    assert limit(chosen=5 * GIB, wsl=True).nbytes == 5 * GIB
    assert "qmove.configure" in limit(chosen=5 * GIB, windows=True).name
    assert limit(chosen=80 * GIB).nbytes == int(0.9 * 64 * GIB), "never more than RAM allows"


def test_the_setting_is_asked() -> None:
    qmove.configure(pin_limit=12345)
    try:
        assert pinning.pin_limit().nbytes == limit().nbytes == 12345
    finally:
        qmove.configure(pin_limit=None)


@pytest.mark.parametrize("system", [{}, {"windows": True}, {"wsl": True}], ids=str)
def test_what_others_have_locked_is_taken_off_what_a_system_allows(
    system: dict[str, object],
) -> None:
    alone, shared = limit(**system), limit(**system, others=GIB // 2)

    assert shared.nbytes == alone.nbytes - GIB // 2
    assert "less what PyTorch and the program around qmove have locked" in shared.name
    assert "--disable-pinned-memory" in shared.advice and alone.advice in shared.advice
    assert limit(**system, others=65 * GIB).nbytes == 0


def test_what_others_have_locked_is_not_taken_off_what_is_configured() -> None:
    assert limit(chosen=5 * GIB, others=GIB).nbytes == 5 * GIB
    found = limit(chosen=50 * GIB, others=20 * GIB)
    assert found.nbytes == int(0.9 * 64 * GIB) - 20 * GIB, "never more than RAM allows"


@pytest.mark.simulated
class TestOthers:
    def test_what_pytorch_has_locked_counts(self) -> None:
        before = pinning.locked_by_others()
        kept = torch.empty(3 << 20, dtype=torch.uint8, pin_memory=True)
        taken = pinning.locked_by_others() - before
        assert taken >= kept.nbytes
        assert pinning.pin_limit(ram=GIB).nbytes == int(0.9 * GIB) - before - taken

    @pytest.mark.parametrize(
        ("said", "expected"),
        [
            ({"reserved_bytes.current": 8, "allocated_bytes.current": 5}, 8),  # 2.7
            ({"active_bytes.current": 5, "allocated_bytes.current": 8}, 8),  # later ones
            ({}, 0),  # nothing uses CUDA yet
        ],
    )
    def test_what_pytorch_only_keeps_counts_too(
        self, said: dict[str, int], expected: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "host_memory_stats", lambda: said)
        assert pinning.locked_by_others() == expected

    def test_an_allocator_that_does_not_count_takes_nothing_off(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> dict[str, int]:
            raise RuntimeError("not supported")

        monkeypatch.setattr(torch.cuda, "host_memory_stats", refuse)
        assert pinning.locked_by_others() == 0
        monkeypatch.delattr(torch.cuda, "host_memory_stats")  # 2.6
        assert pinning.locked_by_others() == 0

    def test_where_the_host_has_locked_all_of_it_nobody_is_asked_and_it_is_said(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(pinning, "_said", set())
        hosting.on_page_locking(lambda: 1 << 50)
        (storage,) = arena.allocate([1 << 20], lambda _cdata: None)
        place = place_of(storage)
        assert place is not None
        with simcuda.fail("pin", error=AssertionError("the driver was asked")):
            assert not place[0].pin(0, 1 << 20)
        (record,) = caplog.records
        assert "and 1024.00 TiB by others" in record.getMessage()
        assert "the program around qmove" in record.getMessage()


def test_the_memlock_limit_does_not_bind(monkeypatch: pytest.MonkeyPatch) -> None:
    before = limit()
    monkeypatch.setattr(pinning, "memlock_limit", lambda: 1)
    assert limit() == before


class TestMemlock:
    def test_soft_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resource = pytest.importorskip("resource")
        monkeypatch.setattr(
            resource,
            "getrlimit",
            lambda which: {resource.RLIMIT_MEMLOCK: (8 << 20, 16 << 20)}[which],
        )
        assert pinning.memlock_limit() == 8 << 20

    def test_unlimited(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resource = pytest.importorskip("resource")
        monkeypatch.setattr(
            resource, "getrlimit", lambda which: (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        assert pinning.memlock_limit() is None

    def test_windows_has_no_such_limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pinning.os, "name", "nt")
        assert pinning.memlock_limit() is None


@pytest.mark.parametrize(
    ("system", "release", "expected"),
    [
        ("linux", "5.15.167.4-microsoft-standard-WSL2", True),
        ("linux", "6.8.0-generic", False),
        ("win32", "11", False),
    ],
)
def test_wsl_is_known_by_its_kernel(
    system: str, release: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    assert pinning.is_wsl() is expected


@pytest.mark.simulated
class TestWhere:
    def test_cuda_can(self) -> None:
        assert pinning.is_possible()

    def test_a_forked_child_cannot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
        assert not pinning.is_possible()

    def test_no_context_is_made_on_a_device_that_is_not_in_use(self) -> None:
        simcuda.reset_contexts()
        assert pinning._device_in_use() == torch.cuda.current_device() == 0
        torch.zeros(1, device="cuda:1")  # and nothing is kept there
        assert pinning._device_in_use() == 1
        assert simcuda.contexts() == [1]
