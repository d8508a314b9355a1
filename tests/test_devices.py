"""Devices of this machine, also where PyTorch has no accelerator."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qmove_core as qmove
from qmove_core import devices
from qmove_core.cli.doctor import examine
from qmove_core.memory import pinning
from tests.builders.models import layers


def raises() -> torch.device | None:
    raise RuntimeError("Please register an accelerator")


def none() -> torch.device | None:
    return None


@pytest.fixture(params=[raises, none], ids=["torch 2.6", "torch 2.7"])
def no_accelerator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As PyTorch answers without an accelerator: 2.6 raises, later releases return None."""
    answer: Callable[[], torch.device | None] = request.param
    monkeypatch.setattr(torch.accelerator, "current_accelerator", answer)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)


def test_a_machine_without_an_accelerator_has_a_cpu(no_accelerator: None) -> None:
    assert devices.accelerator() is None
    assert devices.known() == ["cpu"]
    assert devices.resolve("cpu") == torch.device("cpu")
    with pytest.raises(qmove.UnknownDevice, match=r"cuda:0 on this machine\. It has: cpu"):
        devices.resolve("cuda")
    with pytest.raises(qmove.UnknownDevice, match="no accelerator, only the CPU"):
        devices.resolve(0)


def test_without_an_accelerator_a_park_does_nothing_and_the_doctor_says_so(
    no_accelerator: None,
) -> None:
    assert qmove.park(layers(1, device="cpu")).copied_bytes == 0
    assert examine().devices == []
    assert not pinning.is_possible()


def test_an_accelerator_without_devices_is_a_cpu_only_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 0)

    assert devices.known() == ["cpu"]
