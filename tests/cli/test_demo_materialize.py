"""Real input: MiniLM over two GPUs, RAM and disk, in the second act of `make demo`."""

from __future__ import annotations

import importlib.util
import io

import pytest
from rich.console import Console

from qmove_core.cli.demo.materialize import materialize_dispatched
from qmove_core.cli.demo.setting import WEIGHTS, Setting
from tests.builders.device import GPU

PACKAGE = importlib.util.find_spec(WEIGHTS)


@pytest.mark.skipif(PACKAGE is None, reason=f"needs the package {WEIGHTS}")
def test_the_act_keeps_every_promise_on_real_weights(gpu: GPU, second_gpu: GPU) -> None:
    said = io.StringIO()
    before = gpu.allocated(), second_gpu.allocated()
    setting = Setting(Console(file=said, width=120), gpu.device)

    assert materialize_dispatched(setting)

    text = said.getvalue()
    assert "You can't move a model that has some modules offloaded" in text
    assert text.count("  yes  ") == 7 and "NO " not in text
    assert (gpu.allocated(), second_gpu.allocated()) == before, "the act leaves something behind"
