"""The progress of a move, on the node for which it happens and in ComfyUI's bar; and the user's interrupt, which stops it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from qmove_core import errors, transfer

from . import comfy
from .guard import is_interrupt, log_once

SECONDS_BETWEEN_UPDATES = 0.1

_staged_node: ContextVar[str | None] = ContextVar("qmove_staged_node", default=None)


@contextmanager
def for_node(node_id: str) -> Iterator[None]:
    """Inside, moves show on this node: it is about to run, and the host does not yet name it as the one that does."""
    token = _staged_node.set(node_id)
    try:
        yield
    finally:
        _staged_node.reset(token)


@contextmanager
def shown(verb: str, name: str) -> Iterator[transfer.Progress | None]:
    """Gives the `progress` callback for one move; None where no node is being run, so nobody looks and nobody interrupts.

    The host unloads models outside of prompts too (POST /free). An interrupt that was left over must not stop that: raised
    there it would end the host's worker.
    """
    node_id = _staged_node.get() or comfy.running_node()
    host = comfy.model_management()
    if node_id is None or host is None:
        yield None
        return
    yield _Reporter(verb, name, node_id)


class _Reporter:
    def __init__(self, verb: str, name: str, node_id: str) -> None:
        self._text = f"{verb} {name}"
        self._node_id = node_id
        self._next_update = 0.0
        bar_class = comfy.progress_bar_class()
        self._bar = bar_class(1, node_id=node_id) if bar_class is not None else None

    def __call__(self, done: int, total: int) -> None:
        """Raises the host's InterruptProcessingException when the user has interrupted; the core then rolls the move back."""
        host = comfy.model_management()
        if host is not None:
            host.throw_exception_if_processing_interrupted()
        now = time.monotonic()
        if now < self._next_update and done < total:
            return
        self._next_update = now + SECONDS_BETWEEN_UPDATES
        try:
            self._show(done, total)
        except Exception as error:
            if is_interrupt(error):  # the bar asks for it as well
                raise
            log_once("show the progress of a move", error)

    def _show(self, done: int, total: int) -> None:
        if self._bar is not None:
            self._bar.update_absolute(done, total)
        say(f"{self._text}: {errors.readable_bytes(done)} of {errors.readable_bytes(total)}", self._node_id)


def say(text: str, node_id: str) -> None:
    """Shows a line of text on a node."""
    server = comfy.server()
    if server is not None and server.client_id is not None:
        server.send_progress_text(text, node_id, server.client_id)
