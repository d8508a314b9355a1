"""What the pool may take of the RAM, and what it lets go of first, on the fake host."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.models import pins
from qmove_pack.nodes.host.models.adopted import adopted_of
from qmove_pack.nodes.host.panel import state
from qmove_pack.nodes.host.pool.keeping import pool
from qmove_pack.nodes.host.stages import pinning, requests
from qmove_pack.nodes.memory_picture import write_text
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import giving_back, limits
from tests.builders.device import GPU
from tests.nodes.builders.careless_nodes import ALL, MIB, Load, forget_all, model_in, node
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.fake_management import ModelPatcher

SIZE = 4 * MIB + (1 << 16)  # of each model, with its biases and the ends of pages
GIB = 2**30

pytestmark = pytest.mark.simulated  # bytes over the link are counted


@pytest.fixture
def comfy(pool_host: FakeHost, gpu: GPU) -> Iterator[FakeHost]:
    gc.collect()
    qmove.trim()
    pool_host.add(*ALL)
    yield pool_host
    forget_all()


@pytest.fixture(autouse=True)
def _no_look_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's own RAM has room, and nobody looks meanwhile."""
    monkeypatch.setattr(giving_back.watch, "start", lambda: None)


def budget(models: float) -> None:
    """Lets so many models of SIZE stay in RAM."""
    settings.change({"qmove.keepLoadedLimit": models * SIZE / GIB})


def run(comfy: FakeHost, name: str, *, seconds: float = 1.0, mib: int = 4) -> weakref.ref[Any]:
    """Runs the workflow of a model, which is in VRAM then; it is said to have loaded so long."""
    before = {kept.key for kept in pool.all()}
    load = node("Load", mib=mib, shape=name)
    comfy.run({name: load, f"use {name}": node("Use", model=(name, 0), seed=pool.clock)})
    assert not comfy.errors
    for kept in pool.all():
        if kept.key not in before:
            kept.seconds = seconds
    return weakref.ref(model_in(comfy, name))


def leave(comfy: FakeHost) -> None:
    comfy.run({"text": node("Text", text="")})


def park_all() -> None:
    requests.park_all()


def held() -> int:
    """Bytes of RAM: of the pool's models, and of copies beside them."""
    stats = qmove.stats()
    return pool.figures()["in_ram"] + stats.mirror_bytes + stats.spare_bytes


SHAPES = ("plain", "list", "dict", "pipeline")


def test_of_models_that_leave_the_vram_only_those_stay_that_fit_the_budget(
    comfy: FakeHost,
) -> None:
    budget(2)
    models = []
    for shape in SHAPES:
        models.append(run(comfy, shape))
        leave(comfy)
        park_all()
        assert held() <= 2 * SIZE
    assert [model() is not None for model in models] == [False, False, True, True]
    assert pool.figures()["in_ram"] <= 2 * SIZE


def test_a_model_in_vram_takes_nothing_of_it(comfy: FakeHost) -> None:
    budget(1)
    models = [run(comfy, shape) for shape in SHAPES]
    leave(comfy)
    assert all(model() is not None for model in models)
    assert pool.figures()["in_ram"] == 0 < pool.figures()["nbytes"]


def test_the_one_used_longest_ago_goes_first_also_where_comfyui_itself_had_kept_it(
    comfy: FakeHost,
) -> None:
    budget(1)
    old = run(comfy, "plain")
    other = run(comfy, "list")
    run(comfy, "plain")
    run(comfy, "plain")  # from ComfyUI's own cache
    leave(comfy)
    park_all()
    assert old() is not None and other() is None


@pytest.mark.parametrize("slow_first", [True, False])
def test_what_loads_slowly_outlives_what_loads_quickly(comfy: FakeHost, slow_first: bool) -> None:
    budget(1)
    slow, quick = (100.0, 1.0)
    first = run(comfy, "plain", seconds=slow if slow_first else quick)
    second = run(comfy, "list", seconds=quick if slow_first else slow)
    leave(comfy)
    park_all()
    assert (first() is not None, second() is not None) == (slow_first, not slow_first)


def test_of_equal_seconds_the_bigger_one_goes(comfy: FakeHost) -> None:
    budget(2)
    big = run(comfy, "plain", mib=8)
    small = run(comfy, "list", mib=1)
    leave(comfy)
    leave(comfy)
    park_all()
    assert big() is None and small() is not None


