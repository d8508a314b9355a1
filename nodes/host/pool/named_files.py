"""The files that a loader names, and whether one has changed on disk.

A loader names a file of ComfyUI's model folders, a folder in one of them, or a path. What it names
in another way (a repository on a hub) nobody sees here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any

from .. import comfy

MOST_FILES = 4096  # of one folder
_LONGEST = 1024  # characters of a name; what is longer is prose

Stamps = dict[str, tuple[int, int] | None]  # path -> size in bytes, time in ns; None: it is gone


def stamps_of(inputs: Iterable[Any]) -> Stamps:
    """What tells whether the files named by these values have changed, by their paths."""
    folders = comfy.folders_of_models()
    paths = [path for name in _texts(inputs) for path in _places(name, folders)]
    return {file: _stamp(file) for path in dict.fromkeys(paths) for file in _files_in(path)}


def first_changed(inputs: Iterable[Any], known: Stamps) -> str | None:
    """The path of a file that is another one than `known` says, came or went; None without one."""
    now = stamps_of(inputs)
    changed = (path for path in {**known, **now} if now.get(path) != known.get(path))
    return next(changed, None)


def _texts(values: Iterable[Any]) -> Iterator[str]:
    for value in values:
        if isinstance(value, str):
            if 0 < len(value) <= _LONGEST and "\n" not in value:
                yield value.strip()
        elif isinstance(value, dict):
            yield from _texts(value.values())
        elif isinstance(value, (list, tuple)):
            yield from _texts(value)


def _places(name: str, folders: Iterable[Path]) -> Iterator[Path]:
    """Where this name may be: as a path, or in a folder of models, where packs put what they fetch
    from "owner/model" under its last part."""
    parts = PurePath(name).parts
    if not parts or ".." in parts:
        return
    if len(parts) > 1 and os.path.exists(name):
        yield Path(name)
    if not os.path.isabs(name):
        for folder in folders:
            for part in dict.fromkeys([name, parts[-1]]):
                if os.path.exists(folder / part):
                    yield folder / part


def _files_in(path: Path) -> Iterator[str]:
    if not path.is_dir():
        yield str(path)
        return
    count = 0
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted(files):
            yield os.path.join(folder, name)
            count += 1
            if count == MOST_FILES:
                return


def _stamp(file: str) -> tuple[int, int] | None:
    try:
        found = os.stat(file)
    except OSError:  # it is gone meanwhile, or a link to nowhere
        return None
    return found.st_size, found.st_mtime_ns
