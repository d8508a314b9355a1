"""Calls that several threads make at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


def in_threads(call: Callable[[], Any], count: int = 3) -> list[Any]:
    """What so many threads get that call at the same time."""
    got: list[Any] = []
    running = [threading.Thread(target=lambda: got.append(call())) for _ in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return got
