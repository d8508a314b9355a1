"""Budgets: what may be used under RAM, cgroup and qmove's own limit, and that it is asked before
anything moves."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qmove_core as qmove
from qmove_core import devices
from qmove_core.actions import Action
from qmove_core.memory import budget, limits
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import snapshot

MIB = 1 << 20
GIB = 1 << 30


def cgroup_v2(folder: Path, limit: str, used: int, cached: int = 0) -> None:
    """Writes what the kernel shows of a cgroup of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"anon {used - cached}\nfile {cached}\ninactive_file {cached}\n"
    )


def cgroup_v1(folder: Path, limit: int, used: int, cached: int = 0) -> None:
    """The same of version 1, where "no limit" is a huge number."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(
        f"cache {cached}\ninactive_file 7\ntotal_inactive_file {cached}\n"
    )


@pytest.fixture
def membership(tmp_path: Path) -> Path:
    """Stands for /proc/self/cgroup."""
    return tmp_path / "self-cgroup"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Stands for /sys/fs/cgroup."""
    return tmp_path / "cgroup"


@pytest.fixture
def machine_of_64_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(total=64 * GIB, available=40 * GIB)
    monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: memory)


pytestmark = pytest.mark.usefixtures("machine_of_64_gib")


class TestCgroups:
    def test_v2_own_limit_less_what_is_used_with_cache_counted_as_free(
        self, root: Path, membership: Path
    ) -> None:
        membership.write_text("0::/job\n")
        cgroup_v2(root / "job", limit=str(10 * GIB), used=4 * GIB, cached=1 * GIB)
        assert limits.cgroup_free(root, membership) == 7 * GIB

    def test_v2_a_tighter_limit_on_an_ancestor_counts(self, root: Path, membership: Path) -> None:
        membership.write_text("0::/user.slice/job\n")
        cgroup_v2(root / "user.slice", limit=str(3 * GIB), used=2 * GIB)
        cgroup_v2(root / "user.slice" / "job", limit=str(10 * GIB), used=1 * GIB)
        assert limits.cgroup_free(root, membership) == 1 * GIB

    def test_v2_max_is_no_limit(self, root: Path, membership: Path) -> None:
        membership.write_text("0::/job\n")
        cgroup_v2(root / "job", limit="max", used=4 * GIB)
        assert limits.cgroup_free(root, membership) is None

    def test_v2_in_a_container_that_sees_only_its_own_group_at_the_root(
        self, root: Path, membership: Path
    ) -> None:
        membership.write_text("0::/\n")
        cgroup_v2(root, limit=str(8 * GIB), used=8 * GIB)
        assert limits.cgroup_free(root, membership) == 0

    def test_used_beyond_the_limit_leaves_nothing_and_never_less(
        self, root: Path, membership: Path
    ) -> None:
        membership.write_text("0::/job\n")
        cgroup_v2(root / "job", limit=str(1 * GIB), used=2 * GIB)
        assert limits.cgroup_free(root, membership) == 0

    def test_v1_memory_controller(self, root: Path, membership: Path) -> None:
        membership.write_text(
            "12:cpu,cpuacct:/elsewhere\n4:memory:/docker/abc\n1:name=systemd:/docker/abc\n"
        )
        cgroup_v1(root / "memory" / "docker" / "abc", limit=6 * GIB, used=2 * GIB, cached=GIB // 2)
        assert limits.cgroup_free(root, membership) == 4 * GIB + GIB // 2

    def test_v1_container_whose_path_is_only_known_outside(
        self, root: Path, membership: Path
    ) -> None:
        membership.write_text("4:memory:/docker/abc\n")
        cgroup_v1(root / "memory", limit=2 * GIB, used=1 * GIB)
        assert limits.cgroup_free(root, membership) == 1 * GIB

    def test_v1_unlimited_is_a_number_beyond_all_ram(self, root: Path, membership: Path) -> None:
        membership.write_text("4:memory:/\n")
        cgroup_v1(root / "memory", limit=9223372036854771712, used=1 * GIB)
        assert limits.cgroup_free(root, membership) is None

    def test_without_cgroups(self, root: Path, membership: Path) -> None:
        assert limits.cgroup_free(root, membership) is None  # no such file: not Linux
        membership.write_text("0::/job\n")
        assert limits.cgroup_free(root, membership) is None  # no memory controller


class TestHostLimits:
    def test_the_tightest_comes_first_and_has_its_name(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "cgroup_free", lambda: 12 * GIB)
        found = limits.host_limits(ram_limit=30 * GIB, arena_bytes=5 * GIB)
        assert [(limit.free, limit.name) for limit in found] == [
            (12 * GIB, "cgroup limit"),
            (25 * GIB, "ram_limit of qmove.configure"),
            (40 * GIB, "available RAM"),
        ]

    def test_a_ram_limit_that_is_used_up_leaves_nothing(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "cgroup_free", lambda: None)
        assert limits.host_limits(ram_limit=1 * GIB, arena_bytes=2 * GIB)[0].free == 0

    def test_exactly_what_is_free_less_the_headroom_may_be_taken_and_no_byte_more(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(limits, "cgroup_free", lambda: 1 * GIB + limits.HEADROOM)
        budget.require_host(Action("park", "a model"), 1 * GIB, None)
        with pytest.raises(qmove.NotEnoughMemory) as caught:
            budget.require_host(Action("park", "a model"), 1 * GIB + 1, None)
        error = caught.value
        assert (error.place, error.needed, error.free, error.limit) == (
            "cpu",
            GIB + 1,
            GIB,
            "cgroup limit, less 64 MiB that stay free",
        )
        assert "1.00 GiB" in str(error) and "Nothing was moved" in str(error)


class TestReserve:
    """What is page-locked cannot be swapped out: some RAM stays free for everybody else."""

    @pytest.fixture(autouse=True)
    def no_cgroup(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "cgroup_free", lambda: None)

    def test_a_park_into_the_last_free_ram_is_refused_with_figures(
        self, gpu: GPU, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = layers()
        before, needed = snapshot(model), qmove.inventory(model).nbytes
        stays = limits.reserve(64 * GIB)
        memory = SimpleNamespace(total=64 * GIB, available=stays + needed // 2)
        monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: memory)

        with pytest.raises(qmove.NotEnoughMemory) as caught:
            qmove.park(model)

        assert caught.value.free == needed // 2
        assert caught.value.limit == (
            "available RAM, less 3.20 GiB that stay free beside page-locked memory"
        )
        assert snapshot(model) == before and not qmove.is_parked(model)

        memory.available = stays + 2 * needed
        qmove.park(model)
        assert qmove.is_parked(model)

    def test_exactly_what_is_free_less_the_reserve_may_be_taken(self) -> None:
        allowed = 40 * GIB - limits.reserve(64 * GIB)
        budget.require_host(Action("park", "a model"), allowed, None)
        with pytest.raises(qmove.NotEnoughMemory):
            budget.require_host(Action("park", "a model"), allowed + 1, None)

    def test_where_nothing_is_locked_the_headroom_is_enough(self) -> None:
        qmove.configure(pin_limit=0)
        budget.require_host(Action("park", "a model"), 40 * GIB - limits.HEADROOM, None)


class FakeKernel32:
    """Windows' answer to how much memory there is."""

    def __init__(self, succeeds: bool = True) -> None:
        self.succeeds = succeeds

    def GlobalMemoryStatusEx(self, reference: Any) -> int:
        status = reference._obj
        assert status.dwLength == 64, "Windows fills nothing of another size"
        status.ullTotalPageFile, status.ullAvailPageFile = 70 * GIB, 6 * GIB
        return int(self.succeeds)


class TestCommitLimitOfWindows:
    def test_what_may_be_committed_is_read(self) -> None:
        assert limits.commit_free(FakeKernel32()) == 6 * GIB
        assert limits.commit_free(FakeKernel32(succeeds=False)) is None

    @pytest.mark.skipif(sys.platform == "win32", reason="Windows has it")
    def test_other_systems_have_none(self) -> None:
        assert limits.commit_free() is None

    def test_it_is_a_limit_of_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(limits, "cgroup_free", lambda: None)
        monkeypatch.setattr(limits, "commit_free", lambda: 6 * GIB)
        with pytest.raises(qmove.NotEnoughMemory, match="commit limit of Windows"):
            budget.require_host(Action("park", "a model"), 6 * GIB, None)


class TestBeforeTheFirstByte:
    """The check stands before the move: a model that does not fit stays where and as it was."""

    def test_a_park_that_a_cgroup_forbids_moves_nothing(
        self, gpu: GPU, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = layers()
        before, allocated = snapshot(model), gpu.allocated()
        monkeypatch.setattr(limits, "cgroup_free", lambda: 1000)
        with pytest.raises(qmove.NotEnoughMemory, match="cgroup limit"):
            qmove.park(model)
        assert snapshot(model) == before
        assert gpu.allocated() == allocated
        assert not qmove.is_parked(model)

    def test_ram_limit_counts_what_is_parked_already(self, gpu: GPU) -> None:
        first, second = layers(), layers()
        needed = qmove.inventory(first).nbytes
        qmove.configure(ram_limit=needed + needed // 2)
        try:
            qmove.park(first)
            with pytest.raises(qmove.NotEnoughMemory, match=r"ram_limit of qmove\.configure"):
                qmove.park(second)
            qmove.restore(first)
            qmove.park(second)
            assert qmove.is_parked(second)
        finally:
            qmove.configure(ram_limit=None)

    def test_a_restore_that_does_not_fit_leaves_the_model_parked(
        self, gpu: GPU, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = layers()
        before = snapshot(model)
        qmove.park(model)
        with monkeypatch.context() as patch:
            patch.setattr(devices, "free_memory", lambda device: 100)
            with pytest.raises(qmove.NotEnoughMemory, match="free VRAM"):
                qmove.restore(model)
        assert qmove.is_parked(model)
        assert gpu.allocated() == 0
        qmove.restore(model)
        assert snapshot(model) == before

    def test_a_backend_that_cannot_say_is_not_guessed_for(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(devices, "free_memory", lambda device: None)
        assert limits.host_limits(
            None, 0
        )  # the host can say, and what follows is about the device alone
        budget.require_device(
            Action("restore", "a model"), 1 << 60, torch.device("cuda:0")
        )  # raises NotEnoughMemory if it guesses
