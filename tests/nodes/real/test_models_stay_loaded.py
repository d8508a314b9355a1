"""A real ComfyUI: workflows that take turns load each of their models once, within a budget of RAM.

Two models do not fit the GPU together. Every prompt has node ids of its own, as another workflow has.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import pytest

from tests.nodes.builders.comfyui_process import ComfyUI
from tests.nodes.builders.real_prompts import (
    CARELESS,
    COMFYUI_DIR,
    assert_passed,
    load,
    model_bytes,
    needs_comfyui,
    node,
    show,
    start,
    use,
)

has_providers = (
    COMFYUI_DIR is not None and (Path(COMFYUI_DIR) / "comfy_execution/cache_provider.py").exists()
)
pytestmark = [
    *needs_comfyui,
    pytest.mark.skipif(not has_providers, reason="this ComfyUI asks no other caches"),
]

VRAM, MIB = "256MiB", 153
PROMPTS = 10
CACHES = {
    "default": (),
    "classic": ("--cache-classic",),
    "LRU": ("--cache-lru", "10"),
    "RAM pressure": ("--cache-ram", "0.5"),
}


def workflow(number: int, run: int, file: Path | None = None) -> dict[str, Any]:
    """The workflow with the model `number`, from its file where one is given, with node ids and a
    seed of its own for each run."""
    loader = load(MIB, seed=number) if file is None else node("CarelessFileLoader", path=str(file))
    return {
        f"{run}load": loader,
        f"{run}use": use(f"{run}load", seed=run),
        f"show{run}": show(f"{run}use"),
    }


def weights(number: int, folder: Path) -> Path:
    """A file with the weights of the model `number`, as `load` makes them."""
    values = (numpy.arange(8, dtype=numpy.float32) + number) / 1024
    path = folder / f"{number}.weights"
    numpy.repeat(values, model_bytes(MIB) // 4 // 8).tofile(path)
    return path


def digest(history: dict[str, Any]) -> str:
    ((text,),) = (output["text"] for output in history["outputs"].values())
    return str(text).split()[0]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], str]:
    """What each run gives without qmove, on a GPU with room for all."""
    with start(tmp_path_factory.mktemp("alone"), "4GiB", packs=(CARELESS,)) as comfyui:
        digests = {}
        for run in range(PROMPTS):
            for number in (1, 2, 3):
                history = comfyui.run(workflow(number, run))
                assert_passed(comfyui, history)
                digests[number, run] = digest(history)
        return digests


def ram_held(comfyui: ComfyUI) -> int:
    """Bytes of RAM that models take: those that are kept, and qmove's own copies."""
    state = comfyui.get("/qmove/state")
    return max(state["pool"]["in_ram"], state["ram"]["parked"]) + sum(
        state["ram"][kind] for kind in ("mirrors", "spare")
    )


def run_sampled(comfyui: ComfyUI, prompt: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """Runs a prompt; its history, and the most RAM that was held meanwhile, as far as was seen."""
    prompt_id, most = comfyui.submit(prompt), 0

    def ended() -> Any:
        nonlocal most
        most = max(most, ram_held(comfyui))
        return comfyui.get(f"/history/{prompt_id}").get(prompt_id)

    history = comfyui.until(ended, f"ends prompt {prompt_id}")
    return history, max(most, ram_held(comfyui))


@pytest.mark.parametrize("cache", CACHES)
def test_two_workflows_that_take_turns_load_each_model_once(
    tmp_path: Path, expected: dict[tuple[int, int], str], cache: str
) -> None:
    files = {number: weights(number, tmp_path) for number in (1, 2)}
    with start(tmp_path, VRAM, arguments=CACHES[cache]) as comfyui:
        read = []
        for run in range(PROMPTS):
            number = 1 + run % 2
            if run == 6:
                status, _ = comfyui.post("/free", {"unload_models": True, "free_memory": True})
                assert status == 200
            history = comfyui.run(workflow(number, run, files[number]))
            assert_passed(comfyui, history)
            assert digest(history) == expected[number, run]
            read.append(comfyui.get("/careless/reads"))

        assert [comfyui.times_noted(f"load {file.name}") for file in files.values()] == [1, 1]
        # Bytes from disk, and from the page cache: from the third prompt on none of a file. What
        # the process reads besides (its own state in /proc) is less than a layer takes.
        assert [each["opened"] for each in read] == [1, *[2] * (PROMPTS - 1)]
        assert read[1]["bytes"] - read[0]["bytes"] >= model_bytes(MIB)
        assert read[-1]["bytes"] - read[1]["bytes"] < model_bytes(MIB) // 8 // 2
        pool = comfyui.get("/qmove/state")["pool"]
        assert (pool["models"], pool["misses"]) == (2, 2)
        # A cache that keeps both itself (LRU, and RAM pressure up to 0.18) asks only after /free.
        itself = cache in ("LRU", "RAM pressure") and pool["hits"] == 2
        assert itself or pool["hits"] == PROMPTS - 2
        assert pool["nbytes"] == 2 * model_bytes(MIB)
        assert pool["seconds_saved"] > 0


@pytest.mark.xfail(
    strict=False,
    reason="what ComfyUI itself evicts is parked even where the pool has only room for another",
)
def test_ram_never_goes_beyond_the_budget(
    tmp_path: Path, expected: dict[tuple[int, int], str]
) -> None:
    gib = 0.2  # one parked model
    with start(tmp_path, VRAM, settings={"qmove.keepLoadedLimit": gib}) as comfyui:
        for run in range(PROMPTS):
            number = 1 + run % 3
            history, most = run_sampled(comfyui, workflow(number, run))
            assert_passed(comfyui, history)
            assert digest(history) == expected[number, run]
            assert most <= gib * 2**30
        assert sum(comfyui.times_noted(f"load {MIB} {number}") for number in (1, 2, 3)) > 3


def test_comfyuis_own_models_stay_loaded_where_the_setting_says_so(tmp_path: Path) -> None:
    def own(number: int, run: int) -> dict[str, Any]:
        mib = 60 + number
        sample = node("CarelessSample", model=(f"{run}load", 0), seed=run)
        loader = node("CarelessOwnLoader", mib=mib)
        return {f"{run}load": loader, f"{run}use": sample, f"show{run}": show(f"{run}use")}

    with start(tmp_path, "4GiB", arguments=("--cache-classic",)) as comfyui:
        for run in range(4):
            assert_passed(comfyui, comfyui.run(own(1 + run % 2, run)))
        before = [comfyui.times_noted(f"load own {60 + number}") for number in (1, 2)]
        assert comfyui.post("/qmove/settings", {"qmove.keepLoadedOwn": True})[0] == 200
        for run in range(4, 10):
            assert_passed(comfyui, comfyui.run(own(1 + run % 2, run)))
        after = [comfyui.times_noted(f"load own {60 + number}") for number in (1, 2)]

    assert before == [2, 2]
    # The last workflow's is still in ComfyUI's cache when the setting changes.
    assert sum(after) - sum(before) in (1, 2)


def test_with_cache_none_loaders_run_each_time_and_the_log_says_why(tmp_path: Path) -> None:
    with start(tmp_path, VRAM, arguments=("--cache-none",)) as comfyui:
        for run in range(4):
            assert_passed(comfyui, comfyui.run(workflow(1 + run % 2, run)))
        assert comfyui.get("/qmove/state")["pool"] is None

        assert [comfyui.times_noted(f"load {MIB} {number}") for number in (1, 2)] == [2, 2]
        assert "With --cache-none ComfyUI asks no other caches" in comfyui.log.read_text()
