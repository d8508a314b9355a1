"""`qmove.attach`: a model that was built anew gets the weights that an earlier one was parked with."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.memory.disk_files import WEIGHTS
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.disk import write_manifest
from tests.builders.file_mirrors import mirrored
from tests.builders.formats import MODELS, x_of
from tests.builders.mirrors import WIDTH
from tests.builders.models import layers, torchao_layers
from tests.builders.quantized_layers import LAYERS, inputs, quantized
from tests.builders.snapshots import contents, snapshot

pytestmark = [pytest.mark.simulated, pytest.mark.usefixtures("no_files_mapped")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kept"


def emptied(model: nn.Module) -> nn.Module:
    """The same structure with other bytes everywhere, but in the tables of bitsandbytes."""
    for holding in qmove.inventory(model).holdings:
        if holding.name.endswith(".code"):
            continue
        content = torch.empty(0, dtype=torch.uint8, device=holding.device)
        content.set_(holding.storage, 0, (holding.nbytes,), (1,)).fill_(1)
    return model


def built(name: str, how: str) -> nn.Sequential:
    """A layer of bitsandbytes as a config gives it, or quantized with other weights."""
    if how == "quantized":
        return emptied(quantized(name))  # type: ignore[return-value]
    with torch.device("meta" if how == "on meta" else "cpu"):
        layer = LAYERS[name]().to(torch.float16)
    return nn.Sequential(layer).eval().requires_grad_(False)


@pytest.mark.parametrize("name", MODELS)
def test_every_format_computes_the_same_again(
    gpu: GPU, second_gpu: GPU, folder: Path, name: str
) -> None:
    model = MODELS[name]()
    x = x_of(model)
    wanted, before = model(x), contents(model)
    qmove.park(model, to="disk", folder=folder)
    again: Any = emptied(MODELS[name]())
    attached = qmove.attach(again, folder)
    assert attached.copied_bytes == 0 and qmove.is_parked(again) and attached.verified
    assert qmove.stats().arena_bytes <= 2048, "the tables of bitsandbytes, at most"
    assert torch.equal(again(x), wanted)
    streaming.wait_for()
    assert contents(again) == before
    assert qmove.park(again).copied_bytes == 0, "it lies in the file again"


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", ["on meta", "on the cpu", "quantized"])
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("device", [None, "cuda:0", "cuda:1"])
def test_bitsandbytes_is_not_quantized_again(
    gpu: GPU, second_gpu: GPU, folder: Path, name: str, how: str, ran: bool, device: str | None
) -> None:
    model = quantized(name)
    x = inputs(model, "cuda:0")
    if ran:
        model(x)  # bitsandbytes puts the scales of int8 elsewhere at the first forward
    qmove.park(model, to="disk", folder=folder)
    wanted = model(x).cpu()
    again = built(name, how)
    qmove.attach(again, folder, device)
    x = x.to(device or "cuda:0")
    assert torch.equal(again(x).cpu(), wanted)
    qmove.park(again)
    assert torch.equal(again(x).cpu(), wanted)


@pytest.mark.parametrize("kind", ["int8", "int4", "float8", "nf4"])
def test_torchao_computes_the_same_again(gpu: GPU, folder: Path, kind: str) -> None:
    model = torchao_layers(kind)
    x = torch.linspace(-1, 1, 256, device="cuda").reshape(2, 128).bfloat16()
    wanted = model(x)
    qmove.park(model, to="disk", folder=folder)
    again = emptied(torchao_layers(kind))
    qmove.attach(again, folder)
    assert torch.equal(again(x), wanted)


@pytest.mark.parametrize("device", ["meta", "cpu", "cuda:0"])
def test_a_plain_model_may_be_built_anywhere(gpu: GPU, folder: Path, device: str) -> None:
    model = layers(3)
    before = contents(model)
    qmove.park(model, to="disk", folder=folder)
    with torch.device(device):
        again = nn.Sequential(*[nn.Linear(64, 64) for _ in range(3)]).requires_grad_(False)
    held = [id(parameter) for parameter in again.parameters()]
    qmove.attach(again, folder)
    assert gpu.allocated() == 0 and again[0].weight.device == torch.device("cuda:0")
    qmove.restore(again)
    assert contents(again) == before
    assert [id(parameter) for parameter in again.parameters()] == held


class Views(nn.Module):
    """Tied weights, a view of a weight, one that lies transposed, and a buffer at home on the host."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        whole = torch.randn(3 * 64 * 64, device="cuda")
        self.first = nn.Parameter(whole[:4096].view(64, 64), requires_grad=False)
        self.second = nn.Parameter(whole[4096:8192].view(64, 64).t(), requires_grad=False)
        self.tied = self.first
        self.register_buffer("overlap", whole[2048:6144].view(64, 64))
        self.register_buffer("on_host", torch.randn(5))


