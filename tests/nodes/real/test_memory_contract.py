"""What qmove and its stand-ins take for granted of ComfyUI's memory is so in a real checkout."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from types import ModuleType
from typing import Any

import pytest


def management_of(modules: dict[str, ModuleType]) -> Any:
    return modules["comfy.model_management"]


def dynamic_class_of(modules: dict[str, ModuleType]) -> Any:
    cls = getattr(modules["comfy.model_patcher"], "ModelPatcherDynamic", None)
    if cls is None:
        pytest.skip("this ComfyUI has no dynamic models")
    return cls


def test_dynamic_models_answer_as_the_stand_in_does(real_modules: dict[str, ModuleType]) -> None:
    cls = dynamic_class_of(real_modules)
    assert cls.is_dynamic(None) is True
    assert inspect.signature(cls.loaded_size).parameters.keys() == {"self"}
    inspect.signature(cls.partially_unload).bind(None, "cpu", 1e9)
    inspect.signature(cls.detach).bind(None, True)


def test_room_is_asked_for_without_pins_unless_a_caller_wants_them(
    real_modules: dict[str, ModuleType],
) -> None:
    parameters = inspect.signature(management_of(real_modules).free_memory).parameters
    if "pins_required" not in parameters:
        pytest.skip("this ComfyUI has no pins to ask for")
    assert parameters["pins_required"].default == 0


def test_page_locked_bytes_are_counted_in_two_numbers(real_modules: dict[str, ModuleType]) -> None:
    management = management_of(real_modules)
    if not hasattr(management, "MAX_PINNED_MEMORY"):
        pytest.skip("this ComfyUI does not count them")
    assert isinstance(management.TOTAL_PINNED_MEMORY, int)
    assert isinstance(management.MAX_PINNED_MEMORY, (int, float))


def test_the_headroom_of_comfy_aimdo_can_be_read_and_set_or_is_not_there() -> None:
    if importlib.util.find_spec("comfy_aimdo") is None:
        pytest.skip("needs comfy-aimdo")
    control: Any = importlib.import_module("comfy_aimdo.control")
    assert control.lib is None  # set once it is initialized: before that qmove asks nothing
    assert hasattr(control, "set_simple_vram_headroom") == hasattr(
        control, "get_simple_vram_headroom"
    )
