"""What does not hold yet: kinds of faults in operations that fail, each with what is wrong.

A normal run leaves them out; `make test-faults` tries and counts them. Whoever mends one deletes its
line.
"""

from __future__ import annotations

from fnmatch import fnmatchcase

from tests.faults.builders.points import Point

# model/operation/fault
KNOWN = {
    "*/*/Ctrl-C at a line": "at a few lines in a thousand a kept traceback keeps memory",
    "*/*/another thread's exception at a line": "only SIGINT is held back during a commit",
    "*/*/raising handler at a line": "only SIGINT is held back during a commit",
    "*/park*/Ctrl-C at a line": "at some lines a kept traceback keeps staging or host memory",
    "two that share/*/Ctrl-C at a line": "a commit does not take tensors outside the model along",
    "two that share/streaming restore/late copy": "the other model's Parameter keeps its waiting class",
    "two that share/streaming restore/wait fails": "the other model's Parameter keeps its waiting class",
    "two that share/wake/late copy": "the other model's Parameter keeps its waiting class",
    "two that share/wake/wait fails": "the other model's Parameter keeps its waiting class",
    "two that share/prefetch/late copy": "the other model's Parameter keeps its waiting class",
    "two that share/prefetch/wait fails": "the other model's Parameter keeps its waiting class",
    "*/prepare/thread start": "it counts as being prepared for ever, and the exit raises",
    "*/swap/*": "a kept traceback keeps the room that was allocated",
    "*/requantize/*": "a kept traceback keeps the new weights",
    "*/dequantize/Ctrl-C at a line": "a kept traceback keeps the old weights",
    "*/mirror_files/*": "a kept traceback keeps what digests were computed in",
    "*/materialize/*": "a kept traceback keeps the weights",
    "*/materialize on a GPU/*": "a kept traceback keeps the weights",
    "*/materialized/*": "interrupted on entering or leaving, the dispatch is lost",
    "*/prefetch/Ctrl-C at a line": "interrupted before it is under way, an arrival keeps storages",
    "*/streaming restore/Ctrl-C at a line": "the same",
    "*/wake/Ctrl-C at a line": "the same",
    "*/resident/Ctrl-C at a line": "a kept traceback keeps storages",
    "*/trim/Ctrl-C at a line": "mirrors that were taken out are kept by the traceback",
}


def is_known(point: Point) -> bool:
    """Whether it is known that this does not hold."""
    name = f"{point.subject}/{point.operation}/{point.fault}"
    return any(fnmatchcase(name, pattern) for pattern in KNOWN)
