"""Where something is kept: one case for each place in which packs hide their models."""

from __future__ import annotations

import functools
import gc
import threading
import types
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from qmove_core.model import places as places_module
from qmove_core.model.heap import Heap
from qmove_core.model.places import Place, places
from tests.builders.collector import everything_listed
from tests.builders.device import GPU

_module_global: Any = None


class Captioner:
    """A node of a pack, as it were."""

    shared: ClassVar[Any] = None


class Session:
    def __init__(self, **attributes: Any) -> None:
        self.__dict__.update(attributes)


class Slotted:
    __slots__ = ("model",)

    def __init__(self, model: Any) -> None:
        self.model = model


def on_instance(thing: Any) -> tuple[Any, str]:
    node = Captioner()
    node.model = thing  # type: ignore[attr-defined]
    return node, "Captioner node, `self.model`"


def deep_in_an_instance(thing: Any) -> tuple[Any, str]:
    node = Captioner()
    node.sessions = {"video 1": [Session(net=thing)]}  # type: ignore[attr-defined]
    return node, "Captioner node, `self.sessions['video 1'][0].net`"


def in_a_slot(thing: Any) -> tuple[Any, str]:
    node = Captioner()
    node.held = Slotted(thing)  # type: ignore[attr-defined]
    return node, "Captioner node, `self.held.model`"


def on_a_class(thing: Any) -> tuple[Any, str]:
    Captioner.shared = thing
    return None, "class Captioner, `Captioner.shared`"


def in_a_global(thing: Any) -> tuple[Any, str]:
    global _module_global
    _module_global = {"a": thing}
    return None, f"module {__name__}, `_module_global['a']`"


def in_a_closure(thing: Any) -> tuple[Any, str]:
    def caption() -> Any:
        return thing

    return caption, f"function {__name__}.in_a_closure.<locals>.caption, `thing`"


def in_an_lru_cache(thing: Any) -> tuple[Any, str]:
    waiting = [thing]

    @functools.lru_cache
    def load() -> Any:
        return waiting.pop()

    load()
    return load, f"lru_cache of {__name__}.in_an_lru_cache.<locals>.load"


def in_a_partial(thing: Any) -> tuple[Any, str]:
    return functools.partial(print, thing), "a partial of builtins.print"


def in_a_generator(thing: Any) -> tuple[Any, str]:
    def frames(model: Any) -> Any:
        while True:
            yield model is None

    generator = frames(thing)
    next(generator)
    return generator, "generator in_a_generator.<locals>.frames"


def in_a_waiting_thread(thing: Any) -> tuple[Any, str]:
    wanted = threading.Event()
    thread = threading.Thread(target=wanted.wait, name="worker", daemon=True)
    thread.model = thing  # type: ignore[attr-defined]
    thread.start()
    return Stop(wanted, thread), "thread 'worker', `self.model`"


class Stop:
    def __init__(self, wanted: threading.Event, thread: threading.Thread) -> None:
        self._wanted, self._thread = wanted, [thread]

    def __call__(self) -> None:
        self._wanted.set()
        self._thread.pop().join()


def in_a_thread_local(thing: Any) -> tuple[Any, str]:
    global _module_global
    _module_global = threading.local()
    _module_global.model = thing
    return None, f"module {__name__}, `_module_global"


HIDING_PLACES: list[Callable[[Any], tuple[Any, str]]] = [
    on_instance,
    deep_in_an_instance,
    in_a_slot,
    on_a_class,
    in_a_global,
    in_a_closure,
    in_an_lru_cache,
    in_a_partial,
    in_a_generator,
    in_a_waiting_thread,
    in_a_thread_local,
]


def known(obj: object) -> str | None:
    return "Captioner node" if type(obj) is Captioner else None


@pytest.fixture(autouse=True)
def _nothing_stays() -> Any:
    global _module_global
    yield
    _module_global = Captioner.shared = None
    gc.collect()


def storages_of_before() -> set[int]:
    return set(Heap([])._storages)


