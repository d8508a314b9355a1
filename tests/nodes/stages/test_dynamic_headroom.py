"""VRAM to keep free holds for ComfyUI's dynamic models too, where comfy-aimdo can be told so (0.6)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from qmove_pack.nodes.host import settings
from qmove_pack.nodes.host.models import dynamic

from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import node
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.guarded import Guarded

MIB = 1 << 20
OWN = 512 * MIB  # the headroom that the library has by itself


class Control(ModuleType):
    """`comfy_aimdo.control` of 0.6, as far as it is used."""

    def __init__(self) -> None:
        super().__init__("comfy_aimdo.control")
        self.lib: object = object()
        self.headroom, self.calls = OWN, 0

    def set_simple_vram_headroom(self, headroom: int) -> None:
        assert type(headroom) is int and 0 <= headroom <= 1 << 60
        self.headroom = headroom
        self.calls += 1

    def get_simple_vram_headroom(self) -> int:
        return self.headroom


@pytest.fixture
def control(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Iterator[Control]:
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL)
    control = Control()
    monkeypatch.setitem(sys.modules, "comfy_aimdo.control", control)
    dynamic.forget()
    yield control
    dynamic.forget()


def run(host: FakeHost, seed: int) -> None:
    host.run({"load": node("Load", mib=1, shape="plain"), "use": node("Text", text=str(seed))})
    assert host.errors == []


def test_it_is_set_before_the_next_node_and_taken_back_with_the_setting(
    host: FakeHost, control: Control
) -> None:
    settings.change({settings.VRAM_TO_KEEP_FREE: 2})
    run(host, 1)
    assert control.headroom == 2 << 30
    settings.change({settings.VRAM_TO_KEEP_FREE: 3})
    run(host, 2)
    assert control.headroom == 3 << 30
    settings.change({settings.VRAM_TO_KEEP_FREE: 0})
    run(host, 3)
    assert control.headroom == OWN


def test_it_is_never_less_than_without_qmove(host: FakeHost, control: Control) -> None:
    settings.change({settings.VRAM_TO_KEEP_FREE: 0.25})
    run(host, 1)
    assert (control.headroom, control.calls) == (OWN, 0)


def test_what_somebody_else_has_set_since_is_what_comes_back(
    host: FakeHost, control: Control
) -> None:
    settings.change({settings.VRAM_TO_KEEP_FREE: 2})
    run(host, 1)
    control.headroom = 1 << 30
    run(host, 2)
    assert control.headroom == 2 << 30
    settings.change({settings.VRAM_TO_KEEP_FREE: 0})
    run(host, 3)
    assert control.headroom == 1 << 30


def test_with_auto_parking_off_it_is_the_librarys(host: FakeHost, control: Control) -> None:
    settings.change({settings.VRAM_TO_KEEP_FREE: 2})
    run(host, 1)
    settings.change({settings.AUTO_PARK: False})
    run(host, 2)
    assert control.headroom == OWN


def test_without_the_setting_nothing_is_asked_or_set(host: FakeHost, control: Control) -> None:
    run(host, 1)
    assert (control.headroom, control.calls) == (OWN, 0)


@pytest.mark.parametrize("lacks", ["module", "setter", "library"])
def test_where_it_is_not_there_nothing_happens(
    host: FakeHost, control: Control, lacks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lacks == "module":
        monkeypatch.delitem(sys.modules, "comfy_aimdo.control")
    elif lacks == "setter":  # 0.4
        old: Any = ModuleType("comfy_aimdo.control")
        old.lib = object()
        monkeypatch.setitem(sys.modules, "comfy_aimdo.control", old)
    else:
        control.lib = None  # not for this card, or off
    settings.change({settings.VRAM_TO_KEEP_FREE: 2})
    run(host, 1)
    assert (control.headroom, control.calls) == (OWN, 0)


def test_a_failure_is_logged_and_the_prompt_goes_on(
    host: FakeHost, control: Control, guarded: Guarded, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded.expect("have ComfyUI's dynamic models leave VRAM to others")
    monkeypatch.setattr(control, "get_simple_vram_headroom", lambda: 1 // 0)
    settings.change({settings.VRAM_TO_KEEP_FREE: 2})
    run(host, 1)
