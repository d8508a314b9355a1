"""Every kind of model that people meet goes through every check.

`make test-kinds` tries all of them and writes docs/results/kinds.json; a normal run tries a sample.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.builders.device import GPU
from tests.kinds.checks import CHECKS, Case, each_copy_alone
from tests.kinds.kind import Kind
from tests.kinds.registry import KINDS

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.filterwarnings("ignore"),
]
ALL = os.environ.get("QMOVE_KINDS") == "all"
CHOSEN = [kind for kind in KINDS if ALL or kind.in_sample]


@pytest.fixture(autouse=True)
def _copies(monkeypatch: pytest.MonkeyPatch) -> None:
    each_copy_alone(monkeypatch)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", CHOSEN, ids=lambda kind: kind.name)
def test_kind(
    kind: Kind,
    check: str,
    gpu: GPU,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    properties = request.node.user_properties
    properties += [("kind", kind.name), ("check", check)]
    if kind.name.startswith("torch.compile"):
        monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    if check in kind.cannot:
        pytest.skip(kind.cannot[check])
    kind.require_package()
    properties.append(("needs", kind.needs))
    CHECKS[check](Case(kind, gpu, tmp_path))
