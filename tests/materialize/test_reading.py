"""Offload files are read once, in their own order, in several stretches at a time; and digests see
every change."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.actions import Action
from qmove_core.digests.checksum import checksum_of
from qmove_core.materialize import reading
from qmove_core.materialize.plan import TensorPlan, placement, plan
from qmove_core.memory import pages
from tests.builders.device import GPU
from tests.builders.dispatched_models import ON_DISK, dispatched, state, tower


def test_each_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate opens a safetensors file anew for each weight."""
    import safetensors

    model = dispatched(tmp_path, ON_DISK, "safetensors")
    opened: Counter[str] = Counter()
    safe_open = safetensors.safe_open

    def counting(file: str, *arguments: Any, **options: Any) -> Any:
        opened[Path(file).name] += 1
        return safe_open(file, *arguments, **options)

    monkeypatch.setattr(safetensors, "safe_open", counting)
    qmove.materialize_meta_tensors(model)
    assert opened == {"model-0.safetensors": 1, "model-1.safetensors": 1}


def planned(model: nn.Module, device: str = "cpu") -> list[TensorPlan]:
    """What is to be read for a model, with memory of its own for each tensor."""
    plans = plan(Action("materialize", model), qmove.inventory(model), placement(device))
    for item in plans:
        item.data = torch.empty(item.shape, dtype=item.dtype, device=device)
    return plans


def test_files_are_read_in_their_own_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = planned(dispatched(tmp_path, ON_DISK, "safetensors"))
    seen: dict[str, list[int]] = {}
    read_one = reading._read_one

    def watching(item: TensorPlan, *arguments: Any) -> None:
        seen.setdefault(item.source.where, []).append(item.opened.data_ptr())
        read_one(item, *arguments)

    monkeypatch.setattr(reading, "_read_one", watching)
    reading.read(reversed(plans), workers=1)
    assert len(seen) == 2 and sum(map(len, seen.values())) > 8
    for addresses in seen.values():  # of one map of the whole file
        assert addresses == sorted(addresses)


@pytest.mark.parametrize("source", ["dat", "safetensors"])
@pytest.mark.parametrize("target", ["cpu", "cuda:0"])
def test_many_threads_and_small_pieces_give_the_same_bytes(
    tmp_path: Path, gpu: GPU, source: str, target: str
) -> None:
    truth = state(tower())
    plans = planned(dispatched(tmp_path, ON_DISK, source), target)
    calls: list[tuple[int, int]] = []
    reading.read(
        plans, lambda done, in_all: calls.append((done, in_all)), chunk=100, stretch=300, workers=8
    )
    for item in plans:
        assert item.data is not None and torch.equal(item.data.cpu(), truth[item.name])
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] > 0


def test_an_error_while_reading_arrives_and_nothing_is_changed(
    tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = dispatched(tmp_path, ON_DISK)

    def broken(item: TensorPlan, *_arguments: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched, pytest.raises(OSError, match="Input/output error"):
        patched.setattr(reading, "_read_one", broken)
        qmove.materialize_meta_tensors(model)
    assert model.blocks[1].linear.weight.is_meta and hasattr(model.blocks[1].linear, "_hf_hook")
    qmove.materialize_meta_tensors(model)
    assert not model.blocks[1].linear.weight.is_meta


def test_without_madvise_it_is_only_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and macOS."""
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    truth = state(tower())
    model = dispatched(tmp_path, ON_DISK, "safetensors")
    qmove.materialize_meta_tensors(model)
    content = state(model)
    assert all(torch.equal(content[name], truth[name]) for name in truth)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 1000, (1 << 20) + 3])
def test_a_digest_sees_every_changed_byte(length: int) -> None:
    content = torch.randint(0, 256, (length,), dtype=torch.uint8)
    digest = checksum_of(content)
    for position in {0, length // 2, length - 1}:
        changed = content.clone()
        changed[position] ^= 1
        assert checksum_of(changed) != digest
    assert checksum_of(content.clone()) == digest


def test_a_digest_sees_exchanged_values_and_flipped_signs() -> None:
    """A plain sum or an exclusive or would not."""
    values = torch.randn(1 << 18)
    digest = checksum_of(values)
    assert checksum_of(values.flip(0)) != digest
    assert checksum_of(-values) != digest
    assert checksum_of(values.roll(1 << 17)) != digest  # whole pieces exchanged
    assert checksum_of(torch.zeros(8)) != checksum_of(torch.zeros(16))


def test_a_digest_is_of_the_values_shown_wherever_they_lie(gpu: GPU) -> None:
    values = torch.randn(33, 17, dtype=torch.float16)
    digest = checksum_of(values)
    assert checksum_of(values.to(gpu.device)) == digest
    assert checksum_of(values.t().contiguous().t()) == digest
    assert checksum_of(torch.cat([torch.zeros(3, 17, dtype=torch.float16), values])[3:]) == digest
