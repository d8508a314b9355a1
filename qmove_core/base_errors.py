"""The base of all errors, and the one that is raised where PyTorch is missing: no import of it."""

from __future__ import annotations


class QMoveError(RuntimeError):
    """Base of all errors of qmove. The model is whole then, in its old place or its new one."""


class MissingDependency(QMoveError, ImportError):
    """What was asked needs an optional package that is not installed."""
