"""A failure of qmove inside ComfyUI's own loop is logged, once, and never fails the prompt."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from . import comfy

log = logging.getLogger("qmove")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

_logged: set[tuple[str, type[BaseException]]] = set()


def log_once(what: str, error: Exception) -> None:
    """Logs, with its traceback, the first error of its kind that kept qmove from doing `what`."""
    key = (what, type(error))
    if key in _logged:
        log.debug("qmove could not %s again: %s", what, error)
        return
    _logged.add(key)
    message = "qmove could not %s; the prompt goes on without it: %s"
    log.error(message, what, error, exc_info=error)


def is_interrupt(error: BaseException) -> bool:
    """Whether the user has stopped the prompt. Up to 0.18.2 that is an Exception like any other."""
    host = comfy.model_management()
    return host is not None and isinstance(error, host.InterruptProcessingException)


def never_fails(
    what: str, otherwise: Result
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Makes a function log an Exception and return `otherwise`; `what` says what it was to do.

    Ctrl-C and the user's interrupt pass: they are no failures.
    """

    def decorate(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        @functools.wraps(function)
        def guarded(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            try:
                return function(*args, **kwargs)
            except Exception as error:
                if is_interrupt(error):
                    raise
                log_once(what, error)
                return otherwise

        return guarded

    return decorate
