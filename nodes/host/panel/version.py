"""The version of qmove and where it comes from, for the badge on ComfyUI's about page."""

from __future__ import annotations

import functools
from importlib import metadata
from pathlib import Path
from typing import Any

PROJECT_FILE = Path(__file__).resolve().parents[3] / "pyproject.toml"


@functools.cache
def about() -> dict[str, Any]:
    """`version`, and `url` of the repository; None where neither pack nor package says it."""
    project: dict[str, Any] = {}
    try:
        import tomllib  # Python 3.11

        project = tomllib.loads(PROJECT_FILE.read_text(encoding="utf-8")).get("project", {})
    except (ModuleNotFoundError, FileNotFoundError):
        pass
    urls = project.get("urls", {})
    url = urls.get("Repository") or urls.get("Homepage")
    try:
        return {"version": project.get("version") or metadata.version("qmove"), "url": url}
    except metadata.PackageNotFoundError:
        return {"version": None, "url": url}
