"""ComfyUI's dynamic models (comfy-aimdo): their pages yield to any allocation, and come back.

So what they hold is free, though no figure has it as free: the allocation decides. Left alone they
fill the card again; only a headroom makes them leave some of it to other programs.
"""

from __future__ import annotations

from typing import Any

from .. import comfy
from ..guard import never_fails

_hosts: int | None = None  # the headroom that is not ours
_set: int | None = None  # what we have set; None for nothing


@never_fails("have ComfyUI's dynamic models leave VRAM to others", None)
def keep_headroom(nbytes: int) -> None:
    """Has dynamic models leave `nbytes` of each GPU free, or as much as without qmove if that is
    more. They give pages up at their next use.

    Needs comfy-aimdo 0.6, whose setter it is; without it nothing happens.
    """
    global _hosts, _set
    control: Any = comfy.module("comfy_aimdo.control")
    known = hasattr(control, "set_simple_vram_headroom")
    if not known or getattr(control, "lib", None) is None or not (nbytes or _set is not None):
        return
    now = int(control.get_simple_vram_headroom())
    if _hosts is None or now != _set:  # never set by us, or by somebody else since
        _hosts = now
    wanted = max(_hosts, nbytes)
    if wanted != now:
        control.set_simple_vram_headroom(wanted)
    _set = wanted if nbytes else None


def forget() -> None:
    """For the next test: what was set in a host that is gone."""
    global _hosts, _set
    _hosts = _set = None
