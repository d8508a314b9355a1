"""qmove's settings in ComfyUI: defaults, what the user's file says at start, and changes that were checked.

They are process-wide, as a running prompt carries no user. The host stores only values that were changed from their defaults, so
the defaults stand here as well as in the frontend.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import comfy
from .guard import never_fails

log = logging.getLogger("qmove")

AUTO_PARK = "qmove.autoPark"
AUTO_PARK_WHEN = "qmove.autoParkWhen"
NEEDED, STAGE = "needed", "stage"

DEFAULTS: dict[str, Any] = {AUTO_PARK: True, AUTO_PARK_WHEN: NEEDED}
_CHOICES: dict[str, tuple[Any, ...]] = {AUTO_PARK: (True, False), AUTO_PARK_WHEN: (NEEDED, STAGE)}

_values: dict[str, Any] = dict(DEFAULTS)


class InvalidSettings(ValueError):
    """What was sent is no setting of qmove; the message says which and why."""


def auto_park() -> bool:
    """Whether models that appear on wires are adopted, and parked when their VRAM is wanted."""
    return bool(_values[AUTO_PARK])


def parks_each_stage() -> bool:
    """Whether everything that a node does not use is parked before it, needed or not."""
    return bool(_values[AUTO_PARK_WHEN] == STAGE)


def current() -> dict[str, Any]:
    return dict(_values)


def change(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sets what `changes` has; all of it or nothing.

    Raises:
        InvalidSettings: an unknown name, a wrong type, or a value out of range.
    """
    for name, value in changes.items():
        check(name, value)
    _values.update(changes)
    return current()


def check(name: str, value: Any) -> None:
    """Raises InvalidSettings if qmove has no such setting, or not with this value."""
    if name not in DEFAULTS:
        raise InvalidSettings(f"{name!r} is no setting of qmove. It has: {', '.join(DEFAULTS)}.")
    if type(value) is not type(DEFAULTS[name]) or value not in _CHOICES[name]:
        allowed = " or ".join(json.dumps(choice) for choice in _CHOICES[name])
        raise InvalidSettings(f"{name} is {allowed}, not {json.dumps(value, default=str)}.")


@never_fails("read ComfyUI's stored settings", None)
def load_stored() -> None:
    """Takes over what ComfyUI has stored for its default user; a value that does not fit is told and left out."""
    folder = comfy.user_directory()
    file = Path(folder) / "default" / "comfy.settings.json" if folder else None
    if file is None or not file.is_file():
        return
    for name, value in json.loads(file.read_text(encoding="utf-8")).items():
        if name in DEFAULTS:
            try:
                change({name: value})
            except InvalidSettings as error:
                log.warning("left out a setting in %s: %s", file, error)


def reset() -> None:
    """Back to the defaults."""
    _values.update(DEFAULTS)