@pytest.mark.parametrize("what", ["module", "tensors"])
@pytest.mark.parametrize("hide", HIDING_PLACES, ids=lambda hide: hide.__name__)
def test_a_place_is_found_and_named(
    hide: Callable[[Any], tuple[Any, str]], what: str, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A process that has run thousands of tests holds more than one look goes through.
    monkeypatch.setattr("qmove_core.model.places.MOST_VISITED", 1 << 40)
    gc.collect()
    with everything_listed():  # also tables that libraries keep
        before = storages_of_before()

    def hidden() -> tuple[Any, str]:
        if what == "module":
            return hide(nn.Linear(64, 64, device=gpu.device))
        return hide({"k": torch.zeros(4096, device=gpu.device)})

    keeper, expected = hidden()

    with everything_listed():
        heap = Heap(before)
        found = heap.modules_with_unclaimed() if what == "module" else heap.largest(4)
        assert len(found) == 1
        (place,) = places(heap, found, known)

    assert str(place).startswith(expected.rstrip("`"))
    if what == "tensors":
        assert [id(tensor) for tensor in heap.below(place.base)] == [id(found[0])]
    assert heap.visited <= places_module.MOST_VISITED + 2 * heap.size
    del found, place, heap
    if isinstance(keeper, Stop):
        keeper()


def test_a_tensor_of_code_that_runs_has_no_place(gpu: GPU) -> None:
    before = storages_of_before()
    tensor = torch.zeros(4096, device=gpu.device)

    heap = Heap(before)
    (place,) = places(heap, heap.largest(1), known)

    assert place.kind == "C"
    assert tensor.nbytes == heap.unclaimed()[gpu.device]


def test_a_tensor_that_no_python_object_holds(gpu: GPU) -> None:
    before = storages_of_before()
    parameter = torch.zeros(64, device=gpu.device, requires_grad=True)
    loss = (parameter * torch.ones(64, device=gpu.device)).sum()  # autograd saves the ones, in C++

    heap = Heap(before)
    held = {place.kind for place in places(heap, heap.largest(8), known)}

    assert loss.requires_grad
    assert held == {"C"}


def test_the_way_up_is_bounded(gpu: GPU, monkeypatch: pytest.MonkeyPatch) -> None:
    chain: Any = torch.zeros(4096, device=gpu.device)
    before = storages_of_before() - {chain.untyped_storage()._cdata}
    for _ in range(100):
        chain = Session(below=chain)

    heap = Heap(before)
    visited = heap.visited
    (place,) = places(heap, heap.largest(1), known)

    assert place.kind == "unknown"
    assert heap.visited - visited <= (places_module.MOST_LEVELS + 1) * heap.size

    monkeypatch.setattr(places_module, "MOST_VISITED", 0)
    visited = heap.visited
    (place,) = places(heap, heap.largest(1), known)
    assert (place.kind, heap.visited) == ("unknown", visited)


def test_nothing_that_was_looked_at_is_kept_alive(gpu: GPU) -> None:
    before = storages_of_before()
    model = nn.Linear(64, 64, device=gpu.device)
    keeper = Session(model=model)
    heap = Heap(before)
    assert isinstance(places(heap, heap.modules_with_unclaimed(), known)[0], Place)
    del heap, keeper, model
    assert storages_of_before() <= before


def test_children_are_part_of_the_outermost_module(gpu: GPU) -> None:
    before = storages_of_before()
    model = nn.Sequential(nn.Sequential(nn.Linear(8, 8, device=gpu.device)))
    model[0].owner = [model]  # a back-reference

    assert Heap(before).modules_with_unclaimed() == [model]


def test_modules_of_code_are_not_entered_downward(gpu: GPU) -> None:
    before = storages_of_before()
    module = types.ModuleType("pack")
    module.cache = torch.zeros(64, device=gpu.device)  # type: ignore[attr-defined]

    assert Heap(before).below({"module": module}) == []
