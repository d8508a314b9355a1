"""The same checkpoint in two node packs: the report and the panel say so, without computing anything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from qmove_pack.nodes.host.models.adopted import adopt
from qmove_pack.nodes.host.panel import state
from qmove_pack.nodes.memory_picture import write_text
from torch import nn

import qmove_core as qmove
from qmove_core.memory import mirrors, shared
from tests.builders.device import GPU
from tests.builders.models import layers
from tests.nodes.builders.fake_host import FakeHost


class First(nn.Sequential):
    pass


class Second(nn.Sequential):
    pass


def loaded(cls: type[nn.Sequential]) -> nn.Sequential:
    return cls(*layers(3))


def same() -> dict[str, list[tuple[str, int]]]:
    """For each model by its name those that have the same weights, and how many bytes."""
    return {
        model["name"]: [(other["name"], other["nbytes"]) for other in model["same"]]
        for model in state.snapshot()["models"]
    }


@pytest.fixture
def two(host: FakeHost, gpu: GPU) -> tuple[nn.Sequential, nn.Sequential, int]:
    """Two models with the same weights, and the bytes of each."""
    qmove.configure(share_from=1)
    first, second = loaded(First), loaded(Second)
    for model in (first, second):
        adopt(model)
    return first, second, qmove.inventory(first).nbytes


def test_at_home_and_never_parked_nothing_is_known(two: Any) -> None:
    assert same() == {"First": [], "Second": []}
    assert "same weights" not in write_text(state.snapshot())


@pytest.mark.skipif(not shared.is_possible(), reason="needs memfd, which Linux has")
def test_parked_ones_say_which_and_how_much(two: Any) -> None:
    first, second, nbytes = two
    qmove.park(first)
    qmove.park(second)
    assert same() == {"First": [("Second", nbytes)], "Second": [("First", nbytes)]}
    text = write_text(state.snapshot())
    assert "First and Second have the same weights: 48.75 KiB of each." in text
    assert "Parked models share 48.75 KiB of RAM, as they have the same weights." in text
    parked = [line for line in text.splitlines() if "(parked from cuda:0)" in line]
    assert parked == ["  First (parked from cuda:0): 48.75 KiB"], "RAM is counted once"
    del first, second, two


@pytest.mark.parametrize("share_from", [1, None])
def test_mirrored_ones_too_and_no_digest_is_taken_for_it(
    two: Any, share_from: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmove.configure(share_from=share_from)
    first, second, nbytes = two
    for model in (first, second):
        qmove.park(model).restore()
    monkeypatch.setattr(mirrors, "digest_storages", None)  # that nobody calls
    assert same() == {"First": [("Second", nbytes)], "Second": [("First", nbytes)]}
    text = write_text(state.snapshot())
    assert "have the same weights" in text and "share" not in text


def test_what_is_little_of_both_is_not_told(two: Any) -> None:
    first, second, _nbytes = two
    with torch.no_grad():
        for layer in second:
            layer.weight.mul_(2)
    for model in (first, second):
        qmove.park(model).restore()
    assert same() == {"First": [], "Second": []}
