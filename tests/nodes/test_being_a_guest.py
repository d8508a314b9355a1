"""A good guest: light to import, one `qmove_core` in the process, relative imports, no trace
outside of ComfyUI."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LOAD = f"""
import importlib.util, json, sys
def load(name):
    spec = importlib.util.spec_from_file_location(name, {str(ROOT / "__init__.py")!r}, submodule_search_locations=[{str(ROOT)!r}])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
"""


def in_a_new_process(code: str, tmp_path: Path, *, path: str = "") -> dict[str, object]:
    """Runs code where only the pack's folder is known, as in ComfyUI; it prints one JSON object."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", LOAD + code],
        cwd=tmp_path,
        env={"PATH": "", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_importing_it_imports_no_heavy_library(tmp_path: Path) -> None:
    heavy = in_a_new_process(
        """
import torch
before = set(sys.modules)
load("/comfyui/custom_nodes/qmove_x_1")
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
""",
        tmp_path,
    )

    unwanted = "accelerate bitsandbytes diffusers transformers torchao optimum aiohttp PIL matplotlib scipy typer comfy nodes"
    assert not set(heavy) & set(unwanted.split())
    assert "qmove_core" in heavy


def test_there_is_one_core_which_other_packs_import_by_its_plain_name(tmp_path: Path) -> None:
    seen = in_a_new_process(
        """
pack = load("/comfyui/custom_nodes/qmove_x_1")
import qmove_core
from torch import nn
node_core = sys.modules[pack.__name__ + ".nodes.host.models.adopted"].qmove
cores = [name for name in sys.modules if name.endswith("qmove_core")]
print(json.dumps({"same": node_core is qmove_core, "cores": cores, "file": qmove_core.__file__}))
""",
        tmp_path,
    )

    assert seen == {
        "same": True,
        "cores": ["qmove_core"],
        "file": str(ROOT / "qmove_core" / "__init__.py"),
    }


def test_a_core_that_is_there_already_is_the_one_that_is_used(tmp_path: Path) -> None:
    seen = in_a_new_process(
        """
import qmove_core as installed
pack = load("/comfyui/custom_nodes/qmove_x_1")
print(json.dumps({"same": sys.modules[pack.__name__ + ".nodes.host.models.adopted"].qmove is installed,
                  "cores": [name for name in sys.modules if name.endswith("qmove_core")]}))
""",
        tmp_path,
        path=str(ROOT),
    )

    assert seen == {"same": True, "cores": ["qmove_core"]}


def test_without_comfyui_nothing_is_hooked_in(tmp_path: Path) -> None:
    seen = in_a_new_process(
        """
load("/comfyui/custom_nodes/qmove_x_1")
from qmove_core import hosting
print(json.dumps({"hooks": len(hosting._moved) + len(hosting._ask_for_room)}))
""",
        tmp_path,
    )

    assert seen == {"hooks": 0}


@pytest.mark.parametrize("file", sorted((ROOT / "nodes").rglob("*.py")), ids=lambda file: file.stem)
def test_within_the_pack_imports_are_relative(file: Path) -> None:
    """`nodes` is also a module of ComfyUI, and `comfy` is reached through `sys.modules` alone."""
    for statement in ast.walk(ast.parse(file.read_text())):
        names = (
            [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
        )
        if isinstance(statement, ast.ImportFrom) and statement.level == 0:
            names = [statement.module or ""]
        assert not {name.partition(".")[0] for name in names} & {
            "nodes",
            "comfy",
            "execution",
            "server",
            "comfy_execution",
        }


@pytest.mark.parametrize("file", sorted((ROOT / "nodes").glob("*.py")), ids=lambda file: file.stem)
def test_only_the_host_folder_knows_comfyuis_modules(file: Path) -> None:
    assert "sys.modules" not in file.read_text() or file.name == "one_core.py"
