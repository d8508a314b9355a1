"""What was lacking, destroyed or refused is told with its reason, without Python."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from qmove_pack.nodes.host import advice, browser, progress
from qmove_pack.nodes.host.models import residency
from qmove_pack.nodes.host.panel import state

import qmove_core as qmove
from tests.builders.device import GPU
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import model_of, node
from tests.nodes.builders.fake_host import FakeHost

PYTHON = re.compile(r"qmove\.|torch\.|\w\(|\w=\w|pip install|\b[A-Z]+_[A-Z]+_")


@pytest.fixture(autouse=True)
def _nodes(host: FakeHost) -> None:
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL)


def test_a_node_that_ran_out_of_memory_says_what_it_lacked_and_who_holds_the_card(
    host: FakeHost, gpu: GPU
) -> None:
    total = torch.cuda.mem_get_info()[1] >> 20
    prompt = {"scratch": node("Scratch", mib=total + 1) | {"_meta": {"title": "Upscale"}}}
    host.run(prompt)

    told = [data for event, data in host.server.sent if event == browser.FAILURE]
    (failure,) = told
    assert failure["kind"] == "shortage"
    assert failure["stage"] == {
        "node": "scratch",
        "class": "Scratch",
        "title": "Upscale",
        "workflow": None,
    }
    assert "out of memory" in failure["reason"]
    assert not PYTHON.search(failure["reason"])
    assert failure["devices"][0]["name"] == "cuda:0"
    assert state.snapshot()["failures"] == told
    host.run({"scratch": node("Scratch", mib=1)})
    assert state.snapshot()["failures"] == []


def test_a_move_that_was_refused_says_why(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    residency.take_in([model := model_of(16)])
    qmove.configure(ram_limit=1 << 20)
    try:
        with pytest.raises(qmove.NotEnoughMemory):
            residency.park(residency.idle_models([]))
    finally:
        qmove.configure(ram_limit=None)
    last = [data for event, data in host.server.sent if event == browser.MOVE][-1]
    assert (last["state"], last["advice"]) == ("failed", "ram")
    assert "needs" in last["reason"]
    assert not PYTHON.search(last["reason"])
    assert progress.running() == []
    assert not qmove.is_parked(model)


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (
            "Parking needs 8 GiB. Raise it: qmove.configure(pin_limit=bytes).",
            "Parking needs 8 GiB.",
        ),
        ("It stays. Try again under torch.no_grad() or pass allow=True.", "It stays."),
        ("Emptied (resize_(0)): load it again.", "Emptied: load it again."),
        ("Free: 8 GiB (8589934592 bytes; limit: free VRAM).", None),
        ("Out. Try setting PYTORCH_ALLOC_CONF=expandable_segments:True.", "Out."),
        ("FLUX_DEV.safetensors (2) is pinned.", None),
        ("model.safetensors stays on cuda:0.", None),
    ],
)
def test_no_advice_in_python_reaches_a_browser(said: str, kept: str | None) -> None:
    assert advice.for_people(qmove.QMoveError(said)) == (said if kept is None else kept)


def test_a_message_that_is_all_python_still_says_something() -> None:
    said = advice.for_people(qmove.QMoveError("call qmove.restore(model)"))
    assert said == "QMoveError; the log says more."


def test_each_kind_of_error_that_has_a_way_out_names_one_that_the_frontend_knows() -> None:
    from tests.nodes.test_what_is_shipped import ROOT

    words = (ROOT / "web" / "js" / "texts" / "en.js").read_text(encoding="utf-8")
    keys = set(re.findall(r"^    (\w+):", words.partition("advice:")[2], re.MULTILINE))
    used = set(re.findall(r'"(\w+)"\)', inspect.getsource(advice))) - {"qmove"}
    assert {"ram", "vram", "unpin", "wait", "restart"} <= used | {"ram", "vram"} <= keys
