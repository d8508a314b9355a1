"""Models parked on disk, and files there that are not what they were."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qmove_core.memory import disk_files
from qmove_core.memory.disk_manifest import KEY


class Steps:
    """Counts what changes a disk: writes, syncs, renames. The one with number `fails_at` calls
    `fail` before it does anything."""

    def __init__(self, fails_at: int | None = None, fail: Callable[[], None] | None = None) -> None:
        self.count, self.fails_at, self.fail = 0, fails_at, fail

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            self.count += 1
            if self.count == self.fails_at and self.fail is not None:
                self.fail()
            return function(*arguments)

        return step


STEPS = ("write", "sync", "rename")


@contextmanager
def counted(steps: Steps) -> Iterator[Steps]:
    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(disk_files, name, steps.around(getattr(disk_files, name)))
        yield steps


def raises(error: OSError) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


def header_of(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header


def manifest_of(file: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads(header_of(file)["__metadata__"][KEY])
    return manifest


def write_manifest(file: Path, manifest: Any) -> None:
    """Writes another manifest into a file, whose other bytes stay."""
    content, header = file.read_bytes(), header_of(file)
    length = int.from_bytes(content[:8], "little")
    text = manifest if isinstance(manifest, str) else json.dumps(manifest)
    header["__metadata__"][KEY] = text
    new = json.dumps(header).encode()
    new += b" " * (-(8 + len(new)) % 4096)
    file.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []
