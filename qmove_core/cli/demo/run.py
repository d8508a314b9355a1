"""Runs the acts of `qmove demo`, on a GPU or, in a checkout of qmove, on the simulated one."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from ... import devices
from ...errors import MissingDependency, QMoveError
from .materialize import materialize_dispatched
from .park_and_restore import park_and_restore
from .setting import WEIGHTS, Setting

NEEDED = ("transformers", "accelerate", "bitsandbytes", WEIGHTS)


class NoAccelerator(QMoveError):
    """The demo needs a GPU, real or simulated, and there is none."""


def main(console: Console, picture: Path) -> int:
    """Runs the demo and draws `picture`. Returns 0 if qmove did all it promises.

    Raises:
        NoAccelerator: neither a GPU nor the simulated one is here.
        MissingDependency: a package the demo needs is not installed.
    """
    missing = [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"The demo needs {', '.join(missing)}: pip install 'qmove[demo]' (or, in a checkout, "
            "make demo)."
        )
    known = devices.known()
    if len(known) == 1:
        return _on_the_simulated_gpu(picture)
    with _quiet_libraries():
        setting = Setting(console, devices.resolve(known[1]))
        kept = [park_and_restore(setting, picture), materialize_dispatched(setting)]
    return 0 if all(kept) else 1


def _on_the_simulated_gpu(picture: Path) -> int:
    """Starts over in a new process: the simulated GPU must be there before PyTorch is imported."""
    if importlib.util.find_spec("simcuda") is None:
        raise NoAccelerator(
            "The demo needs a GPU and PyTorch sees none (`qmove doctor` says why). "
            "A checkout of qmove has a simulated one for Linux: `make demo` there uses it."
        )
    # bitsandbytes would compile its portable kernels again in each call there; and threads that
    # spin while they wait slow everything down where other programs run too.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    simulated = [sys.executable, "-m", "simcuda", "--devices", "2"]
    demo = ["-m", "qmove_core.cli", "demo", "--picture", str(picture)]
    return subprocess.call([*simulated, *demo], env=environment)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps progress bars and warnings of the libraries out of what the demo prints."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
