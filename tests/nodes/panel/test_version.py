"""The version that the about page shows is the one of the pack's own project file."""

from __future__ import annotations

from pathlib import Path

import pytest
from qmove_pack.nodes.host.panel import version


def test_it_is_the_one_of_the_packs_project_file() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]

    assert version.PROJECT_FILE.is_file()
    assert version.about() == {
        "version": project["version"],
        "url": project.get("urls", {}).get("Repository"),
    }