def test_tied_weights_views_and_what_is_home_on_the_host(gpu: GPU, folder: Path) -> None:
    model = Views(1)
    before = contents(model)
    qmove.park(model, to="disk", folder=folder)
    again = Views(2)
    qmove.attach(again, folder, "cuda:0")
    assert contents(again) == before
    assert again.first.untyped_storage()._cdata == again.overlap.untyped_storage()._cdata
    assert again.tied is again.first and again.on_host.device.type == "cpu"
    with torch.no_grad():
        again.first[63, 63] = 7
    assert float(again.overlap.flatten()[2047]) == 7


def test_weights_of_the_models_own_checkpoint_come_from_there(
    gpu: GPU, tmp_path: Path, folder: Path
) -> None:
    model, path = mirrored(tmp_path)
    before = contents(model)
    qmove.park(model, to="disk", folder=folder)
    assert (folder / WEIGHTS).stat().st_size < 3 * 4096
    again = emptied(layers(4, width=WIDTH))
    qmove.attach(again, folder)
    qmove.restore(again)
    assert contents(again) == before

    del model
    qmove.park(layers(1))
    for harm in (lambda: path.write_bytes(path.read_bytes()[:-4]), path.unlink):
        other = layers(4, width=WIDTH)
        unchanged = snapshot(other)
        harm()
        with pytest.raises(qmove.CannotAttach, match=r"model\.safetensors"):
            qmove.attach(other, folder)
        assert snapshot(other) == unchanged


def test_to_the_cpu_and_to_another_gpu(gpu: GPU, second_gpu: GPU, folder: Path) -> None:
    model = layers(2)
    before = contents(model)
    qmove.park(model, to="disk", folder=folder)
    for device in ("cpu", "cuda:1"):
        again = emptied(layers(2))
        qmove.attach(again, folder, device)
        assert again[0].weight.device == torch.device(device) and not qmove.is_parked(again)
        assert contents(again) == before


def test_a_model_that_does_not_fit_stays_attached(gpu: GPU, folder: Path) -> None:
    import simcuda

    model = layers(4, width=WIDTH)
    before = contents(model)
    qmove.park(model, to="disk", folder=folder)
    again = emptied(layers(4, width=WIDTH)).cpu()
    simcuda.set_memory(gpu.before + 1024, device=0)
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.attach(again, folder, "cuda:0")
    simcuda.set_memory("4GiB", device=0)
    assert qmove.is_parked(again)
    qmove.restore(again)
    assert contents(again) == before


def test_parked_again_it_replaces_what_is_there_only_if_it_changed(gpu: GPU, folder: Path) -> None:
    model = layers(3)
    qmove.park(model, to="disk", folder=folder)
    again = emptied(layers(3))
    qmove.attach(again, folder, "cuda:0")
    first = (folder / WEIGHTS).stat().st_ino
    assert qmove.park(again, to="disk", folder=folder).copied_bytes == 0
    assert (folder / WEIGHTS).stat().st_ino == first
    qmove.restore(again)
    again[0].weight.data.add_(1)
    before = contents(again)
    qmove.park(again, to="disk", folder=folder)
    assert (folder / WEIGHTS).stat().st_ino != first
    third = emptied(layers(3))
    qmove.attach(third, folder, "cuda:0")
    assert contents(third) == before
    qmove.restore(model)  # it lies in the file that was there before


# What does not fit --------------------------------------------------------------------------------


def other_dtype() -> nn.Module:
    return layers(2, dtype=torch.float16)


def a_buffer_in_place_of_a_weight() -> nn.Module:
    model = layers(2)
    weight = model[1].weight.data
    del model[1].weight
    model[1].register_buffer("weight", weight)
    return model


def one_more_weight() -> nn.Module:
    model = layers(2)
    model[0].scale = nn.Parameter(torch.ones(2, device="cuda"))
    return model


def tied_here() -> nn.Module:
    model = layers(2)
    model[1].weight = model[0].weight
    return model


