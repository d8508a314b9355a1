"""The templates: models that ComfyUI does not manage and that do not fit together; each one is run."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import qmove_pack
import torch
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.pool.keeping import pool
from qmove_pack.stand_ins import segmenter

import qmove_core as qmove
import simcuda
from tests.browser.small_comfyui.core_nodes import CORE_NODES
from tests.nodes.builders.careless_nodes import MIB
from tests.nodes.builders.fake_host import FakeHost

TEMPLATES = sorted((Path(__file__).resolve().parents[2] / "example_workflows").glob("*.json"))
CLASSES: dict[str, Any] = {cls.__name__: cls for cls in CORE_NODES} | qmove_pack.NODE_CLASS_MAPPINGS
CARD = 320 * MIB

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.parametrize("host", ["new"], indirect=True),  # the browser tests open them in each
]


@pytest.fixture(autouse=True)
def _card(host: FakeHost) -> Iterator[None]:
    """One small GPU, on which no model of an earlier test is left."""
    for name, cls in CLASSES.items():
        cls.__name__ = name  # the fake host's key
        host.add(cls)
    simcuda.set_memory(CARD, 0)
    yield
    forget_models(host)


def forget_models(host: FakeHost) -> None:
    """As a restart would."""
    pool.forget_all()
    host.instances.clear()
    host.cache.entries.clear()
    segmenter._model.cache_clear()
    gc.collect()


def prompt_of(file: Path) -> dict[str, Any]:
    """What a frontend makes of a workflow: widgets by their order, links by number."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    links = {link: [str(source), output] for link, source, output, *_ in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        types = CLASSES[node["type"]].INPUT_TYPES()
        stored = iter(node.get("widgets_values", ()))
        inputs: dict[str, Any] = {}
        for name, (kind, *options) in {**types["required"], **types.get("optional", {})}.items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
                inputs[name] = next(stored, (options[0] if options else {}).get("default"))
        for slot in node["inputs"]:
            if slot["link"] is not None:
                inputs[slot["name"]] = links[slot["link"]]
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def node_of(prompt: dict[str, Any], class_name: str, number: int = 0) -> str:
    return [n for n, node in prompt.items() if node["class_type"] == class_name][number]


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_a_template_runs_to_its_end_again_and_again(host: FakeHost, file: Path) -> None:
    prompt = prompt_of(file)

    for seed in range(2):
        for node in prompt.values():
            if node["class_type"] == "EmptyImage":
                node["inputs"]["color"] = 0x808080 + seed
        outputs = host.run(prompt)

        assert host.errors == []
        assert outputs.keys() == prompt.keys()


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_its_note_names_the_pack_of_its_stand_ins_and_its_groups_its_stages(file: Path) -> None:
    workflow = json.loads(file.read_text(encoding="utf-8"))
    (note,) = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    stand_ins = [node for node in workflow["nodes"] if "StandIn" in node["type"]]

    assert stand_ins
    for text in ("(stand-in)", "this pack (qmove)", "ComfyUI does not manage"):
        assert text in note["widgets_values"][0]
    assert len(workflow["groups"]) >= 3
    assert len(file.stem) <= 24
    titles = qmove_pack.NODE_DISPLAY_NAME_MAPPINGS
    for node in stand_ins:
        assert "(stand-in)" in node.get("title", titles[node["type"]])


@pytest.mark.parametrize("file", TEMPLATES, ids=lambda file: file.stem)
def test_it_has_a_thumbnail_of_the_kind_that_the_frontend_asks_for(file: Path) -> None:
    from PIL import Image

    with Image.open(file.with_suffix(".jpg")) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (640, 400)
    assert file.with_suffix(".jpg").stat().st_size < 80_000


def test_three_models_on_one_gpu_end_in_out_of_memory_without_auto_parking(host: FakeHost) -> None:
    prompt = prompt_of(next(file for file in TEMPLATES if "Three" in file.stem))

    with_qmove = host.run(prompt)
    assert host.errors == []
    forget_models(host)
    settings.change({settings.AUTO_PARK: False})
    host.run(prompt)

    (error,) = host.errors
    assert isinstance(error, torch.OutOfMemoryError)
    [[caption]] = with_qmove[node_of(prompt, "qmoveStandInCaptioner")]
    assert re.fullmatch(r"A picture of 512 x 512 pixels: red 0\.36, green 0\.55, .+", caption)


def test_make_room_first_says_how_much_it_freed_and_starts_with_half_of_the_card(
    host: FakeHost,
) -> None:
    prompt = prompt_of(next(file for file in TEMPLATES if "room" in file.stem))
    free = node_of(prompt, "QMoveFreeVRAM")
    assert prompt[free]["inputs"]["gib"] == 0.2  # of 320 MiB

    outputs = host.run(prompt)

    _after, _report, [freed], [now] = outputs[free]
    assert freed > 0
    assert now >= 0.2
    shown = [outputs[n] for n in prompt if prompt[n]["class_type"] == "PreviewAny"]
    assert [float(text) for ((text,),) in shown] == [freed, now]


def test_unload_and_load_back_parks_between_the_two_sentences(host: FakeHost) -> None:
    prompt = prompt_of(next(file for file in TEMPLATES if "Unload" in file.stem))

    outputs = host.run(prompt)

    [model], _sound, [report], [freed], [now] = outputs[node_of(prompt, "QMovePark")]
    assert freed == 6 * 32 / 1024  # layers of 60 % of the card
    assert now == CARD / 2**30
    assert report.startswith("Parked Speech")
    assert outputs[node_of(prompt, "QMoveRestore")] == [
        [model],
        ["Restored SpeechModel: 192.00 MiB, now 192.00 MiB on cuda:0."],  # on its way already
    ]
    assert not qmove.is_parked(model)


def test_a_stand_in_notices_a_weight_that_is_not_what_it_was(host: FakeHost) -> None:
    from qmove_pack.stand_ins.models import StandIn

    model = StandIn(2, torch.device("cuda:0"))
    model.check()
    model.layers[1].data[0, 0] += 1

    with pytest.raises(RuntimeError, match="not what they were"):
        model.check()
