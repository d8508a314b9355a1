"""Has the registry's own check and two scanners look at what would be published, and holds each hit
against docs/security.md, which answers it: `make publish-check`.

The tools get an environment of their own. Nothing is published, and nothing but their packages is
fetched.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "security.md"
TOOLS = ("comfy-cli", "comfy-test", "nodesafe")
MARK = "<!-- publish-check -->"
_ROW = re.compile(r"^\| (comfy-test|nodesafe): `(.+?)` \| (.+?) \| (.+) \|$", re.M)


class Hit(NamedTuple):
    scanner: str
    title: str
    file: str


class Answer(NamedTuple):
    scanner: str
    pattern: str
    files: list[str]

    def fits(self, hit: Hit) -> bool:
        return (
            self.scanner == hit.scanner
            and self.pattern in hit.title
            and any(fnmatch.fnmatch(hit.file, pattern) for pattern in self.files)
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path, help="made if it is missing")
    venv = parser.parse_args().venv.resolve()
    bin_folder = venv / ("Scripts" if sys.platform == "win32" else "bin")
    if not (bin_folder / "nodesafe").exists():
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        pip: list[str | Path] = [bin_folder / "python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", *TOOLS], check=True)
    with tempfile.TemporaryDirectory() as folder:
        pack = Path(folder) / "qmove"
        _unpack_archive(bin_folder, pack)
        validated = subprocess.run(
            [bin_folder / "comfy", "--skip-prompt", "node", "validate"], cwd=pack
        )
        hits = [*_lint(bin_folder, pack), *_scan(bin_folder, pack)]
    open_hits = unanswered(hits)
    for hit in open_hits:
        print(f"not answered in docs/security.md: {hit.scanner}: {hit.title} in {hit.file}")
    for answer in answers():
        if not any(answer.fits(hit) for hit in hits):
            print(f"docs/security.md answers what is no hit: {answer.scanner}: {answer.pattern}")
            open_hits.append(Hit(*answer[:2], "docs/security.md"))
    if validated.returncode or open_hits:
        return 1
    _note_result(bin_folder, hits)
    print(f"{len(hits)} hits, all answered in docs/security.md")
    return 0


def answers() -> list[Answer]:
    """The rows of the page's last table."""
    rows = _ROW.findall(PAGE.read_text(encoding="utf-8"))
    return [
        Answer(scanner, pattern, re.findall(r"`(.+?)`", files))
        for scanner, pattern, files, _ in rows
    ]


def unanswered(hits: list[Hit]) -> list[Hit]:
    """The hits that no row of the page answers."""
    known = answers()
    return [hit for hit in hits if not any(answer.fits(hit) for answer in known)]


def _unpack_archive(bin_folder: Path, pack: Path) -> None:
    """What the registry would get: comfy-cli's own archive, of what git tracks."""
    archive = ROOT / "node.zip"
    try:
        packing: list[str | Path] = [bin_folder / "comfy", "--skip-prompt", "node", "pack"]
        subprocess.run(packing, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(pack)
    finally:
        archive.unlink(missing_ok=True)


def _lint(bin_folder: Path, pack: Path) -> Iterator[Hit]:
    command: list[str | Path] = [bin_folder / "comfy-test", "lint", "--strict", "--json", pack]
    results = json.loads(_output(command))["results"]
    for finding in results["javascript"].get("findings", []):
        yield Hit("comfy-test", finding["rule"], f"web/{finding['file']}")
    file = ""
    for line in results["syntax"].get("details", "").splitlines():
        if line.endswith(".py:"):
            file = line[:-1].strip()
        elif line.startswith("  Line "):
            yield Hit("comfy-test", line.partition(": ")[2], file)


def _scan(bin_folder: Path, pack: Path) -> Iterator[Hit]:
    report = json.loads(_output([bin_folder / "nodesafe", "scan", "--format", "json", str(pack)]))
    for finding in report["findings"]:
        yield Hit("nodesafe", finding["title"], finding.get("file") or "")


def _output(command: list[str | Path]) -> str:
    """What a scanner prints; it fails where it has hits."""
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8").stdout


def _note_result(bin_folder: Path, hits: list[Hit]) -> None:
    python = bin_folder / "python"
    listed = subprocess.run(
        [python, "-m", "pip", "list", "--format", "json"], capture_output=True, check=True
    )
    versions = {package["name"]: package["version"] for package in json.loads(listed.stdout)}
    used = ", ".join(f"{tool} {versions[tool]}" for tool in TOOLS)
    text = PAGE.read_text(encoding="utf-8").partition(MARK)[0]
    line = f"Last run: {used}; {len(hits)} hits, all answered."
    PAGE.write_text(f"{text}{MARK}\n{line}\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
