"""A random history of three models that share storages, beside twins that never move."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
from collections.abc import Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.models import inputs, layers

LAYERS = 3
steps = 0  # of all histories of this process


class Interrupted(Exception):
    """What the caller's own code raises in the middle."""


def family() -> list[nn.Sequential]:
    """Three models on the GPU. The first two have one Parameter in common, the last two have
    Parameters over one storage, and all of them have weights of their own."""
    models = [layers(LAYERS), layers(LAYERS), layers(LAYERS)]
    for number, model in enumerate(models):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(number / 8)
    models[1][0].weight = models[0][0].weight
    models[2][1].weight = nn.Parameter(models[1][1].weight.data, requires_grad=False)
    return models


which = st.integers(0, 2)
layer = st.integers(0, LAYERS - 1)


class History(RuleBasedStateMachine):
    """Each rule does the same to a model and to its twin; only the models are moved."""

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self.base = torch.cuda.memory_allocated()
        self.models, self.twins = family(), family()
        self.open: list[contextlib.ExitStack] = []  # bodies of `resident` and `parked`
        self.has_limit = False  # one of them has, or had, a limit

    @contextlib.contextmanager
    def _a_limit_may_refuse_it(self) -> Iterator[None]:
        """A part of a model that runs within a limit comes and goes with that model only."""
        try:
            yield
        except qmove.CannotMove as error:
            if not (self.has_limit and "resident(at_most=" in str(error)):
                raise

    # Moves ----------------------------------------------------------------------------------------

    @rule(number=which)
    def park(self, number: int) -> None:
        qmove.park(self.models[number])

    @rule(number=which, stream=st.booleans())
    def restore(self, number: int, stream: bool) -> None:
        qmove.restore(self.models[number], stream=stream)

    @rule(number=which)
    def prefetch(self, number: int) -> None:
        qmove.prefetch(self.models[number])

    @rule(number=which)
    def prepare(self, number: int) -> None:
        qmove.prepare(self.models[number])

    @rule(leaving=which, coming=which)
    def swap(self, leaving: int, coming: int) -> None:
        if leaving != coming:
            qmove.swap(self.models[leaving], self.models[coming])

    @rule(number=which, at=layer)
    def parked_meanwhile(self, number: int, at: int) -> None:
        with qmove.parked(self.models[number]):
            self.read(number, at)

    @rule(number=which)
    def resident_meanwhile(self, number: int) -> None:
        with self._a_limit_may_refuse_it(), qmove.resident(self.models[number]):
            self.compute(number)

    @rule(number=which, home=st.booleans())
    def begin_a_body(self, number: int, home: bool) -> None:
        body = contextlib.ExitStack()
        around = qmove.resident if home else qmove.parked
        with self._a_limit_may_refuse_it():
            body.enter_context(around(self.models[number]))
        self.open.append(body)

    @rule(number=which, percent=st.integers(20, 100))
    def begin_a_body_with_a_limit(self, number: int, percent: int) -> None:
        body = contextlib.ExitStack()
        limit = qmove.inventory(self.models[number]).nbytes * percent // 100
        self.has_limit = True
        with self._a_limit_may_refuse_it(), contextlib.suppress(qmove.NotEnoughMemory):
            body.enter_context(qmove.resident(self.models[number], at_most=limit))
        self.open.append(body)

    @rule(at=st.integers(0, 9))
    def end_a_body(self, at: int) -> None:
        if self.open:
            self.open.pop(at % len(self.open)).close()

    @rule(number=which)
    def park_on_disk(self, number: int) -> None:
        qmove.park(self.models[number], to="disk")

    @rule(number=which, nbytes=st.integers(0, 40_000))
    def free_some(self, number: int, nbytes: int) -> None:
        qmove.park(self.models[number], free=nbytes)

    @rule(numbers=st.sets(which, min_size=1))
    def park_together(self, numbers: set[int]) -> None:
        qmove.park([self.models[number] for number in sorted(numbers)])

    @rule(number=which, at=layer)
    def park_a_part(self, number: int, at: int) -> None:
        qmove.park(self.models[number][at])

    @rule(number=which, parks=st.booleans(), after=st.integers(0, 3))
    def a_move_that_its_caller_stops(self, number: int, parks: bool, after: int) -> None:
        calls = 0

        def stop(_done: int, _total: int) -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise Interrupted

        move = qmove.park if parks else qmove.restore
        with contextlib.suppress(Interrupted):
            move(self.models[number], progress=stop)

    # Memory ---------------------------------------------------------------------------------------

    @rule(keep=st.booleans(), verify=st.booleans())
    def configure(self, keep: bool, verify: bool) -> None:
        qmove.configure(keep_mirrors=keep, verify=verify)

    @rule()
    def trim(self) -> None:
        qmove.trim()

    @rule()
    def collect(self) -> None:
        gc.collect()

    @rule()
    def look(self) -> None:
        stats = qmove.stats()
        assert stats.parked_models == len(qmove.parked_models())
        # A weight stays parked after its model has died, where another model has it, too.
        assert stats.parked_models == 0 or sum(stats.parked_bytes.values())

    # Use ------------------------------------------------------------------------------------------

    @rule(number=which)
    def compute(self, number: int) -> None:
        assert torch.equal(self.models[number](inputs()), self.twins[number](inputs()))

    @rule(number=which, at=layer)
    def compute_with_a_part(self, number: int, at: int) -> None:
        model, twin = self.models[number][at], self.twins[number][at]
        assert torch.equal(model(inputs()), twin(inputs()))

    @rule(number=which, at=layer)
    def read(self, number: int, at: int) -> None:
        assert torch.equal(
            self.models[number][at].weight.cpu(), self.twins[number][at].weight.cpu()
        )

    @rule(number=which)
    def a_forward_that_fails(self, number: int) -> None:
        def fail(*_arguments: object) -> None:
            raise Interrupted

        hook = self.models[number][1].register_forward_hook(fail)
        try:
            self.models[number](inputs())
        except Interrupted:
            pass
        finally:
            hook.remove()

    # Changes --------------------------------------------------------------------------------------

    @rule(number=which, at=layer, through_data=st.booleans())
    def write(self, number: int, at: int, through_data: bool) -> None:
        for models in (self.models, self.twins):
            weight = models[number][at].weight
            with torch.no_grad():
                (weight.data if through_data else weight).mul_(0.75)

    @rule(number=which, at=layer)
    def write_one_element(self, number: int, at: int) -> None:
        for models in (self.models, self.twins):
            with torch.no_grad():
                models[number][at].bias[3] = 7.0

    @rule(number=which, at=layer)
    def load(self, number: int, at: int) -> None:
        for models in (self.models, self.twins):
            fresh = {"weight": torch.full((64, 64), 0.01), "bias": torch.arange(64.0)}
            models[number][at].load_state_dict(fresh)

    @rule(number=which, at=layer)
    def replace(self, number: int, at: int) -> None:
        for models in (self.models, self.twins):
            fresh = torch.full((64,), 0.5, device="cuda")
            models[number][at].bias = nn.Parameter(fresh, requires_grad=False)

    @rule(number=which)
    def delete(self, number: int) -> None:
        fresh = layers(LAYERS)
        self.models[number], self.twins[number] = fresh, copy.deepcopy(fresh)

    # Copies ---------------------------------------------------------------------------------------

    @rule(number=which)
    def deepcopy(self, number: int) -> None:
        self._is_as_its_twin(copy.deepcopy(self.models[number]), number)

    @rule(number=which)
    def save(self, number: int) -> None:
        file = io.BytesIO()
        torch.save(self.models[number].state_dict(), file)
        file.seek(0)
        for name, value in torch.load(file).items():
            assert torch.equal(value.cpu(), self.twins[number].state_dict()[name].cpu()), name

    @rule(number=which)
    def go_on_with_a_copy(self, number: int) -> None:
        self.models[number] = copy.deepcopy(self.models[number])
        self.twins[number] = copy.deepcopy(self.twins[number])
        qmove.restore(self.models[number])
        for tensor in self.models[number].parameters():
            tensor.data = tensor.data.cuda()

    # What holds -----------------------------------------------------------------------------------

    @invariant()
    def count(self) -> None:
        global steps
        steps += 1

    @rule()
    def everything_is_right(self) -> None:
        for number, model in enumerate(self.models):
            self._is_as_its_twin(model, number)

    def _is_as_its_twin(self, model: nn.Module, number: int) -> None:
        expected = self.twins[number].state_dict()
        found = {name: value.cpu() for name, value in model.state_dict().items()}
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name].cpu()), name

    def _ties(self, models: list[Any]) -> list[tuple[int, str, int, str]]:
        """Which weights of which models lie in one storage."""
        seen: dict[int, tuple[int, str]] = {}
        ties = []
        for number, model in enumerate(models):
            for name, parameter in model.named_parameters():
                place = parameter.untyped_storage().data_ptr()
                if place in seen:
                    ties.append((*seen[place], number, name))
                seen.setdefault(place, (number, name))
        return ties

    def teardown(self) -> None:
        try:
            while self.open:
                self.open.pop().close()
            for number in range(3):
                self.compute(number)
                qmove.restore(self.models[number])
            streaming.wait_for()
            self.everything_is_right()
            assert self._ties(self.models) == self._ties(self.twins)
            assert qmove.parked_models() == []
            gc.collect()
            here = torch.cuda.memory_allocated() - self.base
            self.models.clear()
            gc.collect()
            left = torch.cuda.memory_allocated() - self.base
            assert here == 2 * left, "the models take as much as their twins"
            self.twins.clear()
            gc.collect()
            assert torch.cuda.memory_allocated() == self.base
        finally:
            qmove.configure(keep_mirrors=True, verify=False)
