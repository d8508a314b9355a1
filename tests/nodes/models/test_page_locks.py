"""What qmove has page-locked is in ComfyUI's books, and its moves make ComfyUI drop no pins."""

from __future__ import annotations

from typing import Any

import pytest
from qmove_pack.nodes.host.models import page_locks, residency

import qmove_core as qmove
import simcuda
from qmove_core.memory import pinning
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, model_of, node
from tests.nodes.builders.fake_host import FakeHost

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.parametrize("host", ["new"], indirect=True),  # older ones do not count
]

LIMIT = 1024 * MIB


class Books:
    """ComfyUI's own pins: it counts them, drops some to lock what is asked for, and no others."""

    def __init__(self, host: FakeHost, own: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.management: Any = host.management
        self.own, self.asked_for = own, []  # type: ignore[var-annotated]
        monkeypatch.setattr(self.management, "TOTAL_PINNED_MEMORY", own, raising=False)
        monkeypatch.setattr(self.management, "MAX_PINNED_MEMORY", LIMIT, raising=False)
        free, load = self.management.free_memory, self.management.load_models_gpu

        def free_memory(required: Any, device: Any, keep: Any = (), pins_required: int = 0) -> Any:
            self.asked_for.append(pins_required)
            self.make_registerable(pins_required)
            return free(required, device, keep)

        def load_models_gpu(models: Any, **options: Any) -> None:
            """What is to be loaded is taken for something that will be locked."""
            nbytes = sum(entry.model_size() for entry in models)
            free_memory(0, models[0].load_device, (), pins_required=nbytes)
            load(models, **options)

        monkeypatch.setattr(self.management, "free_memory", free_memory)
        monkeypatch.setattr(self.management, "load_models_gpu", load_models_gpu)

    def make_registerable(self, nbytes: int) -> None:
        short = self.management.TOTAL_PINNED_MEMORY + nbytes - LIMIT
        dropped = min(self.own, max(0, short))
        self.own -= dropped
        self.management.TOTAL_PINNED_MEMORY -= dropped

    def pin(self, nbytes: int) -> None:
        self.make_registerable(nbytes)
        if self.management.TOTAL_PINNED_MEMORY + nbytes <= LIMIT:
            self.own += nbytes
            self.management.TOTAL_PINNED_MEMORY += nbytes

    @property
    def total(self) -> int:
        return int(self.management.TOTAL_PINNED_MEMORY)


@pytest.fixture
def books(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> Books:
    qmove.trim()
    careless_nodes.forget_all()
    host.add(*careless_nodes.ALL)
    return Books(host, 100 * MIB, monkeypatch)


def locked() -> int:
    return qmove.stats().pinned_bytes


def test_what_a_park_locks_is_counted_and_not_again_for_the_next(books: Books) -> None:
    models = [model_of(64), model_of(16)]
    for number, model in enumerate(models):  # the same weights twice are not locked twice
        for parameter in model.parameters():
            parameter.data.add_(number)
    for adopted in residency.take_in(models):
        residency.park([adopted])
        assert locked() > 0
        assert books.total == books.own + locked()
        assert page_locks.hosts_own() == books.own


def test_what_is_unlocked_is_counted_no_more(books: Books) -> None:
    model = model_of(64)
    residency.park(residency.take_in([model]))
    del model
    careless_nodes.forget_all()
    qmove.trim()
    assert locked() == 0

    page_locks.book()

    assert books.total == books.own == 100 * MIB


def test_comfyuis_own_counting_goes_on_beside_it(books: Books) -> None:
    (adopted,) = residency.take_in([_model := model_of(64)])
    residency.park([adopted])
    books.pin(50 * MIB)
    residency.bring_home([adopted])
    residency.park([adopted])

    assert books.own == 150 * MIB
    assert books.total == books.own + locked()


def test_comfyuis_own_pins_are_taken_off_what_qmove_may_lock(books: Books) -> None:
    residency.park(residency.take_in([_model := model_of(64)]))
    before = pinning.pin_limit(others=0, ram=LIMIT).nbytes
    limit = pinning.pin_limit(ram=LIMIT)

    assert locked() > 0, "and what qmove itself has in those books is not taken off again"
    assert limit.nbytes == before - limit.others
    assert limit.others == books.own + pinning._locked_by_pytorch()


def test_both_together_keep_to_comfyuis_limit(books: Books) -> None:
    residency.park(residency.take_in([_model := model_of(64)]))
    books.pin(LIMIT - books.own - 32 * MIB)

    assert books.own + locked() <= LIMIT


@pytest.mark.parametrize("look", ["a node begins", "ComfyUI looks for room"])
def test_what_was_locked_in_the_background_is_counted_when(
    host: FakeHost, books: Books, look: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_locks.for_hosts, "page_locked_bytes", lambda: 48 * MIB)
    if look == "a node begins":
        host.run({"text": node("Text", text="x")})
    else:
        host.management.free_memory(0, host.management.get_torch_device())

    assert books.total == books.own + 48 * MIB
    monkeypatch.setattr(page_locks.for_hosts, "page_locked_bytes", lambda: 0)
    page_locks.book()
    assert books.total == books.own


def test_bringing_a_model_home_makes_comfyui_drop_no_pin(
    host: FakeHost, books: Books, monkeypatch: pytest.MonkeyPatch
) -> None:
    books.pin(LIMIT - 120 * MIB - books.own)
    model, kept = model_of(64), model_of(64)
    (adopted, _other) = residency.take_in([model, kept])
    residency.park([adopted])
    own = books.own
    simcuda.set_memory(100 * MIB)  # the other one has to leave for it

    residency.bring_home([adopted])

    assert adopted.resident
    assert qmove.is_parked(kept)
    assert books.asked_for and set(books.asked_for) == {0}
    assert books.own == own


@pytest.mark.parametrize("limit", [-1, 0, None])
def test_where_comfyui_locks_nothing_its_count_is_left_alone(
    host: FakeHost, books: Books, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if limit is None:  # 0.3.64
        monkeypatch.delattr(host.management, "MAX_PINNED_MEMORY")
    else:
        monkeypatch.setattr(host.management, "MAX_PINNED_MEMORY", limit)

    residency.park(residency.take_in([_model := model_of(16)]))

    assert books.total == 100 * MIB
