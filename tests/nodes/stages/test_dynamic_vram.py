"""ComfyUI's dynamic models yield to whatever is allocated: what they hold counts as free, and ours
stay. Only the core's own moves, which look at what is free, have ComfyUI ask them first."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from qmove_pack.nodes.host.models import finding, holders, residency
from qmove_pack.nodes.host.models.adopted import adopted_of
from qmove_pack.nodes.host.stages import auto_parking, requests

import qmove_core as qmove
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_in, model_of, node
from tests.nodes.builders.dynamic_vram import DynamicCard, DynamicPatcher
from tests.nodes.builders.fake_host import FakeHost

pytestmark = pytest.mark.simulated
DEVICE = torch.device("cuda:0")
CARD = 256  # MiB


class Work(careless_nodes._Node):
    """Takes room for a moment, as any code does: dynamic models yield to it."""

    INPUTS: ClassVar[dict[str, Any]] = {
        "mib": ("INT", {}),
        "seed": ("INT", {}),
        "model": ("MODEL", {}),
    }
    card: ClassVar[DynamicCard]

    def run(self, mib: int, seed: int = 0, model: Any = None) -> tuple[Any]:
        self.card.allocate(mib * MIB)
        return (seed,)


@pytest.fixture
def card(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> DynamicCard:
    careless_nodes.forget_all()
    finding.forget_all()
    card = DynamicCard(host, CARD)
    card.hook(monkeypatch)
    monkeypatch.setattr(Work, "card", card, raising=False)
    host.add(*careless_nodes.ALL, Work)
    return card


@pytest.fixture
def ours(card: DynamicCard) -> Any:
    """An idle model, larger than what is left beside it: ComfyUI would evict it first."""
    model = model_of(130)
    residency.take_in([model])
    return model


@pytest.fixture
def dynamic(card: DynamicCard, ours: Any) -> DynamicPatcher:
    """A dynamic model that has taken all that was left."""
    patcher = card.load(400)
    assert card.free() < MIB
    return patcher


def work(mib: int, seed: int, **inputs: Any) -> dict[str, Any]:
    return {"work": node("Work", mib=mib, seed=seed, **inputs)}


def test_what_it_holds_is_free_for_a_node(
    host: FakeHost, ours: Any, dynamic: DynamicPatcher
) -> None:
    for seed in range(3):  # in the first nobody knows the need; then it is known
        host.run(work(100, seed))
        assert host.errors == []
        assert not qmove.is_parked(ours)
    assert dynamic.asked_to_yield == []


def test_what_it_cannot_give_up_is_made_room_for(
    host: FakeHost, card: DynamicCard, ours: Any, dynamic: DynamicPatcher
) -> None:
    residency.park([adopted_of(ours)])
    host.run(work(230, 1))  # the need is learned
    residency.bring_home([adopted_of(ours)])
    host.ran.clear()

    host.run(work(230, 2))

    assert (host.errors, host.ran) == ([], ["work"])
    assert qmove.is_parked(ours)


def test_what_the_node_itself_uses_is_not_free_for_it(
    host: FakeHost, card: DynamicCard, ours: Any, dynamic: DynamicPatcher
) -> None:
    class Give(careless_nodes._Node):
        def run(self) -> tuple[Any]:
            return (dynamic,)

    host.add(Give)
    for seed in range(2):
        host.run({"give": node("Give"), **work(50, seed, model=("give", 0))})

    assert host.errors == []
    assert qmove.is_parked(ours)  # or the model that computes would lose pages at each step


def test_a_model_of_ours_comes_home_over_its_pages_and_no_other_goes(
    host: FakeHost, card: DynamicCard, ours: Any
) -> None:
    model = model_of(80)
    (parked,) = residency.take_in([model])
    residency.park([parked])
    dynamic = card.load(400)
    before = dynamic.pages

    residency.bring_home([parked])

    assert parked.resident
    assert not qmove.is_parked(ours)
    assert dynamic.asked_to_yield == []  # the allocation decides, not a figure
    assert before - dynamic.pages < 81 * MIB
    assert dynamic in [line.model for line in host.management.current_loaded_models]


def test_one_that_comes_home_without_comfyui_finds_room_in_the_same_way(
    host: FakeHost, card: DynamicCard, ours: Any
) -> None:
    waking = model_of(80)
    residency.park(residency.take_in([waking]))
    dynamic = card.load(400)

    qmove.restore(waking)

    assert not qmove.is_parked(waking)
    assert not qmove.is_parked(ours)
    assert dynamic.asked_to_yield == []


def test_a_model_comes_home_though_the_figure_stays_low_whatever_comfyui_does(
    host: FakeHost, card: DynamicCard, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dynamic model takes what it has given up at once, so that free VRAM is always low."""
    waking = model_of(80)
    residency.park(residency.take_in([waking]))
    dynamic = card.load(400)
    monkeypatch.setattr(dynamic, "partially_unload", lambda device, nbytes: 0)
    monkeypatch.setattr(dynamic, "detach", lambda unpatch_all=True: None)

    qmove.restore(waking)

    assert not qmove.is_parked(waking)
    assert not qmove.is_parked(ours)


def test_where_pages_do_not_go_by_themselves_comfyui_is_asked_for_them(
    host: FakeHost, card: DynamicCard, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver that is not hooked: the allocation fails, and is tried again."""
    waking = model_of(80)
    residency.park(residency.take_in([waking]))
    dynamic = card.load(400)
    monkeypatch.setattr(card, "_evict", lambda nbytes: None)

    qmove.restore(waking)

    assert not qmove.is_parked(waking)
    assert dynamic.asked_to_yield
    assert not qmove.is_parked(ours)


def test_a_model_that_computes_with_pages_keeps_them(
    host: FakeHost, card: DynamicCard, ours: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    dynamic = card.load(400)
    monkeypatch.setattr(auto_parking, "in_use", auto_parking.NodeInputs(patchers=[dynamic]))

    assert auto_parking.yielding_bytes(DEVICE) == 0
    monkeypatch.setattr(auto_parking, "in_use", auto_parking.NodeInputs())
    assert auto_parking.yielding_bytes(DEVICE) == dynamic.pages > 0


def test_the_next_model_is_prefetched_over_its_pages(
    host: FakeHost, card: DynamicCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = {
        "load": node("Load", mib=40, shape="plain"),
        "work": node("Work", mib=8, seed=1),
        "use": node("Use", model=("load", 0), seed=1, after=("work", 0)),
    }
    host.run(prompt)  # the need of "work" is learned
    model = model_in(host, "load")
    residency.park([adopted_of(model)])
    card.load(400)
    begun: list[Any] = []
    prefetch = qmove.prefetch
    monkeypatch.setattr(qmove, "prefetch", lambda m: begun.append(prefetch(m)) or begun[-1])
    for name in ("work", "use"):
        prompt[name]["inputs"]["seed"] = 2

    host.run(prompt)

    assert host.errors == []
    assert [one is not None for one in begun] == [True]


def test_free_vram_has_it_yield_before_ours_are_parked(
    host: FakeHost, card: DynamicCard, ours: Any, dynamic: DynamicPatcher
) -> None:
    report = requests.free_vram(100 * MIB)

    assert "parked nothing" in report
    assert card.free() >= 100 * MIB


def test_the_report_says_whose_it_is(card: DynamicCard, dynamic: DynamicPatcher) -> None:
    held = {holder.name: holder.nbytes for holder in holders.models_on(DEVICE)}

    assert held["Linear (ComfyUI's own, dynamic)"] == dynamic.loaded_size()
