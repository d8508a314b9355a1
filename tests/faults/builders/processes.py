"""Code in a Python of its own, with the simulated GPU: what may hang or be killed."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

from tests.faults.builders.runs import MINUTES, ROOT

SECONDS = 3600 if MINUTES else 300  # that a process may take; it hangs otherwise

_IMPORTS = """
import tests.builders.device
import torch
import qmove_core as qmove
from tests.builders.models import inputs, layers
from qmove_core.transfer import copies
copies.SMALL = 0
"""


def run(body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs `body` after imports of torch, qmove and models, whose storages are copied singly."""
    return subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", _IMPORTS + textwrap.dedent(body), *arguments],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