def test_a_pinned_model_never_goes(comfy: FakeHost) -> None:
    budget(0.5)
    pinned = run(comfy, "plain")
    (kept,) = pool.all()
    adopted = adopted_of(kept.models[0])
    assert adopted is not None
    pinning.pin_models([adopted], "pin")
    other = run(comfy, "list")
    leave(comfy)
    park_all()
    assert pinned() is not None and other() is None

    pool.give_up(1 << 40)
    assert pinned() is not None
    pinning.pin_models([adopted], "unpin")
    park_all()
    assert pinned() is None


def test_nor_does_one_of_comfyuis_own_that_is_pinned(comfy: FakeHost) -> None:
    class LoadOwn(Load):
        def run(self, mib: int, **_: Any) -> tuple[Any]:  # type: ignore[override]
            return (ModelPatcher(nn.Linear(mib << 10, 256)),)

    comfy.add(LoadOwn)
    settings.change({"qmove.keepLoadedOwn": True})
    for mib in (1, 2):
        comfy.run({"own": node("LoadOwn", mib=mib)})
        leave(comfy)
    first, _second = pool.all()
    (patcher,) = first.patchers
    pins.choose_for_hosts_own(patcher, "pin")
    pool.give_up(1 << 40)
    assert pool.all() == [first] and first.patchers == [patcher]


def test_where_the_budget_has_no_room_a_model_goes_instead_of_being_copied(
    comfy: FakeHost,
) -> None:
    budget(0.5)
    model = run(comfy, "plain")
    leave(comfy)
    before = simcuda.counters(0).d2h_bytes
    park_all()
    assert model() is None
    assert simcuda.counters(0).d2h_bytes == before
    assert torch.cuda.memory_allocated() == 0


def test_copies_beside_the_models_count_too(comfy: FakeHost) -> None:
    budget(2)
    for shape in SHAPES[:3]:
        run(comfy, shape)
        leave(comfy)
        park_all()
        run(comfy, shape)  # it is home, and its copy stays
        assert held() <= 2 * SIZE


def test_a_smaller_budget_holds_at_once(comfy: FakeHost) -> None:
    budget(2)
    for shape in SHAPES[:2]:
        run(comfy, shape)
        leave(comfy)
        park_all()
    assert pool.count == 2
    budget(1)
    assert pool.count == 1 and held() <= SIZE


@pytest.mark.parametrize("name", ["qmove.keepLoaded", "qmove.autoPark"])
def test_switched_off_it_lets_go_of_everything_at_once(comfy: FakeHost, name: str) -> None:
    model = run(comfy, "plain")
    leave(comfy)
    settings.change({name: False})
    assert model() is None and pool.count == 0


