"""The header of a safetensors file: what each tensor in it is, and where its bytes lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from .errors import QMoveError


class NotSafetensors(QMoveError, ValueError):
    """A file that is missing, cut short, or no safetensors file."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """One tensor of a file.

    Attributes:
        saved_dtype: as the file names it ("F8_E4M3"), which torch may not have.
        start, end: where its bytes begin and end in the file.
    """

    saved_dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None if this torch does not have it."""
        return _DTYPES.get(self.saved_dtype)


def open_safetensors(file: Path) -> tuple[Any, dict[str, HeaderEntry]]:
    """The library's own reader of a file, mapped into memory, and the file's tensors by name.

    Raises:
        NotSafetensors: the file is missing, its header is malformed, or it is shorter than its
            header says.
    """
    try:
        # Checks the header, and that the file is whole. It keeps the offsets to itself, so the
        # header is read again: 8 bytes of length, then JSON
        # (https://huggingface.co/docs/safetensors, Format).
        reader = safetensors.safe_open(str(file), framework="pt", device="cpu")
        with file.open("rb") as content:
            length = int.from_bytes(content.read(8), "little")
            header = json.loads(content.read(length))
        return reader, {
            name: HeaderEntry(
                entry["dtype"],
                tuple(entry["shape"]),
                *(8 + length + offset for offset in entry["data_offsets"]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (safetensors.SafetensorError, OSError, ValueError, LookupError, TypeError,
            AttributeError, RecursionError) as error:  # fmt: skip
        raise NotSafetensors(f"{file} is no whole safetensors file: {error}.") from error


def read_metadata(file: Path) -> tuple[dict[str, HeaderEntry], dict[str, str]]:
    """The tensors of a safetensors file by name, and the text that it has about itself. Raises as
    `open_safetensors`."""
    reader, entries = open_safetensors(file)
    return entries, dict(reader.metadata() or {})


def read_header(file: Path) -> dict[str, HeaderEntry]:
    """The tensors of a safetensors file by name. Raises as `open_safetensors`."""
    return open_safetensors(file)[1]


_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "BOOL": "bool",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip
_DTYPES: dict[str, torch.dtype] = {
    saved: getattr(torch, name) for saved, name in _NAMES.items() if hasattr(torch, name)
}
