"""Safetensors files and offload folders that lie: refused with a reason, never a crash, a hang or
another file's bytes."""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import qmove_core as qmove
from qmove_core.integrations import weights_map
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.builders.snapshots import contents

DEEP = 100_000


def _file(header: Any, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def _tensor(start: int, end: int, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FILES: dict[str, bytes] = {
    "nothing": b"",
    "half a length": b"\0\0\0",
    "no header": (0).to_bytes(8, "little"),
    "a header longer than the file": _file({"w": _tensor(0, 16)}, length=1 << 20),
    "a header longer than any file": _file({"w": _tensor(0, 16)}, length=(1 << 64) - 1),
    "a length below 0": _file({"w": _tensor(0, 16)}, length=1 << 63),
    "overlapping tensors": _file({"w": _tensor(0, 16), "v": _tensor(8, 24)}, b"\0" * 24),
    "the same bytes twice": _file({"w": _tensor(0, 16), "v": _tensor(0, 16)}),
    "a gap": _file({"w": _tensor(0, 16), "v": _tensor(32, 48)}, b"\0" * 48),
    "more data than tensors": _file({"w": _tensor(0, 16)}, b"\0" * 64),
    "less data than tensors": _file({"w": _tensor(0, 16)}, b"\0" * 8),
    "offsets into the header": _file({"w": _tensor(-40, -24)}),
    "offsets backwards": _file({"w": _tensor(16, 0)}),
    "offsets beyond 64 bits": _file({"w": _tensor(0, 1 << 70)}),
    "a shape that is not the bytes": _file({"w": _tensor(0, 16, (5,))}),
    "a shape whose product overflows": _file({"w": _tensor(0, 16, (1 << 32, 1 << 32, 1 << 32))}),
    "a negative shape": _file({"w": _tensor(0, 16, (-4,))}),
    "a dtype that nobody has": _file({"w": _tensor(0, 16, dtype="F17")}),
    "a dtype that is a list": _file({"w": _tensor(0, 16, dtype=[])}),
    "no offsets": _file({"w": {"dtype": "F32", "shape": [4]}}),
    "no object": _file([1]),
    "deep lists": _file(b"[" * DEEP),
    "deep objects": _file(b'{"w":' * DEEP + b"1" + b"}" * DEEP),
    "a huge integer": _file(b'{"w":{"dtype":"F32","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,16]}}'),
    "no text": _file(b"\xff" * 40),
    "a pickle": b"\x80\x04\x95\x10\0\0\0\0\0\0\0\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "zeros": b"\0" * 4096,
}  # fmt: skip


def _directory(path: Path) -> None:
    path.mkdir()


def _symlink_to_itself(path: Path) -> None:
    path.symlink_to(path)


def _named_pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("the system has no named pipes")
    os.mkfifo(path)


def _device(path: Path) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("the system has no /dev/zero")
    path.symlink_to("/dev/zero")  # has no end


SPECIAL: dict[str, Callable[[Path], None]] = {
    "a directory": _directory,
    "a circle of links": _symlink_to_itself,
    "a pipe that nobody writes to": _named_pipe,
    "a device without an end": _device,
    "nothing at all": lambda path: None,
}
CASES: dict[str, Callable[[Path], object]] = {
    **{name: (lambda path, data=data: path.write_bytes(data)) for name, data in FILES.items()},
    **SPECIAL,
}


@pytest.mark.parametrize("name", CASES)
def test_an_offload_index_that_names_it_is_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    CASES[name](file)
    entry = {"safetensors_file": str(file), "weight_name": "w"}
    loader = types.SimpleNamespace(state_dict={}, index={"w": entry}, save_folder=str(tmp_path))

    with pytest.raises(weights_map.Unusable):
        weights_map.Sources().find(loader, "w")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", CASES)
def test_it_mirrors_no_model(gpu: GPU, tmp_path: Path, name: str) -> None:
    file = tmp_path / "model.safetensors"
    CASES[name](file)
    model = layers(1)
    before = contents(model)

    with pytest.raises(qmove.QMoveError, match=r"model\.safetensors"):
        qmove.mirror_files(model, file)

    qmove.park(model)
    qmove.restore(model)
    assert contents(model) == before


@pytest.mark.parametrize(
    "name", ["../w", "../../etc/passwd", "/etc/passwd", "sub/w", "sub/../../w", "", "..", "a\0b"]
)
def test_no_name_leads_out_of_the_offload_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "offload"
    (folder / "sub").mkdir(parents=True)
    for file in (tmp_path / "w.dat", folder / "sub" / "w.dat"):
        file.write_bytes(b"\0" * 16)
    loader = types.SimpleNamespace(
        state_dict={}, index={name: {"dtype": "float32", "shape": [4]}}, save_folder=str(folder)
    )

    with pytest.raises(weights_map.Unusable):
        weights_map.Sources().find(loader, name)  # type: ignore[arg-type]


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.arange(4.0)}, file)
    entry = {"safetensors_file": str(file), "weight_name": "w"}
    loader = types.SimpleNamespace(state_dict={}, index={"w": entry}, save_folder=str(tmp_path))
    found = weights_map.Sources().find(loader, "w")  # type: ignore[arg-type]
    assert torch.equal(found.open(), torch.arange(4.0))
