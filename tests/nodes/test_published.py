"""What the registry delivers: what runs, and nothing else; and what docs/security.md says of it."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.http_routes import served

pathspec = pytest.importorskip("pathspec")  # mypy brings it

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ENTRY = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", "__init__.py", submodule_search_locations=["."])
pack = sys.modules["pack"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pack)
print(sorted(pack.NODE_CLASS_MAPPINGS), pack.WEB_DIRECTORY)
import qmove_core.cli
sys.argv = ["qmove", "demo"]
qmove_core.cli.main()
"""


def published() -> list[str]:
    """What the archive has: what git does not ignore, less `.comfyignore`, both as git reads them."""
    lines = [
        line
        for name in (".gitignore", ".comfyignore")
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
    ]
    left_out = pathspec.PathSpec.from_lines("gitignore", [*lines, ".git", "node.zip"])
    found = []
    for folder, folders, files in os.walk(ROOT):
        here = Path(folder).relative_to(ROOT)
        folders[:] = [f for f in folders if not left_out.match_file(f"{(here / f).as_posix()}/")]
        paths = [(here / file).as_posix() for file in files]
        found += [path for path in paths if not left_out.match_file(path)]
    return sorted(found)


def test_users_get_what_runs_and_nothing_else() -> None:
    tops = {path.partition("/")[0] for path in published()}

    assert tops == {
        *("LICENSE", "README.md", "__init__.py", "pyproject.toml", "requirements.txt"),
        *("example_workflows", "locales", "nodes", "qmove_core", "stand_ins", "web"),
    }
    assert not [path for path in published() if "demo" in path or path.endswith((".pyc", ".zip"))]


def test_the_archive_runs_without_what_it_leaves_out(tmp_path: Path) -> None:
    for path in published():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tmp_path / path)

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", _with_packages(ENTRY)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8",
    )  # fmt: skip

    assert "'QMovePark'" in done.stdout and "./web" in done.stdout, done.stderr
    assert done.returncode == 1
    assert "The demo is not in this copy of qmove" in re.sub(r"\s+", " ", done.stderr)


def _with_packages(code: str) -> str:
    """Installed packages are there, but not this checkout, which is installed as editable."""
    folders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return f"import sys; sys.path += {folders!r}\n{code}"


@pytest.mark.parametrize("host", ["new"], indirect=True)
def test_the_page_names_every_route(host: FakeHost) -> None:
    with served(host) as server:
        routes = {
            *(f"GET {path}" for path in server.gets),
            *(f"POST {path}" for path in server.posts),
        }

    assert set(re.findall(r"^\| `((?:GET|POST) [^`]+)` \|", PAGE, re.MULTILINE)) == routes


def _imports() -> Iterator[tuple[str, str]]:
    for path in published():
        if path.endswith(".py"):
            for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    yield from ((alias.name.partition(".")[0], path) for alias in node.names)
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    yield node.module.partition(".")[0], path


def test_what_is_published_starts_no_process_and_opens_no_connection() -> None:
    banned = {"subprocess", "multiprocessing", "socket", "urllib", "requests", "httpx", "pip"}

    found = [(name, path) for name, path in _imports() if name in banned]

    # Only the address of a sender is split.
    assert found == [("urllib", "nodes/host/web_requests.py")]
    assert not [path for name, path in _imports() if name == "ctypes" and "qmove_core/" not in path]


def test_each_answer_of_the_page_is_of_a_file_that_is_published() -> None:
    from tools import publish_check

    assert publish_check.answers()
    for answer in publish_check.answers():
        hits = [publish_check.Hit(answer.scanner, answer.pattern, path) for path in published()]
        assert any(map(answer.fits, hits)), answer


def test_a_hit_that_the_page_does_not_answer_is_told() -> None:
    from tools.publish_check import Hit, unanswered

    known = Hit("nodesafe", "Suspicious import: `ctypes`", "qmove_core/memory/pages.py")
    new = Hit("nodesafe", "Call to `os.system()`", "nodes/park.py")
    elsewhere = known._replace(file="nodes/park.py")

    assert unanswered([known, new, elsewhere]) == [new, elsewhere]
