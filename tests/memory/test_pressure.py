"""RAM that gets short for others: spares and mirrors go back, parked models stay."""

from __future__ import annotations

import gc
import logging
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

import qmove_core as qmove
from qmove_core import for_hosts, homes
from qmove_core.memory import arena, giving_back, limits, mirrors
from tests.builders.arena import wait_until_prepared
from tests.builders.device import GPU
from tests.builders.mirrors import MODEL, WIDTH, mirrored, round_trip
from tests.builders.models import layers
from tests.builders.snapshots import contents

pytestmark = pytest.mark.simulated

MIB, GIB = 1 << 20, 1 << 30
ROOT = Path(__file__).parents[2]

Free = Callable[[int], None]


@pytest.fixture(autouse=True)
def nobody_else_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process's own thread does not; and the arena is empty."""
    monkeypatch.setattr(giving_back.watch, "start", lambda: None)
    gc.collect()
    qmove.trim()
    assert arena.bytes_in_use() == arena.spare_bytes() == 0


@pytest.fixture
def cgroup(monkeypatch: pytest.MonkeyPatch) -> Free:
    """Sets what a cgroup of 16 GiB, of which this process has the rest, has free beyond what is to
    stay free."""

    def free(beyond_reserve: int) -> None:
        left = limits.reserve(16 * GIB) + beyond_reserve
        monkeypatch.setattr(limits, "cgroup_free", lambda: left)
        monkeypatch.setattr(giving_back, "_resident", lambda: 16 * GIB - left)
        plenty = SimpleNamespace(total=64 * GIB, available=40 * GIB)
        monkeypatch.setattr(limits.psutil, "virtual_memory", lambda: plenty)

    return free


def has_mirrors(model: nn.Module) -> bool:
    found = {
        mirrors.of(parameter.untyped_storage()) is not None for parameter in model.parameters()
    }
    assert len(found) == 1, "a block goes as a whole"
    return found.pop()


def test_the_least_recently_used_mirror_goes_and_parked_models_stay(
    gpu: GPU, cgroup: Free, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "qmove")
    asleep = layers(4, width=WIDTH)
    before = contents(asleep)
    qmove.park(asleep)
    older, newer = mirrored(), mirrored()
    round_trip(older)  # and so it is the newer one
    older, newer = newer, older
    cgroup(-1)
    assert giving_back.trim_under_pressure() == MODEL
    assert (has_mirrors(older), has_mirrors(newer), arena.spare_bytes()) == (False, True, 0)
    assert "cgroup limit" in caplog.text and f"gave back {MODEL / MIB:.2f} MiB" in caplog.text
    cgroup(-64 * MODEL)
    assert giving_back.trim_under_pressure() == MODEL
    assert (has_mirrors(newer), arena.bytes_in_use()) == (False, MODEL)
    assert giving_back.trim_under_pressure() == 0, "nothing is left that could go"
    assert qmove.is_parked(asleep) and contents(asleep) == before


def test_spares_go_before_mirrors(gpu: GPU, cgroup: Free) -> None:
    model = mirrored()
    arena.prepare(2 * MIB)
    wait_until_prepared()
    cgroup(-MIB)
    assert (giving_back.trim_under_pressure(), has_mirrors(model), arena.spare_bytes()) == (
        2 * MIB,
        True,
        0,
    )
    cgroup(-MIB)
    assert (giving_back.trim_under_pressure(), has_mirrors(model)) == (MODEL, False)


def test_then_the_host_lets_go_of_models_that_it_keeps(gpu: GPU, cgroup: Free) -> None:
    kept, model = [layers(4, width=WIDTH)], mirrored()
    qmove.park(kept[0])
    asked: list[int] = []

    def give_up(nbytes: int) -> None:
        asked.append(nbytes)
        kept.clear()
        gc.collect()

    for_hosts.on_ram_shortage(give_up)
    cgroup(-MODEL)
    assert giving_back.trim_under_pressure() == MODEL
    assert (asked, has_mirrors(model)) == ([], False), "what costs least to lose goes first"
    cgroup(-MODEL)
    assert giving_back.trim_under_pressure() == MODEL
    assert (asked, arena.bytes_held()) == ([MODEL], 0)


def test_a_park_that_does_not_fit_asks_the_host_first(gpu: GPU) -> None:
    kept, model = [layers(4, width=WIDTH)], layers(4, width=WIDTH)
    qmove.park(kept[0])
    qmove.configure(ram_limit=MODEL + MODEL // 2)
    for_hosts.on_ram_shortage(lambda nbytes: kept.clear())
    qmove.park(model)
    assert qmove.is_parked(model) and not kept

    another = layers(4, width=WIDTH)
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.park(another)


def test_what_a_process_could_have_is_the_least_of_its_limits(tmp_path: Path) -> None:
    groups = tmp_path / "groups"
    for folder, limit in ((groups, 6 * GIB), (groups / "a", 5 * GIB), (groups / "a" / "b", "max")):
        folder.mkdir()
        (folder / "memory.max").write_text(str(limit))
        (folder / "memory.current").write_text(str(GIB))
        (folder / "memory.stat").write_text("inactive_file 0\n")
    member = tmp_path / "cgroup"
    member.write_text("0::/a/b\n")
    assert list(limits._cgroup_limits(groups, member)) == [(5 * GIB, 4 * GIB), (6 * GIB, 5 * GIB)]
    assert limits.cgroup_free(groups, member) == 4 * GIB


def test_all_of_the_ram_is_what_the_machine_or_the_cgroup_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        limits.psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=GIB)
    )
    monkeypatch.setattr(limits, "_cgroup_limits", lambda: iter([]))
    assert for_hosts.total_ram() == 64 * GIB
    monkeypatch.setattr(limits, "_cgroup_limits", lambda: iter([(8 * GIB, 0), (6 * GIB, GIB)]))
    assert for_hosts.total_ram() == 6 * GIB


