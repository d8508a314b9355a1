"""A hook for MkDocs: the site's pages are the repository's own.

Pages outside of `docs/` (README, CONTRIBUTING, the rooms' READMEs, the help of the nodes) are taken
in as they are, and links between all of them lead to the site's pages. A link to another file of
the repository keeps its text only: the site is built without knowing where the repository is.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
NODES = ("Park", "Restore", "FreeVRAM", "Pin", "Report", "Materialize")
# Of the repository -> of the site.
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "LICENSE": "license.md",
}
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
_EXTERNAL = re.compile(r"[a-z]+:|#")


def rooms() -> list[str]:
    """The READMEs beside the code, by their paths in the repository."""
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("qmove_core", "nodes", "stand_ins", "simcuda", "tests")
        for path in (ROOT / folder).rglob("README.md")
        if "node_modules" not in path.parts
    ]
    return sorted(found)


def pages() -> dict[str, str]:
    """Each page of the site by its path in the repository."""
    return {
        **PAGES,
        **{path: f"rooms/{PurePosixPath(path).parent.as_posix()}.md" for path in rooms()},
        **{
            path.relative_to(ROOT).as_posix(): path.relative_to(ROOT / "docs").as_posix()
            for path in (ROOT / "docs").rglob("*.md")
        },
    }


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that do not lie in `docs/`."""
    for source, page in pages().items():
        if not source.startswith("docs/"):
            text = (ROOT / source).read_text(encoding="utf-8")
            if page == "license.md":
                text = f"# License\n\n```\n{text}\n```\n"
            files.append(File.generated(config, page, content=text))
    files.append(File.generated(config, "nodes.md", content=help_of_nodes()))
    return files


def help_of_nodes() -> str:
    """The help pages of the nodes as one page."""
    parts = ["# The nodes\n\nThe same texts are in ComfyUI, behind a node's info button."]
    for name in NODES:
        page = ROOT / "web" / "docs" / f"QMove{name}.md"
        parts.append(re.sub(r"^(#+) ", r"#\1 ", page.read_text(encoding="utf-8"), flags=re.M))
    return "\n\n".join(parts)


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Has the links of a page lead to pages of the site."""
    known = pages()
    sources = {site: source for source, site in known.items()}
    here = page.file.src_uri
    source = sources.get(here, "web/docs/nodes.md")
    return LINK.sub(lambda link: _link(link, source, here, known), markdown)


def _link(link: re.Match[str], source: str, here: str, known: dict[str, str]) -> str:
    is_picture, text, target = link.groups()
    if _EXTERNAL.match(target):
        return link.group()
    path, _, anchor = target.partition("#")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    page = known.get(path) or known.get(f"{path}/README.md")
    if page is None and path.startswith("docs/") and (ROOT / path).is_file():
        page = path.removeprefix("docs/")
    if page is None:
        return text
    relative = posixpath.relpath(page, posixpath.dirname(here) or ".")
    return f"{is_picture}[{text}]({relative}{'#' + anchor if anchor else ''})"
