"""What comes with the nodes fits them: help pages, translations, example workflows, the registry's entry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from qmove_pack.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
from qmove_pack.nodes.host import settings

tomllib = pytest.importorskip("tomllib")  # Python 3.11

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / "example_workflows").glob("*.json"))


def inputs_of(name: str) -> dict[str, Any]:
    types = NODE_CLASS_MAPPINGS[name].INPUT_TYPES()  # type: ignore[attr-defined]
    return {**types["required"], **types.get("optional", {})}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_each_node_has_a_help_page_that_names_its_inputs_and_outputs(name: str) -> None:
    page = (ROOT / "web" / "docs" / f"{name}.md").read_text()

    assert page.startswith(f"# {NODE_DISPLAY_NAME_MAPPINGS[name]}\n")
    for slot in (*inputs_of(name), *NODE_CLASS_MAPPINGS[name].RETURN_NAMES):  # type: ignore[attr-defined]
        assert f"| {slot} |" in page


@pytest.mark.parametrize("language", [folder.name for folder in sorted((ROOT / "locales").iterdir())])
def test_translations_are_of_things_that_exist(language: str) -> None:
    folder = ROOT / "locales" / language
    nodes = json.loads((folder / "nodeDefs.json").read_text())

    assert nodes.keys() == NODE_CLASS_MAPPINGS.keys()
    for name, translated in nodes.items():
        assert translated["inputs"].keys() == inputs_of(name).keys()
        assert len(translated["outputs"]) == len(NODE_CLASS_MAPPINGS[name].RETURN_NAMES)  # type: ignore[attr-defined]
    assert {name.replace(".", "_") for name in settings.DEFAULTS} <= json.loads(
        (folder / "settings.json").read_text()
    ).keys()


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_an_example_workflow_is_whole(file: Path) -> None:
    workflow = json.loads(file.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}

    assert any(node["type"] in NODE_CLASS_MAPPINGS for node in nodes.values())
    for link, source, output, target, index, _type in workflow["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][index]["link"] == link
    for node in nodes.values():
        if node["type"] in NODE_CLASS_MAPPINGS:
            assert {slot["name"] for slot in node["inputs"]} <= inputs_of(node["type"]).keys()
            names = NODE_CLASS_MAPPINGS[node["type"]].RETURN_NAMES  # type: ignore[attr-defined]
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
    lines = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("#")]

    assert set(lines) == set(project["dependencies"]) - {d for d in project["dependencies"] if d.startswith("typer")}
