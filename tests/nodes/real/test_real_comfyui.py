"""A real ComfyUI, as its own process: three stages whose models take 60 % of the VRAM each, from
loaders that know of no other.

Needs COMFYUI_DIR, a checkout of ComfyUI, and COMFYUI_PYTHON, a Python with its requirements (else
the one that runs the tests).
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
    messages,
    model_bytes,
    needs_comfyui,
    shown,
    start,
)

pytestmark = needs_comfyui

SMALL = ("256MiB", 153)  # VRAM, and 60 % of it in MiB
LARGE = ("1536MiB", 921)  # transformers' loader wants more than 1.2 GiB
RUNS = 5


def stages(
    mib: int,
    seed: int = 0,
    *,
    int8: Path | None = None,
    only: int | None = None,
    second: str = "CarelessRun",
    **extra: Any,
) -> dict[str, Any]:
    """Three stages, each with a loader of its own; `only` one of them, the second by another node,
    or with `extra` inputs."""
    prompt: dict[str, Any] = {}
    for stage in (1, 2, 3) if only is None else (only,):
        load: dict[str, Any] = {
            "class_type": "CarelessLoader",
            "inputs": {"mib": mib, "seed": stage, "wrapped": stage == 2},
        }
        if stage == 3 and int8 is not None:
            load = {"class_type": "CarelessInt8Loader", "inputs": {"folder": str(int8)}}
        inputs: dict[str, Any] = {"model": [f"load{stage}", 0]}
        if stage > 1 and only is None:
            inputs["after"] = [f"use{stage - 1}", 0]
        name = second if stage == 2 else "CarelessRun"
        if name == "CarelessRun":
            inputs |= {"seed": seed + stage, "scratch_mib": 20}
        prompt[f"load{stage}"] = load
        prompt[f"use{stage}"] = {
            "class_type": name,
            "inputs": inputs | (extra if stage == 2 else {}),
        }
        prompt[f"show{stage}"] = {
            "class_type": "CarelessShow",
            "inputs": {"text": [f"use{stage}", 0]},
        }
    return prompt


def with_park_nodes(prompt: dict[str, Any]) -> dict[str, Any]:
    """After each stage a Park node, which the next stage waits for."""
    result = dict(prompt)
    for stage in (1, 2, 3):
        inputs = {"model": [f"load{stage}", 0], "after": [f"use{stage}", 0]}
        result[f"park{stage}"] = {"class_type": "QMovePark", "inputs": inputs}
        if stage > 1:
            use = prompt[f"use{stage}"]
            result[f"use{stage}"] = use | {
                "inputs": use["inputs"] | {"after": [f"park{stage - 1}", 1]}
            }
    return result


@pytest.fixture(scope="module")
def int8_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that takes 60 % of the large GPU when its layers are loaded in 8 bit."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=2048, intermediate_size=5632, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16,
        vocab_size=106_000, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("int8")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).half()
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.05, 0.05, parameter.numel() % 9973 + 7).repeat(
                parameter.numel() // (parameter.numel() % 9973 + 7) + 1)[: parameter.numel()].view_as(parameter))  # fmt: skip
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    with start(tmp_path_factory.mktemp("small"), SMALL[0]) as comfyui:
        yield comfyui


@pytest.fixture(scope="module")
def careless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A ComfyUI without qmove."""
    with start(tmp_path_factory.mktemp("careless"), SMALL[0], packs=(CARELESS,)) as comfyui:
        yield comfyui


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each stage gives that runs alone, without qmove, on a GPU with room for all."""
    with start(tmp_path_factory.mktemp("alone"), "4GiB", packs=(CARELESS,)) as comfyui:
        histories = [comfyui.run(stages(SMALL[1], only=stage)) for stage in (1, 2, 3)]
        for history in histories:
            assert_passed(comfyui, history)
        return {name: digest for history in histories for name, digest in digests(history).items()}


@pytest.fixture
def switched_off(small: ComfyUI) -> Iterator[ComfyUI]:
    assert small.post("/qmove/settings", {"qmove.autoPark": False})[0] == 200
    yield small
    assert small.post("/qmove/settings", {"qmove.autoPark": True})[0] == 200


def test_without_qmove_the_second_loader_runs_out_of_memory_every_time(careless: ComfyUI) -> None:
    for run in range(RUNS):
        history = careless.run(stages(SMALL[1], seed=run))

        (error,) = messages(history, "execution_error")
        assert error["node_id"] == "load2"
        assert "OutOfMemoryError" in error["exception_type"]


def test_with_auto_parking_it_passes_every_time_with_the_outputs_of_running_alone(
    small: ComfyUI, alone: dict[str, str]
) -> None:
    history = small.run(stages(SMALL[1]))
    assert_passed(small, history)
    assert digests(history) == alone
    copied_in = [int(words[2]) for words in shown(history).values()]
    for run in range(1, RUNS):
        history = small.run(stages(SMALL[1], seed=10 * run))
        assert_passed(small, history)
        in_vram = {name: int(words[1]) for name, words in shown(history).items()}
        assert set(in_vram.values()) == {model_bytes(SMALL[1])}
        nbytes = sum(in_vram.values())
        now = [int(words[2]) for words in shown(history).values()]
        if run > 1:  # each stage brings its model home once, and nothing else comes along
            assert nbytes <= now[-1] - copied_in[-1] < nbytes + 2**20
        copied_in = now


def test_an_8_bit_transformers_model_among_them_passes_as_well(
    tmp_path: Path, int8_model: Path
) -> None:
    memory, mib = LARGE
    with start(tmp_path, memory) as comfyui:
        first = None
        for _run in range(RUNS):
            comfyui.run(stages(mib, seed=100, only=1))  # all stages but the loaders run anew
            history = comfyui.run(stages(mib, int8=int8_model))
            assert_passed(comfyui, history)
            assert all(int(words[1]) > 0.55 * 1536 * 2**20 for words in shown(history).values())
            assert all(int(words[1]) < 0.65 * 1536 * 2**20 for words in shown(history).values())
            first = first or digests(history)
            assert digests(history) == first
        comfyui.post("/free", {"unload_models": True, "free_memory": True})
        by_itself = comfyui.run(stages(mib, int8=int8_model, only=3))
        assert digests(by_itself)["show3"] == first["show3"]


def test_with_park_nodes_in_place_of_the_switch(switched_off: ComfyUI) -> None:
    switched_off.post("/qmove/park", {"models": "all"})
    for run in range(2):
        history = switched_off.run(with_park_nodes(stages(SMALL[1], seed=1000 * run)))
        assert_passed(switched_off, history)
        in_vram = {name: int(words[1]) for name, words in shown(history).items()}
        assert set(in_vram.values()) == {model_bytes(SMALL[1])}
    state = switched_off.get("/qmove/state")
    assert [model["resident"] for model in state["models"]] == [{}, {}, {}]


def test_with_caching_switched_off(tmp_path: Path, alone: dict[str, str]) -> None:
    with start(tmp_path, SMALL[0], arguments=("--cache-none",)) as comfyui:
        for _run in range(2):
            history = comfyui.run(stages(SMALL[1]))
            assert_passed(comfyui, history)
            assert digests(history) == alone


def test_an_interrupt_in_stage_two_leaves_everything_ready_for_the_next_run(
    small: ComfyUI, alone: dict[str, str]
) -> None:
    prompt_id = small.submit(stages(SMALL[1], seed=500, second="CarelessSlow"))
    small.until(lambda: small.times_noted("slow"), "stage two")
    small.post("/interrupt", {})

    history = small.result(prompt_id)

    assert messages(history, "execution_interrupted")[0]["node_id"] == "use2"
    again = small.run(stages(SMALL[1]))
    assert_passed(small, again)
    assert digests(again) == alone


def test_a_node_that_raises_leaves_everything_ready_for_the_next_run(
    small: ComfyUI, alone: dict[str, str]
) -> None:
    history = small.run(stages(SMALL[1], seed=600, fail=True))

    (error,) = messages(history, "execution_error")
    assert (error["node_id"], error["exception_type"]) == ("use2", "ValueError")
    again = small.run(stages(SMALL[1]))
    assert_passed(small, again)
    assert digests(again)["show3"] == alone["show3"]


def test_comfyuis_own_unloading_parks_everything(small: ComfyUI) -> None:
    assert_passed(small, small.run(stages(SMALL[1], seed=700)))

    def everything_is_parked() -> bool:
        # Asked for again each time: ComfyUI misses the request that comes just before its worker
        # begins to wait.
        assert small.post("/free", {"unload_models": True})[0] == 200
        return all(model["state"] == "parked" for model in small.get("/qmove/state")["models"])

    small.until(everything_is_parked, "parks all models")
    assert_passed(small, small.run(stages(SMALL[1], seed=701)))


def test_its_routes(small: ComfyUI) -> None:
    settings = small.get("/qmove/settings")
    assert settings["qmove.autoPark"] is True
    assert settings["qmove.autoParkWhen"] == "needed"
    assert small.post("/qmove/settings", {"qmove.autoParkWhen": "stage"}) == (
        200,
        settings | {"qmove.autoParkWhen": "stage"},
    )
    assert small.get("/qmove/settings")["qmove.autoParkWhen"] == "stage"
    assert small.post("/qmove/settings", settings) == (200, settings)
    for body in (b"{", [], {"qmove.autoPark": 1}, {"unknown": 1}):
        status, answer = small.post("/qmove/settings", body)
        assert status == 400
        assert answer["error"]
    assert small.post("/qmove/free", {"gib": -1})[0] == 400
    assert small.post("/qmove/park", {"models": [10**6]})[0] == 400
    assert small.get("/qmove/settings") == settings

    assert_passed(small, small.run(stages(SMALL[1], seed=800)))
    assert small.post("/qmove/park", {"models": "all"})[0] == 200
    models = small.get("/qmove/state")["models"]
    assert models
    assert {model["state"] for model in models} == {"parked"}
    assert small.post("/qmove/restore", {"models": [models[0]["id"]]})[0] == 200
    assert small.get("/qmove/state")["models"][0]["state"] == "resident"
    status, answer = small.post("/qmove/free", {"gib": 0.5})
    assert (status, answer["report"].splitlines()[0][:7]) == (200, "cuda:0:")
    assert {model["state"] for model in small.get("/qmove/state")["models"]} == {"parked"}


def test_its_nodes_and_their_help_are_there(small: ComfyUI) -> None:
    known = small.get("/object_info")

    for name in ("QMovePark", "QMoveRestore", "QMoveMaterialize", "QMoveReport", "QMoveFreeVRAM"):
        assert known[name]["category"] == "qmove"
    assert known["QMovePark"]["output_name"][:3] == ["model", "after", "report"]


def test_stored_settings_hold_from_the_start_and_off_means_off(tmp_path: Path) -> None:
    with start(tmp_path, SMALL[0], settings={"qmove.autoPark": False}) as comfyui:
        assert comfyui.get("/qmove/settings")["qmove.autoPark"] is False

        history = comfyui.run(stages(SMALL[1]))

        (error,) = messages(history, "execution_error")
        assert error["node_id"] == "load2"
        assert comfyui.get("/qmove/state")["models"] == []
