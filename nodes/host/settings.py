"""qmove's settings in ComfyUI: defaults, what the user's file says at start, and changes that were checked.

They are process-wide, as a running prompt carries no user. The host stores only values that were changed from their defaults, so
the defaults stand here as well as in the frontend.
"""

from __future__ import annotations

import json
import logging
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import qmove_core as qmove

from . import comfy
from .guard import never_fails

log = logging.getLogger("qmove")

AUTO_PARK = "qmove.autoPark"
AUTO_PARK_WHEN = "qmove.autoParkWhen"
KEEP_MIRRORS = "qmove.keepMirrors"
RAM_LIMIT = "qmove.ramLimit"
VRAM_TO_KEEP_FREE = "qmove.vramToKeepFree"
VERIFY = "qmove.verify"
NOTIFICATIONS = (
    "qmove.notifications"  # of the browser alone; it is kept here so that two tabs agree
)
NEEDED, STAGE = "needed", "stage"
GIB = 2**30

DEFAULTS: dict[str, Any] = {
    AUTO_PARK: True,
    AUTO_PARK_WHEN: NEEDED,
    KEEP_MIRRORS: True,
    RAM_LIMIT: 0,
    VRAM_TO_KEEP_FREE: 0,
    VERIFY: False,
    NOTIFICATIONS: True,
}
MOST_GIB: dict[str, int] = {RAM_LIMIT: 65536, VRAM_TO_KEEP_FREE: 1024}
_CHOICES: dict[str, tuple[Any, ...]] = {AUTO_PARK_WHEN: (NEEDED, STAGE)}

_values: dict[str, Any] = dict(DEFAULTS)
_lock = (
    threading.Lock()
)  # two tabs may change settings at once, and what one set must not be half applied


class InvalidSettings(ValueError):
    """What was sent is no setting of qmove; the message says which and why."""


def auto_park() -> bool:
    """Whether models that appear on wires are adopted, and parked when their VRAM is wanted."""
    return bool(_values[AUTO_PARK])


def parks_each_stage() -> bool:
    """Whether everything that a node does not use is parked before it, needed or not."""
    return bool(_values[AUTO_PARK_WHEN] == STAGE)


def vram_to_keep_free() -> int:
    """Bytes of each GPU that auto-parking leaves to others."""
    return int(_values[VRAM_TO_KEEP_FREE] * GIB)


def current() -> dict[str, Any]:
    return dict(_values)


def change(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sets what `changes` has, all of it or nothing; it holds from now on, also for models that are parked already.

    Raises:
        InvalidSettings: an unknown name, a wrong type, or a value out of range.
    """
    for name, value in changes.items():
        check(name, value)
    with _lock:
        _values.update(changes)
        _apply(changes)
        return current()


def check(name: str, value: Any) -> None:
    """Raises InvalidSettings if qmove has no such setting, or not with this value."""
    if name not in DEFAULTS:
        raise InvalidSettings(f"{name!r} is no setting of qmove. It has: {', '.join(DEFAULTS)}.")
    if name in MOST_GIB:
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not _is_within(value, MOST_GIB[name])
        ):
            raise InvalidSettings(
                f"{name} is a number of GiB from 0 to {MOST_GIB[name]}, not {_shown(value)}."
            )
        return
    choices = _CHOICES.get(name, (True, False))
    if type(value) is not type(DEFAULTS[name]) or value not in choices:
        allowed = " or ".join(json.dumps(choice) for choice in choices)
        raise InvalidSettings(f"{name} is {allowed}, not {_shown(value)}.")


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
    change(DEFAULTS)


def _apply(changes: Mapping[str, Any]) -> None:
    """Hands on what the core has to know. Mirrors that may not be kept any longer are given back at once."""
    options: dict[str, Any] = {}
    if RAM_LIMIT in changes:
        options["ram_limit"] = int(changes[RAM_LIMIT] * GIB) or None
    if KEEP_MIRRORS in changes:
        options["keep_mirrors"] = changes[KEEP_MIRRORS]
    if VERIFY in changes:
        options["verify"] = changes[VERIFY]
    if options:
        qmove.configure(**options)
    if options.get("keep_mirrors") is False or options.get("ram_limit") is not None:
        qmove.trim()


def _is_within(gib: float, most: int) -> bool:
    return math.isfinite(gib) and 0 <= gib <= most


def _shown(value: Any) -> str:
    return json.dumps(value, default=str)
