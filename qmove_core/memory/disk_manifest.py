"""What a file of parked weights says of itself: the storages of a model, and the tensors over them.

It is JSON in the header of the file, without a line of code in it. Whoever reads one believes
nothing that he has not looked at: `parse` checks every value, and the bytes have checksums.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

KEY = "qmove"  # in the header of the file
VERSION = 1
_MOST_BYTES = 1 << 50
_MOST_DIMENSIONS = 64
_HOME = re.compile(r"cpu|[a-z_]{1,32}:\d{1,4}")
_CHECKSUM = re.compile(r"[0-9a-f]{32}")


class BadManifest(ValueError):
    """A manifest that nobody can have written in good faith, or that another version has."""


@dataclass(slots=True)
class SavedTensor:
    """One tensor object over a storage.

    Attributes:
        names: by which an inventory reaches it.
        kind: what it is ("parameter", "buffer", ...), as in a `Holding`.
        cls: the name of its class.
        dtype: "float16", ...
        offset, shape, stride: in elements.
        bits: "conj", "neg".
    """

    names: list[str]
    kind: str
    cls: str
    dtype: str
    offset: int
    shape: list[int]
    stride: list[int]
    bits: list[str]


@dataclass(slots=True)
class SavedStorage:
    """One storage.

    Attributes:
        nbytes: its size.
        checksum: of its bytes.
        home: the device that it is home on; "cpu" for what is not parked.
        tensor: the name of its tensor in the file.
        file: another file that has its bytes under that name, the model's own checkpoint; None for
            this one.
        tensors: that look into it.
    """

    nbytes: int
    checksum: int
    home: str
    tensor: str
    file: str | None
    tensors: list[SavedTensor]


@dataclass(slots=True)
class Manifest:
    """All that is known of a parked model.

    Attributes:
        storages: in the order of their use.
        wrappers: names, class, dtype and shape of wrapper subclasses, whose inner tensors are among
            the storages.
        quantized: by the name of a weight what its library keeps beside its bytes: plain values.
    """

    storages: list[SavedStorage]
    wrappers: list[dict[str, Any]] = field(default_factory=list)
    quantized: dict[str, Any] = field(default_factory=dict)

    def to_metadata(self) -> bytes:
        """The text for the header of a file. It is as long whatever the checksums are."""
        content = asdict(self)
        for storage in content["storages"]:
            storage["checksum"] = f"{storage['checksum']:032x}"
        text = json.dumps({"version": VERSION, **content}, separators=(",", ":"))
        return json.dumps({KEY: text}).encode()


def parse(metadata: dict[str, str]) -> Manifest:
    """The manifest in the header of a file.

    Raises:
        BadManifest: there is none, or it is not whole, or not of this version.
    """
    if KEY not in metadata:
        raise BadManifest("it was not written by qmove")
    try:
        content = json.loads(metadata[KEY])
    except (ValueError, RecursionError) as error:
        raise BadManifest(f"what it says of the model is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise BadManifest("what it says of the model is not an object")
    version = content.get("version")
    if version != VERSION:
        raise BadManifest(f"it has version {version!r}, and this qmove reads version {VERSION}")
    storages = [_storage(item) for item in _list(content, "storages")]
    used = [(storage.file, storage.tensor) for storage in storages]
    if len(set(used)) != len(used):
        raise BadManifest("two storages are said to lie in the same bytes")
    wrappers = [_wrapper(item) for item in _list(content, "wrappers")]
    quantized = content.get("quantized")
    if not isinstance(quantized, dict) or not all(isinstance(v, dict) for v in quantized.values()):
        raise BadManifest("'quantized' is not an object of objects")
    return Manifest(storages, wrappers, quantized)


def _storage(item: Any) -> SavedStorage:
    nbytes = _number(item, "nbytes", _MOST_BYTES)
    checksum, home = _text(item, "checksum"), _text(item, "home")
    if not _CHECKSUM.fullmatch(checksum):
        raise BadManifest(f"{checksum[:40]!r} is no checksum")
    if not _HOME.fullmatch(home):
        raise BadManifest(f"{home[:40]!r} is no device")
    file = item.get("file")
    if file is not None:
        file = _text(item, "file")
        if "\0" in file or ".." in Path(file).parts or not Path(file).is_absolute():
            raise BadManifest(f"{file[:200]!r} is no absolute path without '..'")
    tensors = [_tensor(tensor, nbytes) for tensor in _list(item, "tensors")]
    if not tensors:
        raise BadManifest("a storage without tensors")
    return SavedStorage(nbytes, int(checksum, 16), home, _text(item, "tensor"), file, tensors)


def _tensor(item: Any, nbytes: int) -> SavedTensor:
    dtype = dtype_of(_text(item, "dtype"))
    shape, stride = _numbers(item, "shape"), _numbers(item, "stride")
    offset = _number(item, "offset", _MOST_BYTES)
    if len(shape) != len(stride) or len(shape) > _MOST_DIMENSIONS:
        raise BadManifest(f"the shape {shape[:8]} does not fit the strides {stride[:8]}")
    if 0 not in shape:
        last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
        if (last + 1) * dtype.itemsize > nbytes:
            raise BadManifest(f"a tensor of shape {shape[:8]} ends behind its {nbytes} bytes")
    names, bits = _texts(item, "names"), _texts(item, "bits")
    if not names or not set(bits) <= {"conj", "neg"}:
        raise BadManifest("a tensor without a name, or with unknown bits")
    cls, kind = _text(item, "cls"), _text(item, "kind")
    return SavedTensor(names, kind, cls, str(item["dtype"]), offset, shape, stride, bits)


def _wrapper(item: Any) -> dict[str, Any]:
    return {
        "names": _texts(item, "names"),
        "cls": _text(item, "cls"),
        "dtype": _text(item, "dtype"),
        "shape": _numbers(item, "shape"),
    }


def dtype_of(name: str) -> torch.dtype:
    """The dtype with this name. Raises BadManifest."""
    dtype = getattr(torch, name, None) if name.isidentifier() else None
    if not isinstance(dtype, torch.dtype):
        raise BadManifest(f"this PyTorch has no dtype {name[:40]!r}")
    return dtype


def _get(item: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    value = item.get(key) if isinstance(item, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise BadManifest(f"{key!r} is missing, or is not what it should be")
    return value


def _text(item: Any, key: str) -> str:
    return str(_get(item, key, str))


def _list(item: Any, key: str) -> list[Any]:
    return list(_get(item, key, list))


def _number(item: Any, key: str, most: int) -> int:
    value = int(_get(item, key, int))
    if not 0 <= value <= most:
        raise BadManifest(f"{key!r} is {value}")
    return value


def _texts(item: Any, key: str) -> list[str]:
    return _all_of(_list(item, key), str, key)


def _numbers(item: Any, key: str) -> list[int]:
    numbers = _all_of(_list(item, key), int, key)
    if not all(0 <= number <= _MOST_BYTES for number in numbers):
        raise BadManifest(f"{key!r} has absurd numbers")
    return numbers


def _all_of(values: Sequence[Any], kind: type, key: str) -> list[Any]:
    if not all(isinstance(value, kind) and not isinstance(value, bool) for value in values):
        raise BadManifest(f"{key!r} is not a list of {kind.__name__}")
    return list(values)
