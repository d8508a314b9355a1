"""What comes with the nodes fits them: help pages, translations, example workflows, the frontend,
the registry's entry."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import qmove_pack
from qmove_pack.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from qmove_pack.nodes.host import settings

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))
LANGUAGES = ("en", "ja", "zh")
OWN_SCRIPTS = sorted((ROOT / "web" / "js").rglob("*.js"))


def inputs_of(name: str) -> dict[str, Any]:
    types = qmove_pack.NODE_CLASS_MAPPINGS[name].INPUT_TYPES()
    return {**types["required"], **types.get("optional", {})}


PARTS_OF_HELP = {
    "en": ("When", "Example", "Costs"),
    "ja": ("使うとき", "例", "コスト"),
    "zh": ("何时使用", "示例", "代价"),
}
COLON = {"en": ":", "ja": "\uff1a", "zh": "\uff1a"}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_each_node_has_a_help_page_that_names_its_inputs_and_outputs(
    name: str, language: str
) -> None:
    """In English it is the page for all languages that have none of their own."""
    of_language = f"{name}.md" if language == "en" else f"{name}/{language}.md"
    page = (ROOT / "web" / "docs" / of_language).read_text(encoding="utf-8")

    title = translations(language, "nodeDefs")[name]["display_name"]
    assert page.startswith(f"# {title}\n")
    if language == "en":
        assert title == NODE_DISPLAY_NAME_MAPPINGS[name]
    for part in PARTS_OF_HELP[language]:
        assert f"**{part}{COLON[language]}**" in page
    for slot in (*inputs_of(name), *NODE_CLASS_MAPPINGS[name].RETURN_NAMES):  # type: ignore[attr-defined]
        assert f"| {slot} |" in page


def translations(language: str, name: str) -> dict[str, Any]:
    return json.loads((ROOT / "locales" / language / f"{name}.json").read_text(encoding="utf-8"))


def texts_in(tree: Any, path: str = "") -> dict[str, str]:
    """Every text of a translation, by where it stands."""
    if isinstance(tree, str):
        return {path: tree}
    return {
        at: text
        for key, part in tree.items()
        for at, text in texts_in(part, f"{path}/{key}").items()
    }


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_are_of_things_that_exist(language: str) -> None:
    nodes = translations(language, "nodeDefs")

    assert nodes.keys() == NODE_CLASS_MAPPINGS.keys()
    for name, translated in nodes.items():
        assert translated["inputs"].keys() == inputs_of(name).keys()
        assert len(translated["outputs"]) == len(NODE_CLASS_MAPPINGS[name].RETURN_NAMES)  # type: ignore[attr-defined]
    assert translations(language, "settings").keys() == {
        name.replace(".", "_") for name in (*settings.DEFAULTS, "qmove.chip")
    }


@pytest.mark.parametrize("language", ["ja", "zh"])
@pytest.mark.parametrize("name", ["commands", "main", "nodeDefs", "settings"])
def test_each_text_is_translated_and_is_no_copy(language: str, name: str) -> None:
    english, translated = texts_in(translations("en", name)), texts_in(translations(language, name))

    assert translated.keys() == english.keys()
    copies = {where for where, text in translated.items() if text == english[where]}
    assert copies <= {"/settingsCategories/qmove", "/QMoveFreeVRAM/inputs/gib/name"}


def test_the_english_texts_of_the_settings_are_those_that_the_frontend_shows_without_a_translation() -> (
    None
):
    script = re.sub(r'"\s*\+\s*"', "", (ROOT / "web" / "js" / "settings.js").read_text())

    for where, text in texts_in(translations("en", "settings")).items():
        assert f'"{text}"' in script, where


def test_the_languages_are_those_of_the_panel() -> None:
    assert sorted(folder.name for folder in (ROOT / "locales").iterdir()) == sorted(LANGUAGES)
    assert sorted(file.stem for file in (ROOT / "web" / "js" / "texts").iterdir()) == sorted(
        LANGUAGES
    )


@pytest.mark.parametrize("file", OWN_SCRIPTS, ids=lambda file: file.stem)
def test_a_script_puts_no_text_into_the_page_as_html_and_loads_nothing_from_elsewhere(
    file: Path,
) -> None:
    script = file.read_text(encoding="utf-8")

    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|setHTML|\beval\(", script
    )
    assert not re.search(r"""["'`]https?:""", script)
    imported = re.findall(r"""(?:from|import)\s*\(?["']([^"']+)["']""", script)
    for path in imported:
        if path.startswith("../../../scripts/"):
            assert path in ("../../../scripts/app.js", "../../../scripts/api.js")
        elif not path.startswith("@comfyorg/"):  # in a comment, for the types
            target = (file.parent / path).resolve()
            assert target.is_file() or target.with_suffix(".d.ts").is_file(), path


def test_the_vendored_code_is_as_it_came_with_its_license_and_version() -> None:
    folders = [folder for folder in (ROOT / "web" / "vendor").iterdir() if folder.is_dir()]

    assert folders
    for folder in folders:
        origin = json.loads((folder / "origin.json").read_text())
        assert origin["license"] == "MIT"
        assert re.fullmatch(r"\d+\.\d+\.\d+", origin["version"])
        digests = {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()
        }
        digests.pop("origin.json")
        assert digests == origin["sha256"]
        assert "LICENSE" in digests


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_an_example_workflow_is_whole(file: Path) -> None:
    workflow = json.loads(file.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}

    assert any(node["type"] in NODE_CLASS_MAPPINGS for node in nodes.values())
    for link, source, output, target, index, _type in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][index]["link"] == link
    for node in nodes.values():
        if node["type"] in qmove_pack.NODE_CLASS_MAPPINGS:
            cls = qmove_pack.NODE_CLASS_MAPPINGS[node["type"]]
            assert {slot["name"] for slot in node["inputs"]} <= inputs_of(node["type"]).keys()
            names = getattr(cls, "RETURN_NAMES", cls.RETURN_TYPES)
            assert [slot["name"] for slot in node["outputs"]] == list(names)


def test_the_registrys_entry_is_complete() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    comfy = project["tool"]["comfy"]

    assert comfy["requires-comfyui"] == ">=0.3.64"
    assert comfy["PublisherId"]
    assert comfy["DisplayName"]
    assert "comfyui" not in project["project"]["name"].lower()
    assert WORKFLOWS


def test_what_the_pack_needs_at_run_time_is_in_its_requirements() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if not line.startswith("#")
    ]

    assert set(lines) == set(project["dependencies"]) - {
        d for d in project["dependencies"] if d.startswith("typer")
    }
