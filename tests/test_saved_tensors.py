"""The header of a safetensors file: what is read from it, and which files are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qmove_core.errors import QMoveError
from qmove_core.saved_tensors import NotSafetensors, read_header


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


def content(header: object, data: bytes = bytes(8)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_each_tensor_is_where_the_header_says(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(6.0).reshape(2, 3),
        "b.scale": torch.tensor(3, dtype=torch.int64),
        "none": torch.empty(0, 4, dtype=torch.bfloat16),
        "mask": torch.ones(5, dtype=torch.bool),
        "small": torch.ones(3, dtype=torch.float8_e4m3fn),
    }
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})

    header = read_header(file)

    assert header.keys() == tensors.keys()
    with safe_open(file, framework="pt") as theirs:
        for name, saved in header.items():
            tensor = tensors[name]
            assert (saved.dtype, saved.shape) == (tensor.dtype, tuple(tensor.shape))
            assert saved.saved_dtype == theirs.get_slice(name).get_dtype()
            in_file = file.read_bytes()[saved.start : saved.end]
            assert in_file == bytes(tensor.reshape(-1).view(torch.uint8).tolist())


BROKEN = {
    "empty": b"",
    "no whole length": bytes(7),
    "a length beyond the file": (1 << 40).to_bytes(8, "little") + b"{}",
    "no JSON": content({})[:8] + b"?{",
    "no object": content([1]),
    "a tensor that is no object": content({"a": 1}),
    "no dtype": content({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "no such dtype": content(entry(dtype="F7")),
    "a shape that is no list": content(entry(shape=2)),
    "a negative length": content(entry(shape=[-2])),
    "one offset": content(entry(offsets=[8])),
    "offsets in the wrong order": content(entry(offsets=[8, 0])),
    "bytes that do not fit the shape": content(entry(shape=[3])),
    "cut short": content(entry())[:-1],
    "bytes that belong to nothing": content(entry(), bytes(9)),
    "pickled": b"\x80\x04.",
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_malformed_file_is_named_and_refused(tmp_path: Path, damage: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(BROKEN[damage])
    with pytest.raises(NotSafetensors, match=r"model\.safetensors is no whole safetensors file: ."):
        read_header(file)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert issubclass(NotSafetensors, QMoveError)
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(NotSafetensors, match="no whole safetensors file"):
            read_header(path)
