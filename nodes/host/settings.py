"""qmove's settings in ComfyUI: defaults, what the user's file says at start, and checked changes.

They are process-wide, as a running prompt carries no user. ComfyUI stores only values that differ
from the defaults, so the defaults are known here as well as in the frontend.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import qmove_core as qmove
from qmove_core import for_hosts

from . import comfy
from .guard import never_fails
from .web_requests import echo

log = logging.getLogger("qmove")

AUTO_PARK = "qmove.autoPark"
AUTO_PARK_WHEN = "qmove.autoParkWhen"
KEEP_LOADED = "qmove.keepLoaded"
KEEP_LOADED_LIMIT = "qmove.keepLoadedLimit"
KEEP_LOADED_OWN = "qmove.keepLoadedOwn"
KEEP_MIRRORS = "qmove.keepMirrors"
RAM_LIMIT = "qmove.ramLimit"
VRAM_TO_KEEP_FREE = "qmove.vramToKeepFree"
IDLE_MINUTES = "qmove.idleMinutes"
RUN_AGAIN = "qmove.runAgain"
VERIFY = "qmove.verify"
NOTIFICATIONS = "qmove.notifications"  # only the browser uses it; kept here so that all tabs agree
NEEDED, STAGE = "needed", "stage"
GIB = 2**30
DISK_FOLDER = "QMOVE_DISK_FOLDER"  # environment: where models go for which RAM has no room

DEFAULTS: dict[str, Any] = {
    AUTO_PARK: True,
    AUTO_PARK_WHEN: NEEDED,
    KEEP_LOADED: True,
    KEEP_LOADED_LIMIT: 0,
    KEEP_LOADED_OWN: False,
    KEEP_MIRRORS: True,
    RAM_LIMIT: 0,
    VRAM_TO_KEEP_FREE: 0,
    IDLE_MINUTES: 0,
    RUN_AGAIN: True,
    VERIFY: False,
    NOTIFICATIONS: True,
}
# Of the settings that are numbers: the most, and what is counted.
NUMBERS: dict[str, tuple[int, str]] = {
    RAM_LIMIT: (65536, "GiB"),
    KEEP_LOADED_LIMIT: (65536, "GiB"),
    VRAM_TO_KEEP_FREE: (1024, "GiB"),
    IDLE_MINUTES: (10080, "minutes"),
}
_CHOICES: dict[str, tuple[Any, ...]] = {AUTO_PARK_WHEN: (NEEDED, STAGE)}

_values: dict[str, Any] = dict(DEFAULTS)
_followers: list[Callable[[], None]] = []
_lock = threading.Lock()  # two tabs may change settings at once, and each change applies as a whole


class InvalidSettings(ValueError):
    """What was sent is not a setting of qmove; the message says which and why."""


def auto_park() -> bool:
    """Whether models on wires are adopted, and parked when their VRAM is needed."""
    return bool(_values[AUTO_PARK])


def parks_each_stage() -> bool:
    """Whether everything that a node does not use is parked before it, needed or not."""
    return bool(_values[AUTO_PARK_WHEN] == STAGE)


def runs_again() -> bool:
    """Whether a node that ran out of memory runs once more when idle models could make room."""
    return bool(_values[RUN_AGAIN])


def vram_to_keep_free() -> int:
    """Bytes of each GPU that auto-parking leaves to others."""
    return int(_values[VRAM_TO_KEEP_FREE] * GIB)


def idle_minutes() -> float:
    """After how many minutes without a use all VRAM is given back; 0 for never."""
    return float(_values[IDLE_MINUTES])


def keep_mirrors() -> bool:
    """Whether host copies of models that came home are kept, so that the next park copies less."""
    return bool(_values[KEEP_MIRRORS])


def keeps_loaded() -> bool:
    """Whether models stay loaded when their workflow is left. What is not parked by itself would
    take the VRAM of others, so that it goes with auto-parking."""
    return bool(_values[KEEP_LOADED]) and auto_park()


def keeps_loaded_own() -> bool:
    """Whether ComfyUI's own models stay loaded too."""
    return bool(_values[KEEP_LOADED_OWN])


def most_kept_loaded() -> int:
    """Bytes of RAM that models which stay loaded may take."""
    return int(_values[KEEP_LOADED_LIMIT] * GIB) or for_hosts.total_ram() // 2


def on_change(follow: Callable[[], None]) -> None:
    """Registers `follow`, called after each change."""
    if follow not in _followers:
        _followers.append(follow)


def current() -> dict[str, Any]:
    return dict(_values)


def change(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Sets all of `changes` or nothing, and returns all settings. It holds for parked models too.

    Raises:
        InvalidSettings: an unknown name, a wrong type, or a value out of range.
    """
    for name, value in changes.items():
        _check(name, value)
    with _lock:
        _values.update(changes)
        _apply(changes)
        values = current()
    for follow in _followers:
        follow()
    return values


def _check(name: str, value: Any) -> None:
    if name not in DEFAULTS:
        raise InvalidSettings(
            f"{echo(name)} is not a setting of qmove. It has: {', '.join(DEFAULTS)}."
        )
    if name in NUMBERS:
        most, unit = NUMBERS[name]
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and 0 <= value <= most:
            return
        allowed = f"a number of {unit} from 0 to {most}"
    else:
        choices = _CHOICES.get(name, (True, False))
        if type(value) is type(DEFAULTS[name]) and value in choices:
            return
        allowed = " or ".join(json.dumps(choice) for choice in choices)
    raise InvalidSettings(f"{name} is {allowed}, not {echo(value)}.")


@never_fails("read ComfyUI's stored settings", None)
def load_stored() -> None:
    """Takes over what ComfyUI has stored for its default user, as far as it is valid, and the
    folder for models that the environment names."""
    if disk_folder := os.environ.get(DISK_FOLDER):
        qmove.configure(disk_folder=disk_folder)
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


def _apply(changes: Mapping[str, Any]) -> None:
    """Passes to the core what concerns it. Mirrors that may not be kept are freed at once."""
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