def test_enough_is_free(gpu: GPU, cgroup: Free) -> None:
    model = mirrored()
    arena.prepare(2 * MIB)
    wait_until_prepared()
    cgroup(0)
    assert (giving_back.trim_under_pressure(), has_mirrors(model), arena.spare_bytes()) == (
        0,
        True,
        2 * MIB,
    )


def test_another_process_takes_the_ram(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mirrored()
    monkeypatch.setattr(limits, "cgroup_free", lambda: None)
    monkeypatch.setattr(giving_back, "_resident", lambda: 62 * GIB)
    for available, given in ((4 * GIB, 0), (3 * GIB, MODEL)):
        memory = SimpleNamespace(total=64 * GIB, available=available)
        monkeypatch.setattr(limits.psutil, "virtual_memory", lambda memory=memory: memory)
        assert giving_back.trim_under_pressure() == given
    assert not has_mirrors(model)


def test_the_limit_of_qmoves_own_is_not_one_for_others(gpu: GPU, cgroup: Free) -> None:
    model = mirrored()
    cgroup(0)
    qmove.configure(ram_limit=MODEL)
    assert giving_back.trim_under_pressure() == 0 and has_mirrors(model)


def test_while_a_move_runs_nothing_is_given_back_and_nobody_waits(gpu: GPU, cgroup: Free) -> None:
    model = mirrored()
    cgroup(-1)
    given: list[int] = []
    watch = threading.Thread(target=lambda: given.append(giving_back.trim_under_pressure()))
    with homes.lock:
        watch.start()
        watch.join(60)
        assert not watch.is_alive(), "it waits for the move"
        assert (given, has_mirrors(model)) == ([0], True)
    assert (giving_back.trim_under_pressure(), has_mirrors(model)) == (MODEL, False)


@pytest.mark.parametrize(
    ("total", "free"),
    [
        (128 * GIB, int(6.4 * GIB)),
        (32 * GIB, 2 * GIB),
        (16 * GIB, 2 * GIB),
        (4 * GIB, GIB // 2),
        (0, 0),
    ],
)
def test_how_much_is_to_stay_free(total: int, free: int) -> None:
    assert limits.reserve(total) == free


class TestThread:
    @pytest.fixture(autouse=True)
    def watch(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[giving_back.Watch]:
        """One that looks often; the process's own may be asleep for long."""
        watch = giving_back.Watch(look_seconds=0.001)
        monkeypatch.setattr(giving_back, "watch", watch)
        yield watch
        watch.end()

    def test_looks_while_the_arena_holds_anything_and_ends_then(
        self,
        gpu: GPU,
        cgroup: Free,
        monkeypatch: pytest.MonkeyPatch,
        watch: giving_back.Watch,
    ) -> None:
        looked = threading.Event()
        trim_under_pressure = giving_back.trim_under_pressure

        def look() -> int:
            looked.set()
            return trim_under_pressure()

        cgroup(GIB)
        monkeypatch.setattr(giving_back, "trim_under_pressure", look)
        model = layers(4, width=WIDTH, device="cpu").cuda()
        assert watch.thread is None, "there is nothing to look after"
        round_trip(model)
        thread = watch.thread
        assert thread is not None and thread.daemon and thread.is_alive()
        assert looked.wait(60) and has_mirrors(model)
        cgroup(-1)
        thread.join(60)
        assert not thread.is_alive() and watch.thread is None
        assert not has_mirrors(model) and arena.bytes_in_use() == arena.spare_bytes() == 0

    def test_starts_again_with_the_next_block(self, gpu: GPU, watch: giving_back.Watch) -> None:
        for _ in range(3):
            model = mirrored()
            thread = watch.thread
            assert thread is not None and thread.is_alive()
            del model
            gc.collect()
            arena.trim()
            thread.join(60)
            assert not thread.is_alive() and watch.thread is None

    def test_no_thread_can_be_started(
        self, gpu: GPU, monkeypatch: pytest.MonkeyPatch, watch: giving_back.Watch
    ) -> None:
        def refuses(_thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", refuses)
            model = layers(4, width=WIDTH)
            before = contents(model)
            assert qmove.prepare(model) == 0 and arena.spare_bytes() == 0
            round_trip(model)
        assert contents(model) == before and watch.thread is None
        qmove.park(layers(1))
        assert watch.thread is not None, "the next block tries again"


@pytest.mark.parametrize("free", ["plenty", "none"])
def test_a_process_ends_without_a_word_while_it_looks(free: str) -> None:
    script = f"""
        import simcuda; simcuda.activate(devices=1, memory="1GiB")
        import sys; sys.path.insert(0, ".")
        import threading
        from tests.builders.models import layers
        import qmove_core as qmove
        from qmove_core.memory import giving_back, limits
        seen = threading.Event()
        look = giving_back.trim_under_pressure
        giving_back.trim_under_pressure = lambda: (look(), seen.set())
        giving_back.watch = giving_back.Watch(look_seconds=0.0001)
        models = [layers(2), layers(2)]
        for model in models:
            qmove.park(model)
        for model in models:
            qmove.restore(model)
        limits.cgroup_free = lambda: {{"plenty": 1 << 40, "none": 0}}[{free!r}]
        seen.clear()
        assert seen.wait(60)
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    assert not [word for word in ("Error", "Traceback") if word in done.stderr], done.stderr
