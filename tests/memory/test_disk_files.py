"""Files of the disk tier that were made to do harm, and what is taken for a leftover."""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qmove_core as qmove
from qmove_core.memory import disk_files
from qmove_core.memory.disk_files import WEIGHTS, DiskWriter, remove_leftovers
from tests.builders.device import GPU
from tests.builders.disk import files_in, manifest_of, write_manifest
from tests.builders.models import layers
from tests.builders.quantized_layers import quantized
from tests.builders.snapshots import snapshot

pytestmark = pytest.mark.simulated

Change = Callable[[dict[str, Any]], object]


def first(manifest: dict[str, Any]) -> dict[str, Any]:
    storage: dict[str, Any] = manifest["storages"][0]
    return storage


def tensor(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = first(manifest)["tensors"][0]
    return found


HOSTILE: dict[str, Change] = {
    "no version": lambda m: m.pop("version"),
    "a version in words": lambda m: m.update(version="one"),
    "no storages": lambda m: m.pop("storages"),
    "storages that are none": lambda m: m.update(storages=[1, None, []]),
    "a storage without tensors": lambda m: first(m).update(tensors=[]),
    "a negative length": lambda m: first(m).update(nbytes=-1),
    "an absurd length": lambda m: first(m).update(nbytes=2**63),
    "a length in words": lambda m: first(m).update(nbytes="many"),
    "a length that is true": lambda m: first(m).update(nbytes=True),
    "more bytes than the file has": lambda m: first(m).update(nbytes=2**40),
    "a tensor behind its storage": lambda m: tensor(m).update(offset=1),
    "a tensor that is too large": lambda m: tensor(m).update(shape=[2**20, 2**20]),
    "a shape whose product overflows": lambda m: tensor(m).update(shape=[2**40] * 2),
    "a stride out of the storage": lambda m: tensor(m).update(stride=[2**40, 1]),
    "a negative stride": lambda m: tensor(m).update(stride=[-64, 1]),
    "too many dimensions": lambda m: tensor(m).update(shape=[1] * 99, stride=[1] * 99),
    "a shape in floats": lambda m: tensor(m).update(shape=[64.0, 64.0]),
    "an unknown dtype": lambda m: tensor(m).update(dtype="float3"),
    "a dtype that is a function": lambda m: tensor(m).update(dtype="load"),
    "a dtype with a path": lambda m: tensor(m).update(dtype="os.system"),
    "no names": lambda m: tensor(m).update(names=[]),
    "names that are none": lambda m: tensor(m).update(names=[None]),
    "unknown bits": lambda m: tensor(m).update(bits=["evil"]),
    "no checksum": lambda m: first(m).update(checksum="0"),
    "a device that is none": lambda m: first(m).update(home="../../cuda"),
    "two storages in the same bytes": lambda m: m["storages"][1].update(tensor=first(m)["tensor"]),
    "bytes that are not there": lambda m: first(m).update(tensor="nothing"),
    "a file above": lambda m: first(m).update(file="../../../etc/passwd"),
    "a file with '..'": lambda m: first(m).update(file="/models/../etc/passwd"),
    "a file with a zero byte": lambda m: first(m).update(file="/etc/passwd\0.safetensors"),
    "a file that is no safetensors": lambda m: first(m).update(file="/etc/passwd"),
    "a device node": lambda m: first(m).update(file="/dev/zero"),
    "a folder for a file": lambda m: first(m).update(file="/etc"),
    "a file that is not there": lambda m: first(m).update(file="/nowhere/x.safetensors"),
    "itself": lambda m: m["storages"][1].update(file=m["_itself"], tensor=first(m)["tensor"]),
    "quantized that is a list": lambda m: m.update(quantized=[]),
    "quantized values that are none": lambda m: m.update(quantized={"0.weight": 4}),
    "a quantized weight that is plain": lambda m: m.update(quantized={"0.weight": {"bits": 4}}),
    "wrappers that are none": lambda m: m.update(wrappers=[7]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_and_the_model_stays(
    gpu: GPU, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "kept"
    qmove.park(layers(2), to="disk", folder=folder)
    manifest = copy.deepcopy(manifest_of(folder / WEIGHTS))
    manifest["_itself"] = str(folder / WEIGHTS)
    HOSTILE[name](manifest)
    write_manifest(folder / WEIGHTS, manifest)
    model = layers(2)
    before = snapshot(model)
    with pytest.raises(qmove.CannotAttach):
        qmove.attach(model, folder)
    assert snapshot(model) == before


TEXTS = {
    "no JSON": "{",
    "a list": "[]",
    "nested beyond the stack": "[" * 200_000,
    "a number of a million digits": '{"version": ' + "9" * 1_000_000 + "}",
    "nothing": "",
}


@pytest.mark.parametrize("name", TEXTS)
def test_text_that_is_no_manifest(gpu: GPU, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "kept"
    qmove.park(layers(2), to="disk", folder=folder)
    write_manifest(folder / WEIGHTS, TEXTS[name])
    with pytest.raises(qmove.CannotAttach):
        qmove.attach(layers(2), folder)


QUANTIZED: dict[str, Change] = {
    "no states": lambda v: v.update(states=[]),
    "states without end": lambda v: v.update(states=v["states"] * 99),
    "states that are none": lambda v: v.update(states=[None]),
    "an absurd block size": lambda v: v["states"][-1].update(blocksize=-1),
    "a block size of 2**80": lambda v: v["states"][0].update(blocksize=2**80),
    "a table that is no base64": lambda v: v["states"][0].update(code="!!!"),
    "a table without end": lambda v: v["states"][0].update(code="A" * 10_000_000),
    "a table of one byte": lambda v: v["states"][0].update(code="AA=="),
    "an unknown type": lambda v: v["states"][0].update(quant_type="nf2"),
    "an unknown dtype": lambda v: v["states"][0].update(dtype="float3"),
    "another shape": lambda v: v["states"][0].update(shape=[2**30, 2**30]),
    "a shape that is none": lambda v: v["states"][0].update(shape="all"),
    "unknown bits": lambda v: v.update(bits=3),
}


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_hostile_quantization_state_is_refused(gpu: GPU, tmp_path: Path, name: str) -> None:
    import bitsandbytes as bnb

    folder = tmp_path / "kept"
    qmove.park(quantized("nf4 double"), to="disk", folder=folder)
    manifest = manifest_of(folder / WEIGHTS)
    QUANTIZED[name](manifest["quantized"]["0.weight"])
    write_manifest(folder / WEIGHTS, manifest)
    layer = bnb.nn.LinearNF4(128, 64, compute_dtype=torch.float16).to(torch.float16)
    model = torch.nn.Sequential(layer)
    before, weight = snapshot(model), layer.weight
    with pytest.raises(qmove.CannotAttach):
        qmove.attach(model, folder)
    assert snapshot(model) == before and layer.weight is weight and layer.quant_state is None


def test_names_with_odd_characters(gpu: GPU, tmp_path: Path) -> None:
    names = [
        "ä ö/../..",
        'quo"te\\',
        "line\nbreak",
        "\ud800 alone",
        "qmove",
        "__metadata__",
        "日本",
    ]
    model = {name: torch.full((8,), float(i), device="cuda") for i, name in enumerate(names)}
    qmove.park(model, to="disk", folder=tmp_path / "kept")
    again = {name: torch.zeros(8, device="cuda") for name in names}
    qmove.attach(again, tmp_path / "kept", "cuda:0")
    assert [float(again[name][0]) for name in names] == [float(i) for i in range(len(names))]


def test_there_is_no_code_in_the_file(gpu: GPU, tmp_path: Path) -> None:
    from safetensors import safe_open

    qmove.park(quantized("nf4 double"), to="disk", folder=tmp_path / "kept")
    with safe_open(str(tmp_path / "kept" / WEIGHTS), framework="pt") as file:
        assert all(file.get_tensor(name).dtype == torch.uint8 for name in file.keys())  # noqa: SIM118
        json.loads(file.metadata()["qmove"])


# Leftovers ----------------------------------------------------------------------------------------


def test_only_our_own_unlocked_files_are_removed(tmp_path: Path) -> None:
    left = ["qmove-0123456789abcdef.partial", "qmove-fedcba9876543210.parked"]
    others = [
        *("qmove-0123456789abcdef.partial.txt", "qmove-xyz.partial", "my.partial", WEIGHTS),
        *("qmove-0123456789ABCDEF.partial", "other-0123456789abcdef.parked"),
    ]
    for name in (*left, *others):
        (tmp_path / name).write_text("x")
    (tmp_path / "qmove-aaaaaaaaaaaaaaaa.parked").mkdir()
    (tmp_path / "precious").write_text("x")
    (tmp_path / "qmove-bbbbbbbbbbbbbbbb.parked").symlink_to(tmp_path / "precious")
    os.mkfifo(tmp_path / "qmove-cccccccccccccccc.parked")
    assert sorted(path.name for path in remove_leftovers(tmp_path)) == sorted(left)
    assert (tmp_path / "precious").exists() and set(others) < set(files_in(tmp_path))


def test_what_is_being_written_is_no_leftover(tmp_path: Path) -> None:
    with DiskWriter(tmp_path, [100], 100, WEIGHTS) as writer:
        assert remove_leftovers(tmp_path) == [] and writer.path.exists()
        writer.write(writer.starts[0], memoryview(b"x" * 100))
        file = writer.finish(b"{}")
    assert files_in(tmp_path) == [WEIGHTS] and file.nbytes % 64 == 0


def test_a_file_that_was_taken_for_a_leftover_before_it_was_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, taken = disk_files.lock, list[Path]()

    def too_late(file: Any) -> None:
        if not taken:
            taken.extend(remove_leftovers(tmp_path))
        lock(file)

    monkeypatch.setattr(disk_files, "lock", too_late)
    with DiskWriter(tmp_path, [8], 100, None) as writer:
        assert len(taken) == 1 and writer.path not in taken and writer.path.exists()


def test_storages_lie_apart_and_aligned(tmp_path: Path) -> None:
    sizes = [0, 1, 64, 0, 65, 4096]
    with DiskWriter(tmp_path, sizes, 1000, None) as writer:
        ends = [start + size for start, size in zip(writer.starts, sizes, strict=True)]
        assert writer.starts[0] % 4096 == 0 and all(start % 64 == 0 for start in writer.starts)
        assert len(set(writer.starts)) == len(sizes)
        assert all(e <= s for e, s in zip(ends, writer.starts[1:], strict=False))
        assert re.fullmatch(r"qmove-[0-9a-f]{16}\.parked", writer.path.name)
