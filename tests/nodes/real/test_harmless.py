"""Harmless, in a real ComfyUI: where everything fits, not a byte moves that does not move without
qmove, in the first run as in later ones, and the outputs are the same.

Each case runs in a ComfyUI with qmove and in one without; what is compared are the bytes that each
prompt copied into and out of each device, and the texts it showed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.builders.comfyui_process import ComfyUI
from tests.nodes.builders.real_prompts import (
    CARELESS,
    assert_passed,
    digests,
    load,
    model_bytes,
    needs_comfyui,
    node,
    show,
    start,
    use,
)

pytestmark = needs_comfyui

MIB = 1 << 20
Moved = list[list[tuple[int, int]]]  # by prompt and device: bytes in, bytes out


def four_texts(run: int, model_mib: int = 380) -> dict[str, Any]:
    """Four text nodes beside one model; their texts are others in each run."""
    prompt = {"load": load(model_mib), "use0": use("load", seed=run)}
    for number in range(1, 5):
        after = (f"text{number - 1}" if number > 1 else "use0", 0)
        text = f"a text of run {run}, number {number}"
        prompt[f"text{number}"] = node("CarelessText", text=text, after=after)
    return prompt | {"use5": use("load", seed=run, after=("text4", 0)), "show": show("use5")}


def own_model(run: int) -> dict[str, Any]:
    """ComfyUI's own model of 400 MiB between two text nodes, and a pack's node that computes."""
    return {
        "load": node("CarelessOwnLoader", mib=400),
        "before": node("CarelessText", text=f"run {run}"),
        "sample": node("CarelessSample", model=("load", 0), seed=run, after=("before", 0)),
        "after": node("CarelessText", text="after", after=("sample", 0)),
        "scratch": node("CarelessScratch", mib=64, device="cuda:0", seed=run, after=("after", 0)),
        "again": node("CarelessSample", model=("load", 0), seed=run + 1, after=("scratch", 0)),
        "show": show("again"),
    }


def changing_text(run: int) -> dict[str, Any]:
    """One text widget that is another each time, before the one model."""
    return {
        "load": load(380),
        "text": node("CarelessText", text=f"a prompt that was never there: {run}"),
        "use": use("load", after=("text", 0)),
        "show": show("use"),
    }


def loop(rounds: int, seed: int) -> dict[str, Any]:
    """Two models of 600 MiB, which both run in each round."""
    models = {"first": ("load1", 0), "second": ("load2", 0)}
    return {
        "load1": load(600, seed=1),
        "load2": load(600, seed=2),
        "loop": node("CarelessLoop", **models, rounds=rounds, seed=seed),
        "show": show("loop"),
    }


CASES = {
    "four text nodes beside one 380 MiB model on 4000 MiB": (
        "4000MiB",
        [four_texts(run) for run in range(3)],
    ),
    "ComfyUI's own model of 400 MiB": ("4000MiB", [own_model(run) for run in range(3)]),
    "a text widget that changes each time": (
        "4000MiB",
        [changing_text(run) for run in range(4)],
    ),
    "a loop of five over two 600 MiB models on 2000 MiB, then loops of other lengths": (
        "2000MiB",
        [loop(5, 0), loop(5, 10), loop(3, 20), loop(6, 30)],
    ),
}


def moved_and_shown(
    comfyui: ComfyUI, prompts: list[dict[str, Any]]
) -> tuple[Moved, list[dict[str, str]]]:
    moved, outputs = [], []
    for prompt in prompts:
        history, bytes_moved = comfyui.moved(prompt)
        assert_passed(comfyui, history)
        moved.append(bytes_moved)
        outputs.append(digests(history))
    return moved, outputs


@pytest.fixture(scope="module")
def with_and_without(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[ComfyUI, ComfyUI]]]:
    """By VRAM: a ComfyUI with qmove, and one without. They run one after the other, as needed."""
    started: dict[str, tuple[ComfyUI, ComfyUI]] = {}

    class Pairs(dict[str, tuple[ComfyUI, ComfyUI]]):
        def __missing__(self, memory: str) -> tuple[ComfyUI, ComfyUI]:
            folder = tmp_path_factory.mktemp("qmove")
            guest = start(folder, memory).__enter__()
            started[memory] = guest, guest
            alone = start(tmp_path_factory.mktemp("alone"), memory, packs=(CARELESS,)).__enter__()
            started[memory] = self[memory] = guest, alone
            return guest, alone

    yield Pairs()
    for pair in started.values():
        for comfyui in pair:
            comfyui.__exit__(None, None, None)


@pytest.mark.parametrize("case", CASES)
def test_where_everything_fits_nothing_moves(
    case: str, with_and_without: dict[str, tuple[ComfyUI, ComfyUI]]
) -> None:
    memory, prompts = CASES[case]
    guest, alone = with_and_without[memory]

    without = moved_and_shown(alone, prompts)
    with_qmove = moved_and_shown(guest, prompts)

    assert with_qmove == without


def test_only_the_device_that_is_short(tmp_path: Path) -> None:
    """On two GPUs: the first lacks room, and what the second holds stays there."""
    first, second = {"device": "cuda:0"}, {"device": "cuda:1"}
    with start(tmp_path, "2000MiB", devices=2) as comfyui:
        for run in range(3):
            prompt = {
                "load1": load(700, seed=1, **second),
                "use1": use("load1", seed=run, scratch_mib=0),
                "load2": load(900, seed=2, **first, after=("use1", 0)),
                "use2": use("load2", seed=run, scratch_mib=0, after=("use1", 0)),
                "load3": load(1300, seed=3, **first, after=("use2", 0)),
                "use3": use("load3", seed=run, scratch_mib=0, after=("use2", 0)),
                "show": show("use3"),
            }
            history, moved = comfyui.moved(prompt)
            assert_passed(comfyui, history)
            assert moved[0][1] >= model_bytes(900), "the first GPU has no room for both"
            assert moved[1][0] == 0
            assert moved[1][1] < MIB  # results


def test_no_more_goes_than_is_needed(tmp_path: Path) -> None:
    """Three models of 500 MiB on 4000 MiB; for work of 2700 MiB (and the 10 % that is
    allowed for) one of them must go, and only one."""
    loads = {f"load{n}": load(500, seed=n) for n in (1, 2, 3)}
    with start(tmp_path, "4000MiB") as comfyui:
        for run in range(4):
            uses = {
                f"use{n}": use(f"load{n}", seed=run, after=(f"use{n - 1}", 0)) if n > 1
                else use("load1", seed=run)
                for n in (1, 2, 3)
            }  # fmt: skip
            scratch = node(
                "CarelessScratch", mib=2700, device="cuda:0", seed=run, after=("use3", 0)
            )
            history, moved = comfyui.moved(
                {**loads, **uses, "scratch": scratch, "show": show("scratch")}
            )
            assert_passed(comfyui, history)
            if run > 1:  # in the first run nobody knows what the work takes, and all made room
                assert moved[0][1] < model_bytes(500) + MIB, "out"
                assert moved[0][0] < model_bytes(500) + MIB, "and home again"
