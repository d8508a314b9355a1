"""All of qmove that touches ComfyUI. `start` hooks it in; outside of ComfyUI it does nothing."""

from __future__ import annotations

from qmove_core import for_hosts

from . import comfy, console, progress, routes, settings
from .guard import never_fails
from .models import page_locks, residency
from .panel import events, history, version
from .pool import provider
from .stages import auto_parking, executor, idle, needs


def start() -> None:
    """Hooks qmove into the ComfyUI of this process; logs what this version of it lacks."""
    if comfy.model_management() is None:
        return
    console.use_prefix()
    settings.load_stored()
    needs.use_file_of_host()
    listen_to_core()
    if never_fails("follow the stages of a prompt", False)(executor.install)():
        never_fails("keep models loaded between workflows", False)(provider.install)()
    never_fails("free VRAM after idle minutes", None)(idle.watch.follow_setting)()
    never_fails("serve its state and settings", False)(routes.install)()
    never_fails("say that it has started", None)(console.say_start)(version.about()["version"])


@never_fails("follow its own moves", None)
def listen_to_core() -> None:
    """Follows each move, answers requests for room, and keeps our models in ComfyUI's list; calling
    it twice changes nothing."""
    settings.on_change(residency.follow_auto_park)
    progress.on_change(history.note_move)
    progress.on_change(events.watch_move)
    for_hosts.on_move(residency.note_move)
    for_hosts.on_move(events.model_moved)
    for_hosts.on_move(page_locks.book)
    for_hosts.on_move(idle.watch.note_use)
    for_hosts.on_page_locking(page_locks.hosts_own)
    for_hosts.on_yielding(auto_parking.yielding_bytes)
    for_hosts.on_shortage(auto_parking.give_room)
    residency.keep_listed()
