"""`qmove doctor`: what it finds on this machine, and what it makes of figures."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import pytest
import torch

from qmove_core import devices
from qmove_core.cli import doctor
from qmove_core.memory import limits, pinning
from tests.builders.device import GPU, SIMULATED

GIB = 1 << 30


@pytest.fixture
def host() -> doctor.Host:
    """A machine without limits."""
    return doctor.Host(
        system="Linux-6.1",
        python="3.11.7",
        ram_total=128 * GIB,
        ram_available=100 * GIB,
        usable=100 * GIB,
        usable_limit="available RAM",
        cgroup_free=None,
        memlock=None,
        wsl=False,
        simulated=False,
    )


CARD = doctor.Device("cuda:0", "A card", total=24 * GIB, free=20 * GIB)
ALL_INSTALLED = dict.fromkeys(doctor.OPTIONAL, "1.0")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes an installed package look as if it were not."""
    real = importlib.metadata.version

    def hide(missing: str) -> None:
        def version(name: str) -> str:
            if name == missing:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return hide


def test_devices_are_named_with_their_memory(gpu: GPU) -> None:
    block = torch.ones(1 << 20, device=gpu.device)
    found = {device.name: device for device in doctor.examine().devices}
    first = found[str(gpu.device)]
    free, total = torch.cuda.mem_get_info(gpu.device)
    assert (first.total, first.free) == (total, free)
    assert first.model == torch.cuda.get_device_name(gpu.device)
    assert len(found) == torch.cuda.device_count()
    del block


def test_versions_are_those_installed() -> None:
    versions = doctor.examine().versions
    assert versions["torch"] == importlib.metadata.version("torch")
    assert versions["bitsandbytes"] == importlib.metadata.version("bitsandbytes")


def test_ram_and_its_limits_are_those_the_budget_decides_by(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "cgroup_free", lambda: 5 << 20)
    host = doctor.examine().host
    assert host.ram_total == psutil.virtual_memory().total
    assert (host.usable, host.usable_limit, host.cgroup_free) == (5 << 20, "cgroup limit", 5 << 20)
    assert host.memlock == pinning.memlock_limit()


def test_a_missing_package_is_named_with_what_is_lost(without: Callable[[str], None]) -> None:
    without("bitsandbytes")
    report = doctor.examine()
    assert report.versions["bitsandbytes"] is None
    assert any(
        line.startswith("bitsandbytes is not installed: no int8 or nf4") for line in report.findings
    )
    assert not any(line.startswith("accelerate") for line in report.findings)


def test_a_machine_without_accelerator_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "known", lambda: ["cpu"])
    report = doctor.examine()
    assert report.devices == []
    assert report.findings[0].startswith("No accelerator")


@pytest.mark.parametrize(
    ("build", "advice"), [("CPU build", "install the build for it"), ("CUDA 12.8", "nvidia-smi")]
)
def test_no_accelerator_advises_by_the_build_of_torch(
    host: doctor.Host, build: str, advice: str
) -> None:
    assert advice in doctor._findings(host, build, [], ALL_INSTALLED)[0]


def test_a_healthy_machine_gets_no_warning_beyond_the_word_on_pinning(host: doctor.Host) -> None:
    (only,) = doctor._findings(host, "CUDA 12.8", [CARD], ALL_INSTALLED)
    assert "115.20 GiB" in only and "90% of RAM" in only and "pageable" in only


def test_less_usable_ram_than_vram_is_said_with_both_figures(host: doctor.Host) -> None:
    said = doctor._findings(replace(host, usable=16 * GIB), "CUDA 12.8", [CARD], ALL_INSTALLED)[0]
    assert "16.00 GiB" in said and "24.00 GiB" in said and "refused before anything moves" in said


def test_a_cgroup_that_binds_is_named(host: doctor.Host) -> None:
    bound = replace(host, usable=30 * GIB, usable_limit="cgroup limit", cgroup_free=30 * GIB)
    said = doctor._findings(bound, "CUDA 12.8", [CARD], ALL_INSTALLED)[0]
    assert "cgroup" in said and "30.00 GiB of 100.00 GiB" in said


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memlock": 8 << 20}, ("8.00 MiB", "do not count it")),
        ({"wsl": True}, ("768.00 MiB", "WSL")),
        ({"system": "Windows-11"}, ("51.20 GiB", "40% of RAM")),
    ],
    ids=["memlock", "WSL", "Windows"],
)
def test_the_limit_on_pinning_is_the_arenas(
    host: doctor.Host, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    said = doctor._findings(replace(host, **changes), "CUDA 12.8", [CARD], ALL_INSTALLED)[-1]
    assert all(word in said for word in words)


@pytest.mark.skipif(not SIMULATED, reason="this machine has a real GPU")
def test_simulated_devices_are_called_simulated() -> None:
    report = doctor.examine()
    assert report.host.simulated
    assert report.torch_build == "CPU build with simulated CUDA devices"
    assert report.findings[0].startswith("The devices are simulated")


def test_plain_data_survives_json() -> None:
    data = doctor.examine().to_dict()
    assert json.loads(json.dumps(data)) == data
