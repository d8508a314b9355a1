"""Every operation that faults are tried in: what comes before it, what it does, and whether it can
be done twice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.arena import wait_until_prepared
from tests.builders.file_mirrors import saved
from tests.builders.models import layers
from tests.faults.builders.subjects import Subject


@dataclass(frozen=True)
class Operation:
    """One operation.

    Attributes:
        act: the operation.
        before: brings the model into the state that it begins with.
        needs: tags of the models it is for; none for all.
        not_for: tags of the models it is not for.
        home: brings the model to where it computes, after the operation.
        between: does a part of it, after which it may stay: a third state that is whole.
        atomic: one step: what raises an error has done nothing.
        saves_ram: parked, it takes no RAM of its own, unless a fault lets it have a copy.
        repeatable: doing it once more changes nothing, and raises nothing.
    """

    act: Callable[[Subject], object]
    before: Callable[[Subject], object] = lambda subject: None
    needs: frozenset[str] = frozenset()
    not_for: frozenset[str] = frozenset()
    home: Callable[[Subject], object] = lambda subject: qmove.restore(subject.model)
    between: Callable[[Subject], object] | None = None
    atomic: bool = True
    saves_ram: bool = False
    repeatable: bool = True

    def is_for(self, tags: frozenset[str]) -> bool:
        return self.needs <= tags and not self.not_for & tags


def _park(s: Subject) -> None:
    qmove.park(s.model)


def _round_trip(s: Subject) -> None:
    qmove.park(s.model)
    qmove.restore(s.model)


def _changed_round_trip(s: Subject) -> None:
    _round_trip(s)
    with torch.no_grad():
        s.model[-1].bias.mul_(2)


def _stream(s: Subject) -> None:
    qmove.restore(s.model, stream=True)
    s.forward()
    streaming.wait_for()


def _wake(s: Subject) -> None:
    s.forward()
    streaming.wait_for()


def _prefetch(s: Subject) -> None:
    qmove.prefetch(s.model)
    streaming.wait_for()


def _prepare(s: Subject) -> None:
    qmove.prepare(s.model)
    wait_until_prepared()


def _with_another_parked(s: Subject) -> None:
    other = layers(2)
    qmove.park(other)
    s.beside.append(other)


def _with_its_like_parked(s: Subject) -> None:
    qmove.configure(share_from=1)
    other = copy.deepcopy(s.model)
    qmove.park(other)
    s.beside.append(other)


def _with_its_like_mirrored(s: Subject) -> None:
    _with_its_like_parked(s)
    qmove.restore(s.beside[-1])


def _both_parked(s: Subject) -> None:
    _with_its_like_parked(s)
    _park(s)


def _swap(s: Subject) -> None:
    qmove.swap(s.model, s.beside[-1])


def _parked_inside(s: Subject) -> None:
    with qmove.parked(s.model):
        pass


def _resident_inside(s: Subject) -> None:
    with qmove.resident(s.model):
        pass


def _materialized_inside(s: Subject) -> None:
    with qmove.materialized(s.model):
        pass


def _save(s: Subject) -> None:
    saved(s.model, s.folder)


def _mirror_files(s: Subject) -> None:
    qmove.mirror_files(s.model, s.folder / "model.safetensors")


def _saved_and_mirrored(s: Subject) -> None:
    _save(s)
    _mirror_files(s)


def _park_on_disk(s: Subject) -> None:
    qmove.park(s.model, to="disk", folder=s.folder / "kept")


def _attach(s: Subject) -> None:
    """The same weights, in a model that was home with others."""
    qmove.attach(s.model, s.folder / "kept")


def _on_disk_and_home(s: Subject) -> None:
    _park_on_disk(s)
    qmove.restore(s.model)


def _on_the_cpu(s: Subject) -> None:
    qmove.move(s.model, "cpu")


def _dequantize(s: Subject) -> None:
    qmove.dequantize_and_move(s.model, "cpu", torch.float32)


def _requantize(s: Subject) -> None:
    qmove.move_and_requantize(s.model, "cuda:0")


def _move_home(s: Subject) -> None:
    qmove.move(s.model, "cuda:0")


def _tags(words: str) -> frozenset[str]:
    return frozenset(words.split())


DISPATCHED, FILE, QUANTIZED = _tags("dispatched"), _tags("file"), _tags("quantized")
OPERATIONS: dict[str, Operation] = {
    "park": Operation(_park),
    "park again": Operation(_park, _round_trip),
    "park again, changed": Operation(_park, _changed_round_trip, _tags("sequence")),
    "park what another has parked": Operation(
        _park, _with_its_like_parked, not_for=_tags("dispatched shares"), saves_ram=True
    ),
    "park what another mirrors": Operation(
        _park, _with_its_like_mirrored, not_for=_tags("dispatched shares"), saves_ram=True
    ),
    "restore what is shared": Operation(
        lambda s: qmove.restore(s.model), _both_parked, not_for=_tags("dispatched shares")
    ),
    "park on disk": Operation(_park_on_disk, not_for=_tags("dispatched"), saves_ram=True),
    "park on disk from RAM": Operation(
        _park_on_disk, _park, not_for=_tags("dispatched"), between=_park
    ),
    "restore from disk": Operation(
        lambda s: qmove.restore(s.model), _park_on_disk, not_for=_tags("dispatched")
    ),
    "attach": Operation(
        _attach, _on_disk_and_home, not_for=_tags("dispatched shares"), repeatable=False
    ),
    "park in files": Operation(_park, _saved_and_mirrored, FILE, saves_ram=True),
    "restore": Operation(lambda s: qmove.restore(s.model), _park),
    "restore from files": Operation(
        lambda s: qmove.restore(s.model), lambda s: (_saved_and_mirrored(s), _park(s)), FILE
    ),
    "restore elsewhere": Operation(
        lambda s: qmove.restore(s.model, "cuda:1"),
        _park,
        not_for=_tags("dispatched shares"),
        home=_move_home,
    ),
    "streaming restore": Operation(_stream, _park, not_for=DISPATCHED, atomic=False),
    "wake": Operation(_wake, _park, not_for=DISPATCHED, atomic=False),
    "prefetch": Operation(_prefetch, _park, atomic=False),
    "prepare": Operation(_prepare),
    "move out": Operation(_on_the_cpu, not_for=DISPATCHED, home=_move_home),
    "move back": Operation(_move_home, _on_the_cpu, not_for=DISPATCHED),
    "swap": Operation(_swap, _with_another_parked, between=_park),
    "parked": Operation(_parked_inside, between=_park, atomic=False),
    "resident": Operation(
        _resident_inside, _park, between=lambda s: qmove.restore(s.model), atomic=False
    ),
    "trim": Operation(lambda s: qmove.trim(), _round_trip),
    "mirror_files": Operation(_mirror_files, _save, FILE),
    "materialize": Operation(
        lambda s: qmove.materialize_meta_tensors(s.model), needs=DISPATCHED, home=_move_home
    ),
    "materialize on a GPU": Operation(
        lambda s: qmove.materialize_meta_tensors(s.model, "cuda:0"), needs=DISPATCHED
    ),
    "materialized": Operation(_materialized_inside, needs=DISPATCHED, atomic=False),
    "dequantize": Operation(_dequantize, needs=QUANTIZED, home=_requantize),
    "requantize": Operation(_requantize, _dequantize, needs=QUANTIZED, repeatable=False),
}
