"""The parked models. A record holds its model weakly, so that being parked keeps nothing alive."""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from .. import homes
from .weakly import Weakly, ids_of

_numbers = itertools.count()
_living: weakref.WeakSet[Record] = weakref.WeakSet()


class Record:
    """A parked model. It lives as long as anything of it is parked, or a module of it is asleep.

    Attributes:
        wake: brings home the model, or the tensors, that it is given; with `stream=True` they may
            arrive while they are used.
    """

    def __init__(self, model: object, extra: Iterable[object], wake: Callable[..., object]) -> None:
        self.wake = wake
        self._model, self._extra = Weakly(model), [Weakly(root) for root in extra]
        self._number = next(_numbers)

    def register(self) -> None:
        """Lets `record_of` find it. Called when the model is parked."""
        _living.add(self)

    @property
    def model(self) -> Any:
        """The model, or None if it is gone.

        A model that allows no weak reference (a dict, a list) is given as a new dict of what is
        left of its contents, under the names that they have in an inventory.
        """
        return self._model()

    @property
    def extra(self) -> list[object]:
        """The objects that were parked with the model, as far as they are still alive."""
        return [root for ref in self._extra if (root := ref()) is not None]

    def is_for(self, model: object) -> bool:
        """Whether this object was parked: for a container, whether it holds all that is left."""
        return self._model.is_for(model)


def records() -> list[Record]:
    """One record for each model of which anything is parked, the longest parked first."""
    found = {id(origin.record): origin.record for origin in homes.parked_origins()}
    return [r for r in found.values() if isinstance(r, Record) and r.model is not None]


def parked_models() -> list[Any]:
    """The model of each record, the longest parked first, no model twice."""
    models = [model for record in records() if (model := record.model) is not None]
    return list({ids_of(model): model for model in models}.values())


def parked_bytes() -> dict[str, int]:
    """Bytes parked now, by the device they came from."""
    totals: dict[str, int] = defaultdict(int)
    for origin in homes.parked_origins():
        totals[str(origin.home)] += origin.nbytes
    return dict(totals)


def record_of(model: object) -> Record | None:
    """The newest record of exactly this object."""
    return max(
        (record for record in _living if record.is_for(model)),
        key=lambda record: record._number,
        default=None,
    )
