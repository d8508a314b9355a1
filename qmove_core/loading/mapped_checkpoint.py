"""Checkpoints that transformers reads out of qmove's own maps of the files.

What it takes over as it is then lies in the file itself, and the model is mirrored by it without
being compared; what it casts, merges or quantizes it reads once, through the page cache.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from .. import homes
from ..memory.mapped_files import MappedFile
from ..saved_tensors import HeaderEntry, NotSafetensors, read_header
from ..storages import tensor_over

log = logging.getLogger("qmove")


class MappedReader:
    """As the `safetensors.safe_open` that it was made of; whole tensors come from the map."""

    def __init__(self, reader: Any, file: MappedFile, entries: dict[str, HeaderEntry]) -> None:
        self._reader, self._file, self._entries = reader, file, entries
        self._given: set[str] = set()  # two storages must not lie in one place

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def __enter__(self) -> MappedReader:
        self._reader.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reader.__exit__(*error)

    def get_slice(self, name: str) -> _MappedSlice:
        return _MappedSlice(self, name)

    def mapped(self, name: str) -> torch.Tensor | None:
        """The tensor over the file; None where no tensor can look at its bytes there."""
        entry = self._entries.get(name)
        if entry is None or entry.dtype is None or name in self._given:
            return None
        if entry.start == entry.end or entry.start % entry.dtype.itemsize:
            return None
        self._given.add(name)
        storage = self._file.storage(entry.start, entry.end - entry.start, homes.forget)
        return tensor_over(storage, entry.dtype, entry.shape)


class _MappedSlice:
    """As the slice of safetensors, of which a tensor is asked by an index."""

    def __init__(self, reader: MappedReader, name: str) -> None:
        self._reader, self._name = reader, name

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader._reader.get_slice(self._name), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        mapped = self._reader.mapped(self._name) if index is Ellipsis else None
        return self._reader._reader.get_slice(self._name)[index] if mapped is None else mapped


def mapped(reader: Any, path: str | os.PathLike[str]) -> Any:
    """A reader of safetensors that gives out what lies in qmove's map of the file; the same reader
    where a map is not possible, or would count as memory of the process (Windows)."""
    if os.name == "nt":
        return reader
    try:
        return MappedReader(reader, MappedFile(Path(path)), read_header(Path(path)))
    except (OSError, ValueError, NotSafetensors) as error:
        log.info("%s is read as transformers does: %s", path, str(error))
        return reader