OTHERS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "fewer layers": (lambda: layers(1), r"1\.weight: the model has no such tensor"),
    "more layers": (lambda: layers(3), r"2\.weight: the folder has nothing for it"),
    "another shape": (lambda: layers(2, width=32), r"0\.weight: the folder has float32 \[64, 64\]"),
    "another dtype": (other_dtype, r"0\.weight: the folder has float32 .*float16"),
    "another kind": (a_buffer_in_place_of_a_weight, r"1\.weight: it is a Parameter in the folder"),
    "one more weight": (one_more_weight, r"0\.scale: the folder has nothing for it"),
    "tied": (tied_here, r"1\.weight: it is two tensors in the folder and one in the model"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_structure_is_left_alone(gpu: GPU, folder: Path, name: str) -> None:
    qmove.park(layers(2), to="disk", folder=folder)
    build, said = OTHERS[name]
    model = build()
    before = snapshot(model)
    with pytest.raises(qmove.CannotAttach, match=said) as caught:
        qmove.attach(model, folder)
    assert snapshot(model) == before and caught.value.path == folder / WEIGHTS
    assert caught.value.problems


QUANTIZED_OTHERWISE = {
    "nf4 double": ("nf4 flat", "fp4 double", "int8"),
    "nf4 flat": ("nf4 double",),
    "int8": ("nf4 double",),
    "fp4 double": ("nf4 double",),
}


@pytest.mark.parametrize(
    ("saved", "here", "how"),
    [
        (saved, here, how)
        for saved, others in QUANTIZED_OTHERWISE.items()
        for here in others
        for how in ("on the cpu", "quantized")
        # Of the same type and not quantized yet, it becomes what is in the folder.
        if how == "quantized" or here[:3] != saved[:3]
    ],
)
def test_what_is_quantized_otherwise_is_left_alone(
    gpu: GPU, folder: Path, saved: str, here: str, how: str
) -> None:
    qmove.park(quantized(saved), to="disk", folder=folder)
    model = built(here, how)
    before, modules = snapshot(model), [id(p) for p in model.parameters()]
    with pytest.raises(qmove.CannotAttach, match=r"0\.weight"):
        qmove.attach(model, folder)
    assert snapshot(model) == before and [id(p) for p in model.parameters()] == modules


def test_plain_layers_get_no_quantized_weights(gpu: GPU, folder: Path) -> None:
    qmove.park(quantized("int8"), to="disk", folder=folder)
    model = nn.Sequential(nn.Linear(128, 64, dtype=torch.float16, device="cuda"))
    with pytest.raises(qmove.CannotAttach, match="it is quantized to 8 bits in the folder"):
        qmove.attach(model, folder)


def test_a_parked_model_and_a_pinned_one_are_left_alone(gpu: GPU, folder: Path) -> None:
    model = layers(2)
    qmove.park(model, to="disk", folder=folder)
    with pytest.raises(qmove.CannotAttach, match="the model is parked"):
        qmove.attach(model, folder)
    pinned = layers(2)
    qmove.pin(pinned)
    with pytest.raises(qmove.Pinned):
        qmove.attach(pinned, folder)
    qmove.unpin(pinned)


# Folders that are not what they were --------------------------------------------------------------


def harmed(folder: Path, harm: str) -> None:
    file = folder / WEIGHTS
    content = file.read_bytes()
    if harm == "no folder":
        shutil.rmtree(folder)
    elif harm == "no file":
        file.unlink()
    elif harm == "cut short":
        os.truncate(file, len(content) - 1)
    elif harm == "only begun":
        file.write_bytes(b"\0" * len(content))
    elif harm == "empty":
        file.write_bytes(b"")
    elif harm == "a folder in its place":
        file.unlink()
        file.mkdir()
    elif harm == "another file":
        from safetensors.torch import save_file

        save_file({"0.weight": torch.zeros(64, 64)}, file)
    else:
        at = {"first byte altered": 4096, "last bit altered": len(content) - 1 - 64}[harm]
        at = min(at, len(content) - 1)
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


@pytest.mark.parametrize(
    "harm",
    [
        *("no folder", "no file", "cut short", "only begun", "empty", "a folder in its place"),
        *("another file", "first byte altered", "last bit altered"),
    ],
)
def test_a_folder_that_was_harmed_is_named_and_the_model_stays(
    gpu: GPU, folder: Path, harm: str
) -> None:
    qmove.park(layers(2), to="disk", folder=folder)
    gc.collect()
    harmed(folder, harm)
    model = layers(2)
    before = snapshot(model)
    with pytest.raises(qmove.CannotAttach, match="kept"):
        qmove.attach(model, folder)
    assert snapshot(model) == before


def test_altered_bytes_are_found_on_their_way_home_too(gpu: GPU, folder: Path) -> None:
    qmove.park(layers(2), to="disk", folder=folder)
    gc.collect()
    harmed(folder, "first byte altered")
    model = layers(2)
    with pytest.raises(qmove.MappedFileChanged, match=r"weights\.safetensors"):
        qmove.attach(model, folder, "cuda:0")
    assert qmove.is_parked(model)
    assert gpu.allocated() == 0


def test_a_manifest_of_another_version(gpu: GPU, folder: Path) -> None:
    from tests.builders.disk import manifest_of

    qmove.park(layers(2), to="disk", folder=folder)
    write_manifest(folder / WEIGHTS, manifest_of(folder / WEIGHTS) | {"version": 99})
    with pytest.raises(qmove.CannotAttach, match="version 99"):
        qmove.attach(layers(2), folder)
