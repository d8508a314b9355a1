"""The script that fetches third-party code for the browser takes nothing that is not what it was."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools import vendor_web


def archive(folder: Path, license: str = "MIT") -> tuple[Path, str]:
    """A package as the registry gives it, and its digest."""
    content = {
        "package/package.json": json.dumps({"license": license, "homepage": "somewhere"}).encode(),
        "package/dist/code.js": b"export const answer = 42;",
    }
    path = folder / "package.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path, "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def package(integrity: str) -> vendor_web.Package:
    return vendor_web.Package(
        "code", "1.2.3", integrity, "MIT", {"package/dist/code.js": "code.js"}
    )


def test_the_named_files_are_taken_and_where_they_came_from_is_written_down(tmp_path: Path) -> None:
    path, integrity = archive(tmp_path)

    vendor_web.unpack(package(integrity), path, tmp_path / "vendor")

    assert (tmp_path / "vendor" / "code.js").read_bytes() == b"export const answer = 42;"
    origin = json.loads((tmp_path / "vendor" / "origin.json").read_text())
    assert (origin["name"], origin["version"], origin["license"]) == ("code", "1.2.3", "MIT")
    assert origin["sha256"] == {"code.js": hashlib.sha256(b"export const answer = 42;").hexdigest()}


def test_another_archive_than_the_one_that_was_looked_at_is_refused(tmp_path: Path) -> None:
    path, _integrity = archive(tmp_path)

    with pytest.raises(SystemExit, match="is not what it was"):
        vendor_web.unpack(package("sha512-other"), path, tmp_path / "vendor")

    assert not (tmp_path / "vendor").exists()


def test_another_license_is_refused(tmp_path: Path) -> None:
    path, integrity = archive(tmp_path, license="GPL-3.0-only")

    with pytest.raises(SystemExit, match="now under GPL"):
        vendor_web.unpack(package(integrity), path, tmp_path / "vendor")

    assert list((tmp_path / "vendor").iterdir()) == []
