"""Models by name: each use is right, budgets hold, and what leaves first is the least useful."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.pool import ModelPool, State
from tests.builders.device import GPU
from tests.builders.pooled_models import DEVICE, SIZE, Loaders, build, inputs, is_right

Make = Callable[..., ModelPool]


def use(pool: ModelPool, names: Iterable[str]) -> None:
    for name in names:
        use_one(pool, name)


def use_one(pool: ModelPool, name: str) -> None:
    """A use that keeps no reference to the model."""
    with pool.use(name, timeout=0) as model:
        assert is_right(model, name)


def states(pool: ModelPool) -> dict[str, State]:
    return {name: pool.state(name) for name in pool.names()}


def ram(pool: ModelPool) -> int:
    stats = qmove.stats()
    return pool.figures()["in_ram"] + stats.mirror_bytes + stats.spare_bytes


def test_each_model_is_loaded_once_and_right_each_time(make: Make, loaders: Loaders) -> None:
    pool = make("abcdef", vram=1)
    for names in ("abcdef", "fedcba", "acebdf"):
        use(pool, names)
    assert loaders.loads == dict.fromkeys("abcdef", 1)
    figures = pool.figures()
    assert (figures["hits"], figures["misses"]) == (12, 6)
    assert figures["seconds_saved"] == 12.0
    assert figures["in_vram"] == {"cuda:0": SIZE}


def test_the_vram_budget_is_never_passed_also_while_models_change_places(
    make: Make, gpu: GPU
) -> None:
    pool = make("abcd", vram=2)
    use(pool, "ab")
    gc.collect()
    gpu.reset_peak()
    use(pool, "cdabdcba")
    # A park's digests take a little.
    assert gpu.peak() <= 2 * SIZE + (1 << 20)


def test_what_fits_stays_and_nothing_moves(make: Make) -> None:
    pool = make("abc", vram=3)
    use(pool, "abc")
    before = qmove.stats()
    use(pool, "cabbac")
    after = qmove.stats()
    assert (after.parks, after.restores) == (before.parks, before.restores)
    assert set(states(pool).values()) == {State.HOME}


def test_the_one_used_longest_ago_leaves_vram_first(make: Make) -> None:
    pool = make("abc", vram=2)
    use(pool, "abac")
    assert states(pool) == {"a": State.HOME, "b": State.IN_RAM, "c": State.HOME}


def test_ram_never_goes_beyond_its_budget_and_the_least_useful_is_let_go_of(
    make: Make, loaders: Loaders
) -> None:
    pool = make("abcd", vram=1, ram=2)
    for name in "abcdabcd":
        use(pool, name)
        assert ram(pool) <= 2 * SIZE
    # Each time the next one is the one that had to go.
    assert loaders.loads == dict.fromkeys("abcd", 2)


def test_ram_for_one_is_enough_for_two_that_take_turns(make: Make, loaders: Loaders) -> None:
    pool = make("ab", vram=1, ram=1)
    for name in "abababab":
        use(pool, name)
        assert ram(pool) <= SIZE
    assert loaders.loads == {"a": 1, "b": 1}


def test_what_loads_slowly_outlives_what_loads_quickly(loaders: Loaders, make: Make) -> None:
    pool = make("", vram=1, ram=1)
    for name, seconds in (("slow", 100.0), ("quick", 0.1), ("other", 1.0)):
        pool.add(name, loaders(name), nbytes=SIZE, seconds=seconds)
    use(pool, ("slow", "quick", "other"))
    assert states(pool) == {
        "slow": State.IN_RAM,
        "quick": State.NOT_LOADED,
        "other": State.HOME,
    }


def test_what_ram_has_no_room_for_goes_to_disk_if_its_loader_is_slower(
    make: Make, loaders: Loaders, tmp_path: Path
) -> None:
    qmove.configure(disk_folder=tmp_path)
    pool = make("abcd", vram=1, ram=1, seconds=100.0)
    for name in "abcdabcd":
        use(pool, name)
        assert ram(pool) <= SIZE
    assert loaders.loads == dict.fromkeys("abcd", 1)
    figures = pool.figures()
    assert figures["on_disk"] >= 2 * SIZE and figures["spills"] > 0


def test_what_loads_quicker_than_the_disk_reads_is_let_go_of(
    make: Make, loaders: Loaders, tmp_path: Path
) -> None:
    qmove.configure(disk_folder=tmp_path)
    pool = make("abc", vram=1, ram=1, seconds=1e-9)
    use(pool, "abc")
    assert State.ON_DISK not in states(pool).values()
    assert not any(tmp_path.iterdir())


def test_a_disk_that_cannot_be_written_lets_go_instead(
    make: Make, loaders: Loaders, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    qmove.configure(disk_folder=tmp_path / "file" / "below")
    pool = make("abc", vram=1, ram=1, seconds=100.0)
    for name in "abcabc":
        use(pool, name)
        assert ram(pool) <= SIZE
    assert pool.figures()["spills"] == 0


def test_no_room_in_ram_at_all_lets_go_without_a_copy(make: Make, loaders: Loaders) -> None:
    pool = make("ab", vram=1, ram=0)
    before = simcuda.counters(0).d2h_bytes
    use(pool, "abab")
    # Digests and the test's own look at the weights aside, nothing is parked.
    assert qmove.stats().arena_bytes == 0
    assert loaders.loads == {"a": 2, "b": 2}
    assert simcuda.counters(0).d2h_bytes - before <= 4 * SIZE + 4096


@pytest.mark.parametrize("ram_models", [1, 4])
def test_a_pinned_model_neither_leaves_nor_goes(make: Make, ram_models: int) -> None:
    pool = make("abc", vram=2, ram=ram_models)
    use(pool, "a")
    pool.pin("a")
    use(pool, "bcbc")
    assert states(pool)["a"] is State.HOME
    pool.pin("a", False)
    use(pool, "bc")
    assert states(pool)["a"] is not State.HOME


def test_what_somebody_else_holds_is_not_let_go_of_in_vain(make: Make, loaders: Loaders) -> None:
    pool = make("abc", vram=1, ram=1)
    with pool.use("a") as held:
        pass
    use(pool, "b")
    use(pool, "c")  # letting go of a would free nothing
    assert states(pool)["a"] is State.IN_RAM
    use(pool, "a")
    assert loaders.loads["a"] == 1 and is_right(held, "a")


def test_a_model_of_unknown_size_has_all_idle_ones_leave_once(
    make: Make, loaders: Loaders, gpu: GPU
) -> None:
    pool = make("", vram=2)
    for name in "abc":
        pool.add(name, loaders(name))
    use(pool, "ab")
    assert pool.state("a") is State.IN_RAM
    use(pool, "ab")  # now both sizes are known
    assert states(pool) == {"a": State.HOME, "b": State.HOME, "c": State.NOT_LOADED}


def test_one_that_turns_out_larger_than_the_budget_is_refused_with_figures(
    make: Make, loaders: Loaders
) -> None:
    pool = make("a", vram=1)
    pool.add("big", lambda: nn.Sequential(build("b"), build("c")).to("cuda:0"))
    use(pool, "a")
    with pytest.raises(qmove.NotEnoughMemory, match="VRAM budget") as raised:
        pool.use("big").acquire()
    assert (raised.value.needed, raised.value.free) == (2 * SIZE, SIZE)
    use(pool, "a")
    assert pool.figures()["in_vram"] == {"cuda:0": SIZE}


def test_a_loader_on_the_cpu_is_brought_to_the_device(make: Make, loaders: Loaders) -> None:
    pool = make("", vram=1)
    for name in "ab":
        pool.add(name, loaders(name, "cpu"), nbytes=SIZE)
    use(pool, "abab")
    with pool.use("a") as model:
        assert model[0].weight.device == DEVICE
    assert loaders.loads == {"a": 1, "b": 1}


def test_a_loader_that_runs_out_of_vram_gets_what_idle_models_have(
    make: Make, loaders: Loaders
) -> None:
    pool = make("a", vram=2)
    use(pool, "a")
    tries: list[int] = []

    def load() -> nn.Module:
        tries.append(torch.cuda.memory_allocated())
        if pool.figures()["in_vram"].get("cuda:0"):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return build("big").to("cuda:0")

    pool.add("big", load, nbytes=SIZE)
    use_one(pool, "big")
    assert len(tries) == 2 and pool.state("a") is State.IN_RAM


@pytest.mark.parametrize("error", [RuntimeError("no such file"), KeyboardInterrupt()])
def test_what_a_loader_raises_reaches_the_caller_and_the_pool_goes_on(
    make: Make, loaders: Loaders, error: BaseException
) -> None:
    pool = make("ab", vram=1)
    use(pool, "a")

    def fail(name: str) -> None:
        raise error

    loaders.fail = fail
    with pytest.raises(type(error)):
        pool.use("b").acquire()
    loaders.fail = lambda name: None
    assert pool.state("b") is State.NOT_LOADED
    use(pool, "ab")


def test_a_loader_that_gives_no_model_is_named(make: Make) -> None:
    pool = make("", vram=1)
    pool.add("none", lambda: None)
    with pytest.raises(qmove.NoTensors, match="NoneType"):
        pool.use("none").acquire()


def test_an_unknown_name_a_known_one_and_negative_budgets_are_refused(make: Make) -> None:
    pool = make("ab")
    with pytest.raises(KeyError, match=r"no model 'x' in the pool. There is: 'a', 'b'"):
        pool.use("x")
    with pytest.raises(ValueError, match="'a' in the pool already"):
        pool.add("a", lambda: None)
    with pytest.raises(ValueError, match="vram"):
        ModelPool(vram=-1)
    with pytest.raises(qmove.UnknownDevice):
        ModelPool(device="cuda:7")


def test_a_model_that_is_removed_is_gone(make: Make, gpu: GPU) -> None:
    pool = make("ab", vram=2)
    use(pool, "ab")
    pool.remove("a")
    assert pool.names() == ["b"] and gpu.allocated() == SIZE
    with pool.use("b"), pytest.raises(qmove.InUse):
        pool.remove("b")
    pool.remove("b")
    assert gpu.allocated() == 0


def test_budgets_hold_for_each_device(loaders: Loaders, make: Make, second_gpu: GPU) -> None:
    del second_gpu
    pool = ModelPool(vram={"cuda:0": SIZE, "cuda:1": 2 * SIZE}, ram={"cuda:0": SIZE, "cuda:1": 0})
    for name in "abc":
        pool.add(name, loaders(name), nbytes=SIZE, seconds=1.0)
    for name in "xyz":
        pool.add(name, loaders(name, "cuda:1"), nbytes=SIZE, seconds=1.0, device="cuda:1")
    with pool:
        use(pool, "abxyabxy")
        assert loaders.loads == dict.fromkeys("abxy", 1)
        use(pool, "z")
        assert states(pool) == {
            "a": State.IN_RAM,
            "b": State.HOME,
            "c": State.NOT_LOADED,
            "x": State.NOT_LOADED,
            "y": State.HOME,
            "z": State.HOME,
        }
        use(pool, "c")
        assert states(pool)["a"] is State.NOT_LOADED


def test_prefetch_brings_the_next_ones_home_and_they_leave_last(
    make: Make, loaders: Loaders
) -> None:
    pool = make("abcd", vram=2)
    use(pool, "abcd")
    with pool.use("a"):
        pool.prefetch("b", "c")
        until_prefetched(pool)
        assert states(pool)["b"] is State.HOME
        before = qmove.stats().restores
        use(pool, "b")
        assert qmove.stats().restores == before
    until_prefetched(pool)
    assert states(pool)["c"] is State.HOME
    assert loaders.loads == dict.fromkeys("abcd", 1)


def until_prefetched(pool: ModelPool) -> None:
    """Waits for what the pool does in the background."""
    pool._desk._background.submit(lambda: None).result(60)


def test_a_prefetch_parks_nothing_that_is_used_or_comes_next(make: Make) -> None:
    pool = make("abc", vram=1)
    use(pool, "a")
    with pool.use("b"):
        pool.prefetch("a")
        until_prefetched(pool)
        assert states(pool) == {"a": State.IN_RAM, "b": State.ON_LEASE, "c": State.NOT_LOADED}
    until_prefetched(pool)
    assert states(pool)["a"] is State.HOME


def test_asleep_it_holds_no_vram_and_uses_wait(make: Make, gpu: GPU) -> None:
    pool = make("ab", vram=2)
    use(pool, "ab")
    with pool.use("a"), pytest.raises(qmove.QMoveError, match="still on lease: a"):
        pool.sleep(timeout=0)
    assert not pool.is_sleeping
    assert pool.sleep() == 2 * SIZE
    assert gpu.allocated() == 0 and pool.is_sleeping
    with pytest.raises(qmove.QMoveError, match="sleeps"):
        pool.use("a", timeout=0).acquire()
    pool.wake_up()
    until_prefetched(pool)
    assert not pool.is_sleeping and gpu.allocated() == 2 * SIZE
    use(pool, "ab")


def test_a_model_that_wakes_outside_of_a_lease_gets_room(make: Make) -> None:
    pool = make("ab", vram=1)
    with pool.use("a") as model:
        pass
    use(pool, "b")
    assert pool.state("a") is State.IN_RAM
    simcuda.set_memory(SIZE + SIZE // 2 + torch.cuda.memory_allocated() - SIZE, device=0)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs()).cpu(), build("a")(inputs("cpu")))
    assert states(pool) == {"a": State.HOME, "b": State.IN_RAM}


def test_a_closed_pool_holds_nothing_and_refuses(make: Make, gpu: GPU) -> None:
    pool = make("ab", vram=2)
    use(pool, "ab")
    pool.close()
    assert gpu.allocated() == 0 and pool.names() == []


def test_the_figures_tell_where_each_model_is(make: Make) -> None:
    pool = make("ab", vram=1)
    use(pool, "ab")
    about = pool.figures()["by_name"]
    assert about["a"]["ram"] == SIZE and about["a"]["vram"] == {}
    assert about["b"]["vram"] == {"cuda:0": SIZE} and about["b"]["loads"] == 1
    with pool.use("a"):
        assert pool.figures()["by_name"]["a"]["state"] == "in use"
    assert pool.figures()["by_name"]["a"]["wakes"] == 1
