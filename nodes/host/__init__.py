"""All of qmove that touches ComfyUI. `start` hooks it in; outside of ComfyUI it does nothing."""

from __future__ import annotations

import logging

from qmove_core import hosting

from . import comfy, routes, settings
from .guard import never_fails
from .models import residency
from .panel import events
from .stages import auto_parking, executor

log = logging.getLogger("qmove")


def start() -> None:
    """Hooks qmove into the ComfyUI of this process; what this version of it lacks is told and left out."""
    if comfy.model_management() is None:
        return
    settings.load_stored()
    listen_to_core()
    _watch_stages()
    _serve()


@never_fails("follow its own moves", None)
def listen_to_core() -> None:
    """Hears of each move, and is asked for room; doing it twice changes nothing."""
    hosting.on_move(residency.note_move)
    hosting.on_move(events.model_moved)
    hosting.on_shortage(auto_parking.give_room)


@never_fails("follow the stages of a prompt", None)
def _watch_stages() -> None:
    executor.install()


@never_fails("serve its state and settings", None)
def _serve() -> None:
    routes.install()