def test_a_park_that_ram_has_no_room_for_takes_it_from_the_pool(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = run(comfy, "plain")
    leave(comfy)
    park_all()
    own = run(comfy, "list")
    pool.remove(next(k for k in pool.all() if k.models[0] is own()))
    settings.change({"qmove.ramLimit": 1.5 * SIZE / GIB})
    leaving = comfy.cache.entries["list"].outputs[0][0]
    requests.park_value(leaving)
    assert qmove.is_parked(own()) and kept() is None


def test_a_model_that_ram_has_no_room_for_goes_as_it_would_without_the_pool(
    comfy: FakeHost,
) -> None:
    model = run(comfy, "plain")
    leave(comfy)
    settings.change({"qmove.ramLimit": 0.5 * SIZE / GIB})
    park_all()
    assert model() is None and torch.cuda.memory_allocated() == 0


def test_but_while_comfyui_has_it_the_error_is_told(comfy: FakeHost) -> None:
    model = run(comfy, "plain")
    settings.change({"qmove.ramLimit": 0.5 * SIZE / GIB})
    with pytest.raises(qmove.NotEnoughMemory):
        park_all()
    assert model() is not None


def test_what_ram_has_no_room_for_goes_to_disk_where_a_folder_is_set(
    comfy: FakeHost, tmp_path: Path
) -> None:
    qmove.configure(disk_folder=tmp_path)
    budget(1)
    models = []
    for shape in SHAPES:
        models.append(run(comfy, shape, seconds=100.0))
        leave(comfy)
        park_all()
        assert held() <= SIZE
    assert all(model() is not None for model in models)
    figures = pool.figures()
    assert figures["on_disk"] == figures["nbytes"] - figures["in_ram"] > 2 * SIZE
    assert figures["spills"] == len(SHAPES) - 1
    for shape, model in zip(SHAPES, models, strict=True):
        assert run(comfy, shape)() is model()  # the same live object, whose loader did not run
        leave(comfy)
        park_all()
        assert held() <= SIZE
    assert pool.misses == len(SHAPES)


def test_also_what_comfyui_itself_still_holds(comfy: FakeHost, tmp_path: Path) -> None:
    """Letting go of it would free nothing."""
    qmove.configure(disk_folder=tmp_path)
    budget(1)
    first = run(comfy, "plain", seconds=100.0)
    holder = first()
    leave(comfy)
    park_all()
    run(comfy, "list", seconds=100.0)
    leave(comfy)
    park_all()
    assert held() <= SIZE and sum(qmove.stats().parked_bytes.values()) > 2 * SIZE - 2 * MIB
    assert first() is holder and qmove.stats().arena_bytes <= SIZE


def test_a_model_that_loads_quicker_than_the_disk_reads_is_let_go_of(
    comfy: FakeHost, tmp_path: Path
) -> None:
    qmove.configure(disk_folder=tmp_path)
    budget(1)
    quick = run(comfy, "plain", seconds=1e-9)
    leave(comfy)
    park_all()
    run(comfy, "list", seconds=100.0)
    leave(comfy)
    park_all()
    assert quick() is None and pool.figures()["spills"] == 0


def test_a_full_disk_lets_go_instead(comfy: FakeHost, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    qmove.configure(disk_folder=tmp_path / "file" / "below")
    budget(1)
    models = []
    for shape in SHAPES[:3]:
        models.append(run(comfy, shape, seconds=100.0))
        leave(comfy)
        park_all()
        assert held() <= SIZE
    assert [model() is not None for model in models] == [False, False, True]


def test_the_environment_names_the_folder(
    comfy: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QMOVE_DISK_FOLDER", str(tmp_path))
    settings.load_stored()
    assert qmove.configure().disk_folder == tmp_path


def test_pressure_from_others_shrinks_it_the_least_useful_first(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    for shape in SHAPES[:3]:
        models.append(run(comfy, shape))
        leave(comfy)
        park_all()
    in_all = 64 * GIB  # under a limit that leaves too little free by one model and a half
    lacking = limits.reserve(in_all) - int(1.5 * SIZE)
    monkeypatch.setattr(limits, "cgroup_free", lambda: lacking)
    monkeypatch.setattr(giving_back, "_resident", lambda: in_all - lacking)
    giving_back.trim_under_pressure()
    assert [model() is not None for model in models] == [False, False, True]


def test_half_of_the_ram_is_the_default_less_in_a_cgroup(monkeypatch: pytest.MonkeyPatch) -> None:
    total = limits.psutil.virtual_memory().total
    monkeypatch.setattr(limits, "_cgroup_limits", lambda: iter([]))
    assert settings.most_kept_loaded() == total // 2
    monkeypatch.setattr(limits, "_cgroup_limits", lambda: iter([(8 * GIB, GIB), (6 * GIB, GIB)]))
    assert settings.most_kept_loaded() == 3 * GIB
    settings.change({"qmove.keepLoadedLimit": 1.5})
    assert settings.most_kept_loaded() == 1.5 * GIB


def test_the_figures_are_in_the_state_and_in_the_report(comfy: FakeHost) -> None:
    budget(2)
    run(comfy, "plain", seconds=90)
    leave(comfy)
    park_all()
    run(comfy, "plain")
    leave(comfy)
    park_all()
    nbytes = pool.figures()["nbytes"]

    snapshot = state.snapshot()

    assert snapshot["pool"] == {
        "limit": 2 * SIZE,
        "models": 1,
        "nbytes": nbytes,
        "in_ram": nbytes,
        "hits": 1,
        "misses": 1,
        "seconds_saved": 90.0,
    }
    assert "1 loads saved (90.0 s), 1 made" in write_text(snapshot)
