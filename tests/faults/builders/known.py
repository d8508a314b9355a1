"""What does not hold yet: kinds of faults in operations that fail, each with what is wrong.

A normal run leaves them out; `make test-faults` tries and counts them. Whoever mends one deletes its
line.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from tests.faults.builders.points import Point

# model/operation/fault
KNOWN: dict[str, str] = {}


def is_known(point: Point) -> bool:
    """Whether it is known that this does not hold."""
    name = f"{point.subject}/{point.operation}/{point.fault}"
    return any(fnmatchcase(name, pattern) for pattern in KNOWN)
