"""What nodes report, in the language that ComfyUI is set to."""

from __future__ import annotations

import ast
import json
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from qmove_pack.nodes import NODE_CLASS_MAPPINGS
from qmove_pack.nodes.host import words

from tests.builders.device import GPU
from tests.nodes.builders.careless_nodes import model_of
from tests.nodes.builders.fake_host import FakeHost

ROOT = Path(__file__).resolve().parents[2]


def sentences_in_the_code() -> Iterator[str]:
    for file in sorted((ROOT / "nodes").rglob("*.py")):
        for call in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and "say" in (
                getattr(call.func, "id", ""),
                getattr(call.func, "attr", ""),
            ):
                for part in ast.walk(call.args[0]):
                    if isinstance(part, ast.Constant) and isinstance(part.value, str):
                        yield part.value


def fields_of(sentence: str) -> set[str]:
    return {
        field for _text, field, _spec, _conversion in string.Formatter().parse(sentence) if field
    }


@pytest.mark.parametrize("language", ["ja", "zh"])
def test_each_sentence_of_a_report_is_translated_with_its_figures(language: str) -> None:
    file = ROOT / "locales" / language / "reports.json"
    translated: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))

    assert translated.keys() == set(sentences_in_the_code())
    for sentence, translation in translated.items():
        assert fields_of(translation) == fields_of(sentence)
        without_fields = translation.translate(str.maketrans("", "", "{}"))
        assert not without_fields.isascii() or sentence in ("A {type}", "An {type}")


@pytest.fixture
def user(host: FakeHost, tmp_path: Path) -> Iterator[Path]:
    """The file of ComfyUI's default user, where a language can be chosen."""
    host.user_directory = str(tmp_path)
    (tmp_path / "default").mkdir()
    yield tmp_path / "default" / "comfy.settings.json"
    words.follow_browser("en")


def reports(model: Any) -> list[str]:
    """What Park Model, Restore Model, Pin Model, Free VRAM and Memory Report say, in this order."""
    said = []
    for name, inputs in (
        ("QMovePark", {"model": model}),
        ("QMoveRestore", {"model": model, "device": "home"}),
        ("QMovePin", {"model": model, "choice": "pin"}),
        ("QMovePin", {"model": model, "choice": "unpin"}),
        ("QMoveFreeVRAM", {"gib": 0.1}),
        ("QMoveMaterialize", {"model": model, "target_device": "cpu"}),
        ("QMoveReport", {}),
    ):
        cls = NODE_CLASS_MAPPINGS[name]
        said += getattr(cls(), cls.FUNCTION)(**inputs)["ui"]["text"]  # type: ignore[attr-defined]
    return said


@pytest.mark.parametrize(
    ("locale", "parked"),
    [
        ("en", "Parked Sequential: "),
        ("zh", "已停放 Sequential"),
        ("zh-TW", "已停放 Sequential"),
        ("ja", "Sequential を退避しました"),
        ("fr", "Parked Sequential: "),
    ],
)
def test_reports_are_in_the_language_that_is_set(
    user: Path, gpu: GPU, locale: str, parked: str
) -> None:
    user.write_text(json.dumps({"Comfy.Locale": locale}), encoding="utf-8")

    said = reports(model_of(8))

    assert said[0].startswith(parked)
    speaks_english = locale in ("en", "fr")
    assert [report.isascii() for report in said] == [speaks_english] * len(said)


def test_a_change_of_the_language_holds_from_the_next_report_on(user: Path, gpu: GPU) -> None:
    for locale, start in (("ja", "Sequential を退避"), ("zh", "已停放"), ("en", "Parked")):
        user.write_text(json.dumps({"Comfy.Locale": locale, "n": len(start)}), encoding="utf-8")
        assert reports(model_of(8))[0].startswith(start)


@pytest.mark.parametrize("stored", [None, "{}", "{", "[]", '{"Comfy.Locale": 7}'])
@pytest.mark.parametrize(
    ("accepted", "language"),
    [("ja,en-US;q=0.9", "ja"), ("zh-CN", "zh"), ("de-DE,zh;q=0.5", "en"), ("*", "en")],
)
def test_while_none_is_chosen_it_is_the_browsers_as_for_comfyuis_frontend(
    user: Path, stored: str | None, accepted: str, language: str
) -> None:
    if stored is not None:
        user.write_text(stored, encoding="utf-8")

    words.follow_browser(accepted)
    words.follow_browser(None)  # a program that asks says nothing of a language

    assert words.language() == language


def test_the_picture_of_the_report_is_drawn_in_every_language(user: Path, gpu: GPU) -> None:
    pictures = []
    model = model_of(8)
    NODE_CLASS_MAPPINGS["QMovePark"]().park(model)  # type: ignore[attr-defined]
    for locale in ("zh", "en"):
        user.write_text(json.dumps({"Comfy.Locale": locale}), encoding="utf-8")
        pictures.append(NODE_CLASS_MAPPINGS["QMoveReport"]().report()["result"][1])  # type: ignore[attr-defined]

    assert all(picture.dtype == torch.float32 for picture in pictures)
    assert pictures[0].shape == pictures[1].shape
