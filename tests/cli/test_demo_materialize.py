"""Real input: MiniLM, dispatched over two GPUs, RAM and disk, as the second act of `make demo` shows it."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import pytest
from rich.console import Console

from qmove_core.cli.demo.materialize import materialize_dispatched
from qmove_core.cli.demo.park_and_restore import WEIGHTS, Setting
from tests.builders.device import GPU

PACKAGE = importlib.util.find_spec(WEIGHTS)


@pytest.mark.skipif(PACKAGE is None, reason=f"needs the package {WEIGHTS}")
def test_the_act_keeps_every_promise_on_real_weights(
    tmp_path: Path, gpu: GPU, second_gpu: GPU
) -> None:
    assert PACKAGE is not None and PACKAGE.origin is not None
    said = io.StringIO()
    before = gpu.allocated(), second_gpu.allocated()
    setting = Setting(
        Console(file=said, width=120),
        gpu.device,
        Path(PACKAGE.origin).parent / "model",
        tmp_path / "unused",
    )

    assert materialize_dispatched(setting)

    text = said.getvalue()
    assert "You can't move a model that has some modules offloaded" in text
    assert text.count("  yes  ") == 7 and "NO " not in text
    assert (gpu.allocated(), second_gpu.allocated()) == before, "the act leaves something behind"
