"""Models that no wire carries, in a real ComfyUI: on a node's instance, in a global, a closure ...

The node gives out a text or a mask; then a loader needs the room. Without qmove it runs out of
memory, or the case would show nothing; with qmove the hidden model goes, and is back when its node
runs again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.nodes.builders.comfyui_process import ComfyUI
from tests.nodes.builders.real_prompts import (
    CARELESS,
    assert_passed,
    digests,
    load,
    messages,
    needs_comfyui,
    node,
    show,
    start,
    use,
)

pytestmark = needs_comfyui

MIB = 1 << 20
MEMORY, HIDDEN_MIB, LOADED_MIB = "128MiB", 50, 100

PLACES = {
    "the node's instance": "HideOnInstance",
    "a module's global": "HideInGlobal",
    "a class attribute": "HideOnClass",
    "an lru_cache": "HideInLruCache",
    "a closure": "HideInClosure",
    "a functools.partial": "HideInPartial",
    "a session's dict": "HideInSession",
    "an object of another thread": "HideInThread",
    "a plain object with tensors in a dict": "HideInObject",
    "the instance of a node that gives a mask": "HideAndMask",
}
NAMES = tuple(PLACES)


def caption(place: str, text: str, mib: int = HIDDEN_MIB, **inputs: Any) -> dict[str, Any]:
    """The node that hides its model, and what it shows."""
    name = PLACES[place]
    prompt = {"caption": node(name, mib=mib, text=text, **inputs)}
    source = "caption"
    if name == "HideAndMask":
        prompt["read"] = node("ReadMask", mask=("caption", 0))
        source = "read"
    return prompt | {"show1": show(source)}


def loading(seed: int, mib: int = LOADED_MIB, **after: Any) -> dict[str, Any]:
    """The loader that needs the room, and the model's use."""
    prompt = {"load": load(mib, seed=seed % 3, **after), "use": use("load", seed=seed)}
    return prompt | {"show2": show("use")}


def both(place: str, text: str, seed: int, **sizes: int) -> dict[str, Any]:
    """In one prompt: first the node that hides its model, then the loader."""
    first = caption(place, text, mib=sizes.get("hidden", HIDDEN_MIB))
    source = ("read" if "read" in first else "caption", 0)
    return first | loading(seed, sizes.get("loaded", LOADED_MIB), after=source)


@pytest.fixture(scope="module")
def comfyui(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    with start(tmp_path_factory.mktemp("hidden"), MEMORY) as comfyui:
        yield comfyui


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyUI]:
    """A ComfyUI without qmove."""
    with start(tmp_path_factory.mktemp("alone"), MEMORY, packs=(CARELESS,)) as comfyui:
        yield comfyui


@pytest.fixture
def nothing_hidden(comfyui: ComfyUI, alone: ComfyUI) -> Iterator[None]:
    yield
    for each in (comfyui, alone):
        assert each.post("/careless/forget", {})[0] == 200


def texts(comfyui: ComfyUI, place: str, *captions: str) -> list[str]:
    """What the node shows for these texts when it has the GPU for itself."""
    results = []
    for text in captions:
        history = comfyui.run(caption(place, text))
        assert_passed(comfyui, history)
        results.append(digests(history)["show1"])
    return results


@pytest.mark.parametrize("place", NAMES)
@pytest.mark.usefixtures("nothing_hidden")
def test_without_qmove_the_loader_runs_out_of_memory(alone: ComfyUI, place: str) -> None:
    for seed in (0, 1):
        history = alone.run(both(place, f"text {seed}", seed))

        (error,) = messages(history, "execution_error")
        assert error["node_id"] == "load"
        assert "OutOfMemoryError" in error["exception_type"]


@pytest.mark.parametrize("place", NAMES)
@pytest.mark.usefixtures("nothing_hidden")
def test_a_loader_that_needs_the_room_passes(comfyui: ComfyUI, alone: ComfyUI, place: str) -> None:
    expected = texts(alone, place, "a", "bb", "ccc")
    for run, text in enumerate(("a", "bb", "ccc")):
        history = comfyui.run(both(place, text, seed=run))
        assert_passed(comfyui, history)
        assert digests(history)["show1"] == expected[run]


@pytest.mark.parametrize("place", NAMES)
@pytest.mark.usefixtures("nothing_hidden")
def test_two_workflows_in_turn(comfyui: ComfyUI, alone: ComfyUI, place: str) -> None:
    expected = texts(alone, place, "a", "bb", "ccc")
    for turn, text in enumerate(("a", "bb", "ccc")):
        history = comfyui.run(caption(place, text))
        assert_passed(comfyui, history)
        assert digests(history)["show1"] == expected[turn]
        assert_passed(comfyui, comfyui.run(loading(seed=10 + turn)))


@pytest.mark.parametrize("place", NAMES)
@pytest.mark.usefixtures("nothing_hidden")
def test_an_interrupt_leaves_everything_ready(comfyui: ComfyUI, alone: ComfyUI, place: str) -> None:
    (expected,) = texts(alone, place, "after it")
    noted = f"slow {PLACES[place]}"
    count = comfyui.times_noted(noted)
    prompt_id = comfyui.submit(caption(place, "slow", slow=True))
    comfyui.until(lambda: comfyui.times_noted(noted) > count, "the slow node")
    comfyui.post("/interrupt", {})
    history = comfyui.result(prompt_id)
    assert messages(history, "execution_interrupted")[0]["node_id"] == "caption"

    assert_passed(comfyui, comfyui.run(loading(seed=20)))
    history = comfyui.run(caption(place, "after it"))
    assert_passed(comfyui, history)
    assert digests(history)["show1"] == expected


def test_a_loader_of_1200_mib_in_2000_mib_passes_on_every_prompt(tmp_path: Any) -> None:
    sizes = {"hidden": 1000, "loaded": 1200}
    for packs, passes in ((None, True), ((CARELESS,), False)):
        folder = tmp_path / ("alone" if packs else "qmove")
        with start(folder, "2000MiB", **({"packs": packs} if packs else {})) as comfyui:
            for run in range(3):
                history = comfyui.run(both("the node's instance", f"text {run}", run, **sizes))
                if passes:
                    assert_passed(comfyui, history)
                else:
                    (error,) = messages(history, "execution_error")
                    assert error["node_id"] == "load"
