"""CPUs with AVX512-BF16 and without, as bitsandbytes sees them: no machine decides what a test
sees."""

from __future__ import annotations

from typing import Any

import bitsandbytes.nn.modules as bnb_modules
import pytest
from bitsandbytes.functional import has_avx512bf16


def set_avx512_bf16(there: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `Linear4bit` that is built from now on takes the CPU for one with (1) or without (0) it.

    Such a layer packs its weight in a forward on the CPU, and the kernels for packed weights exist
    only where the CPU has the feature. Elsewhere packing fails the test before they can run.
    """
    monkeypatch.setattr(bnb_modules, "has_avx512bf16", lambda: there)
    if there and not has_avx512bf16():
        monkeypatch.setattr(bnb_modules, "_convert_weight_packed_for_cpu", _refuse_to_pack)


def _refuse_to_pack(*_arguments: Any, **_options: Any) -> None:
    pytest.fail("packed a weight for AVX512-BF16, whose kernels this CPU cannot run")
