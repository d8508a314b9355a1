"""What qmove has page-locked, in ComfyUI's books, so that both together keep to ComfyUI's limit.

ComfyUI counts the bytes that it locks in `TOTAL_PINNED_MEMORY` and locks no more than
`MAX_PINNED_MEMORY`; it does not ask the driver what others have locked.
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

from qmove_core import for_hosts

from .. import comfy
from ..guard import never_fails

_lock = threading.Lock()
_booked: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # by host: bytes of ours


@never_fails("count its page-locked memory in ComfyUI's books", None)
def book() -> None:
    """Makes ComfyUI's count true. It is cheap, and meant for where ComfyUI's own thread counts."""
    host: Any = comfy.model_management()
    if host is None or getattr(host, "MAX_PINNED_MEMORY", 0) <= 0:
        return  # it locks nothing, or knows no limit (0.3.64)
    with _lock:
        before, now = _booked.get(host, 0), for_hosts.page_locked_bytes()
        if now != before:
            # It starts anew at 0 where it thinks that it has unlocked more than it had locked.
            host.TOTAL_PINNED_MEMORY = max(0, host.TOTAL_PINNED_MEMORY + now - before)
            _booked[host] = now


@never_fails("know what ComfyUI has page-locked", 0)
def hosts_own() -> int:
    """Bytes that ComfyUI has page-locked itself."""
    host: Any = comfy.model_management()
    with _lock:
        total = getattr(host, "TOTAL_PINNED_MEMORY", 0)
        return max(0, int(total) - (_booked.get(host, 0) if host is not None else 0))
