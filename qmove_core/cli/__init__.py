"""`qmove` on the command line: doctor, inspect, demo."""

from .app import main

__all__ = ["main"]
