"""A model that runs in less VRAM than it takes, of every kind: quantized, tied, shared, nested, used
by threads, interrupted."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.parking import rolling, rolling_units, streaming
from tests.builders.device import GPU
from tests.builders.link import copies
from tests.builders.models import (
    image_of,
    inputs,
    layers,
    llama_inputs,
    quanto_layers,
    tiny_diffusion,
    tiny_llama,
    tiny_stable_diffusion,
    torchao_layers,
)
from tests.builders.places import parked_names
from tests.builders.snapshots import contents, snapshot, traces

LAYER = 4 * (64 * 64 + 64)  # bytes of a layer of `layers`
ROOM = 3 * LAYER  # for two of them, and a share for digests


def total(model: object) -> int:
    return qmove.inventory(model).nbytes


def largest_layer(model: object) -> int:
    from qmove_core.parking import layer_order

    groups = layer_order.groups_of(qmove.inventory(model))
    return max(sum(holding.nbytes for holding in group.holdings) for group in groups)


# Kinds -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("avx512_bf16")
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
@pytest.mark.parametrize("parked", [False, True])
def test_a_quantized_llama_generates_as_before(
    gpu: GPU, precision: str, parked: bool, tmp_path: Any
) -> None:
    model = tiny_llama(precision, tmp_path)
    options = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(llama_inputs(), **options)
    before, marks = contents(model), traces(model)
    if parked:
        qmove.park(model)
    for limit in (int(1.2 * largest_layer(model)), int(0.8 * total(model))):
        with qmove.resident(model, at_most=limit):
            assert rolling._running[0]._units
            for _ in range(2):
                assert torch.equal(model.generate(llama_inputs(), **options), expected)
        assert qmove.is_parked(model) == parked
    qmove.restore(model)
    assert contents(model) == before
    assert traces(model) == marks


@pytest.mark.parametrize("kind", ["int8", "float8", "nf4"])
def test_layers_of_torchao(gpu: GPU, kind: str) -> None:
    check_layers(torchao_layers(kind), inputs(128).to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["qint8", "qint4"])
def test_layers_of_quanto(gpu: GPU, kind: str) -> None:
    check_layers(quanto_layers(kind), inputs(128))


def check_layers(model: nn.Module, x: torch.Tensor) -> None:
    expected, before = model(x), snapshot(model)
    qmove.park(model)
    with qmove.resident(model, at_most=int(1.3 * largest_layer(model))):
        for _ in range(3):
            assert torch.equal(model(x), expected)
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    "build", [tiny_diffusion, tiny_stable_diffusion], ids=lambda build: build.__name__
)
def test_a_pipeline_gives_the_same_image(gpu: GPU, build: Callable[[], Any]) -> None:
    pipe = build()
    expected = image_of(pipe)
    qmove.park(pipe)
    limit = int(max(1.3 * largest_layer(pipe), 0.3 * total(pipe)))
    with qmove.resident(pipe, at_most=limit):
        assert rolling._running[0]._units
        for _ in range(2):
            assert (image_of(pipe) == expected).all()
    assert qmove.is_parked(pipe)
    assert (image_of(pipe) == expected).all()


def test_an_attention_that_reads_the_weights_of_its_parts_past_their_forward(gpu: GPU) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 4, 128, dropout=0.0, batch_first=True, device="cuda"), 4
    ).requires_grad_(False)
    x = inputs().reshape(1, 2, 64)
    for mode in (model.eval(), model.train()):
        expected = mode(x)
        with qmove.resident(mode, at_most=int(2.5 * largest_layer(model))):
            for _ in range(2):
                assert torch.equal(mode(x), expected)


class Wrapped(nn.Module):
    """Has a weight of its own around its layers, and a table that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.rand(64, device="cuda"))
        self.layers = nn.ModuleList(nn.Linear(64, 64, device="cuda") for _ in range(6))
        self.__dict__["kept"] = {"table": torch.rand(64, device="cuda")}
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) * self.scale
        return x + self.kept["table"]


def test_a_weight_around_the_layers_and_one_that_no_module_holds_stay(gpu: GPU) -> None:
    model, x = Wrapped(), inputs()
    expected = model(x)
    with qmove.resident(model, at_most=ROOM):
        assert parked_names(model) and not {"scale"} & parked_names(model)
        for _ in range(2):
            assert torch.equal(model(x), expected)


# Tied and shared ---------------------------------------------------------------------------------


def tied(how: str) -> nn.Sequential:
    model = layers(6)
    weight = model[0].weight
    model[5].weight = weight if how == "one parameter" else nn.Parameter(weight.data.t(), False)
    return model


@pytest.mark.parametrize("how", ["one parameter", "a view"])
def test_tied_weights_stay_tied(gpu: GPU, how: str) -> None:
    model, twin, x = tied(how), tied(how), inputs()
    qmove.park(model)
    with qmove.resident(model, at_most=ROOM):
        for _ in range(2):
            assert torch.equal(model(x), twin(x))
            for net in (model, twin):
                with torch.no_grad():
                    net[5].weight.mul_(0.5)
            assert torch.equal(model(x), twin(x))
    assert torch.equal(model(x), twin(x))
    with torch._C.DisableTorchFunctionSubclass():
        first, last = (model[i].weight.untyped_storage()._cdata for i in (0, 5))
    assert first == last


def test_a_layer_that_a_model_uses_twice(gpu: GPU) -> None:
    shared = nn.Linear(64, 64, device="cuda").requires_grad_(False)
    model, x = nn.Sequential(*layers(3), shared, *layers(3), shared), inputs()
    expected = model(x)
    with qmove.resident(model, at_most=ROOM):
        for _ in range(3):
            assert torch.equal(model(x), expected)


def test_another_model_that_shares_a_layer_runs_in_between(gpu: GPU) -> None:
    model, x = layers(6), inputs()
    other = nn.Sequential(model[4], nn.Linear(64, 64, device="cuda").requires_grad_(False))
    expected = model(x), other(x)
    with qmove.resident(model, at_most=ROOM):
        for _ in range(2):
            assert torch.equal(model(x), expected[0])
            assert torch.equal(other(x), expected[1])
    assert torch.equal(other(x), expected[1])


def test_a_model_over_two_gpus_has_the_limit_on_each(gpu: GPU, second_gpu: GPU) -> None:
    class Spread(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = layers(5), layers(5, device="cuda:1")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.far(self.near(x).to("cuda:1")).to("cuda:0")

    model, x = Spread(), inputs()
    expected = model(x)
    with qmove.resident(model, at_most=ROOM):
        for _ in range(2):
            assert torch.equal(model(x), expected)
            for index in range(2):
                assert qmove.inventory(model).by_device.get(f"cuda:{index}", 0) <= 5 * LAYER
                on_device = sum(
                    h.nbytes for h in rolling._running[0]._held.holdings
                    if rolling_units.storage(h).device == torch.device("cuda", index)
                )  # fmt: skip
                assert on_device <= ROOM


# Bodies in bodies --------------------------------------------------------------------------------


def on_device(model: nn.Module) -> int:
    return total(model) - sum(
        parameter.nbytes
        for name, parameter in model.named_parameters()
        if name in parked_names(model)
    )


def test_of_bodies_inside_each_other_the_smallest_limit_holds(gpu: GPU) -> None:
    model, x = layers(8), inputs()
    expected, before = model(x), snapshot(model)
    with qmove.resident(model, at_most=6 * LAYER):
        assert torch.equal(model(x), expected)
        with qmove.resident(model, at_most=ROOM):
            assert on_device(model) <= ROOM
            assert torch.equal(model(x), expected)
            with qmove.resident(model, at_most=7 * LAYER), qmove.resident(model):
                assert torch.equal(model(x), expected)
                assert on_device(model) <= ROOM
        assert torch.equal(model(x), expected)
        assert on_device(model) <= 6 * LAYER
    assert snapshot(model) == before


def test_a_limit_inside_of_a_body_without_one(gpu: GPU) -> None:
    model, x = layers(8), inputs()
    expected, before = model(x), snapshot(model)
    qmove.park(model)
    with qmove.resident(model):
        with qmove.resident(model, at_most=ROOM):
            assert on_device(model) <= ROOM
            assert torch.equal(model(x), expected)
        assert not parked_names(model)
    assert qmove.is_parked(model)
    qmove.restore(model)
    assert snapshot(model) == before


def test_a_part_of_a_model_in_a_body_of_its_own(gpu: GPU) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layers(4), layers(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model, x = Halves(), inputs()
    expected = model(x)
    with qmove.resident(model, at_most=6 * LAYER):
        with qmove.resident(model.second, at_most=ROOM):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), expected)
    with (
        qmove.resident(model.second, at_most=ROOM),
        pytest.raises(qmove.CannotMove, match="a part of it runs in a body"),
        qmove.resident(model, at_most=ROOM),
    ):
        pass
    assert torch.equal(model(x), expected)
    assert rolling._running == []


# What the body does itself -----------------------------------------------------------------------


def test_a_park_and_a_restore_inside_of_the_body(gpu: GPU) -> None:
    model, x = layers(8), inputs()
    expected, before = model(x), snapshot(model)
    with qmove.resident(model, at_most=ROOM):
        model(x)
        qmove.park(model)
        assert len(parked_names(model)) == 16
        assert torch.equal(model(x), expected)
        assert on_device(model) <= ROOM
        qmove.restore(model)
        assert not parked_names(model)
        assert torch.equal(model(x), expected)
        qmove.prefetch(model)
        qmove.park(model, free=LAYER)
        assert torch.equal(model(x), expected)
    assert snapshot(model) == before


def test_weights_that_are_replaced_inside_of_the_body(gpu: GPU) -> None:
    model, twin, x = layers(6), layers(6), inputs()
    with qmove.resident(model, at_most=ROOM):
        model(x)
        for net in (model, twin):
            net[2].weight = nn.Parameter(torch.ones(64, 64, device="cuda"), requires_grad=False)
            net[5] = nn.Linear(64, 64, device="cuda").requires_grad_(False)
        twin[5].load_state_dict(model[5].state_dict())
        for _ in range(2):
            assert torch.equal(model(x), twin(x))
    assert torch.equal(model(x), twin(x))


def test_a_forward_that_records_a_graph_for_its_weights_is_refused_in_the_middle(gpu: GPU) -> None:
    model, x = layers(6).requires_grad_(True), inputs()
    with torch.no_grad():
        expected = model(x)
    with qmove.resident(model, at_most=ROOM):
        with pytest.raises(qmove.LiveAutogradGraph, match="no_grad"):
            model(x)
        with torch.no_grad():
            assert torch.equal(model(x), expected)


@pytest.mark.usefixtures("compiling")
def test_a_compiled_model_is_refused(gpu: GPU) -> None:
    model = layers(6)
    model[2].compile(backend="eager")
    before = snapshot(model)
    with (
        pytest.raises(qmove.CannotMove, match="it is compiled"),
        qmove.resident(model, at_most=ROOM),
    ):
        pass
    assert snapshot(model) == before and rolling._running == []


def test_a_pinned_layer_stays(gpu: GPU) -> None:
    model, x = layers(6), inputs()
    expected = model(x)
    qmove.pin(model[5])
    with qmove.resident(model, at_most=4 * LAYER):
        for _ in range(2):
            assert torch.equal(model(x), expected)
            assert not {"5.weight", "5.bias"} & parked_names(model)
    qmove.unpin(model[5])


@pytest.mark.parametrize("option", ["keep_mirrors", "verify"])
def test_settings(gpu: GPU, option: str) -> None:
    qmove.configure(**{option: option == "verify"})
    model, x = layers(6), inputs()
    expected, before = model(x), snapshot(model)
    with qmove.resident(model, at_most=ROOM):
        for _ in range(3):
            assert torch.equal(model(x), expected)
    assert snapshot(model) == before


@pytest.mark.simulated
def test_without_mirrors_nothing_unchanged_goes_back_out_either(gpu: GPU) -> None:
    qmove.configure(keep_mirrors=False)
    model, x = layers(8, width=512), inputs(512)
    model_bytes = total(model)
    qmove.park(model)
    with qmove.resident(model, at_most=model_bytes // 2):
        model(x)
        with copies() as seen:
            model(x)
        assert sum(c.nbytes for c in seen if c.direction == "d2h") < model_bytes // 16


# Failures, interrupts, threads -------------------------------------------------------------------


@pytest.mark.simulated
@pytest.mark.parametrize("nth", range(1, 14, 2))
@pytest.mark.parametrize("late", [False, True])
def test_a_copy_that_fails_in_a_forward_leaves_every_byte(gpu: GPU, nth: int, late: bool) -> None:
    model, x = layers(6), inputs()
    expected, before = model(x), snapshot(model)
    qmove.park(model)
    with qmove.resident(model, at_most=ROOM):
        with simcuda.fail("copy", nth=nth, late=late):
            for _ in range(2):
                try:
                    model(x)
                except RuntimeError as error:
                    assert "injected" in str(error) or "unknown error" in str(error)
        assert torch.equal(model(x), expected)
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("layer", range(6))
def test_ctrl_c_in_the_middle_of_a_forward(gpu: GPU, layer: int) -> None:
    model, x = layers(6), inputs()
    expected, before = model(x), snapshot(model)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), qmove.resident(model, at_most=ROOM):
        model(x)
        hook = model[layer].register_forward_hook(interrupt)
        try:
            model(x)
        finally:
            hook.remove()
            assert torch.equal(model(x), expected)
    assert snapshot(model) == before


def test_two_threads_run_it_at_once(gpu: GPU) -> None:
    model, x = layers(6), inputs()
    expected = model(x)
    wrong: list[object] = []

    def run() -> None:
        try:
            for _ in range(10):
                if not torch.equal(model(x), expected):
                    wrong.append("another result")
        except BaseException as error:
            wrong.append(error)

    with qmove.resident(model, at_most=ROOM):
        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
    assert torch.equal(model(x), expected)


def test_another_thread_cannot_park_it_and_may_have_a_body_of_its_own(gpu: GPU) -> None:
    model, x = layers(6), inputs()
    expected, before = model(x), snapshot(model)
    caught: list[object] = []

    def other() -> None:
        with pytest.raises(qmove.InUse) as error:
            qmove.park(model)
        caught.append(error.value)
        with qmove.resident(model, at_most=4 * LAYER):
            caught.append(torch.equal(model(x), expected))

    with qmove.resident(model, at_most=ROOM):
        model(x)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert caught[1:] == [True]
        assert torch.equal(model(x), expected)
    assert snapshot(model) == before

    def limited() -> None:
        with pytest.raises(qmove.InUse), qmove.resident(model, at_most=ROOM):
            pass
        caught.append("refused")

    with qmove.resident(model):
        thread = threading.Thread(target=limited)
        thread.start()
        thread.join()
    assert caught[-1] == "refused"


# Random sequences against a twin that never moves --------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_random_sequences_are_as_for_a_twin_at_home(gpu: GPU, seed: int) -> None:
    rng = random.Random(seed)
    model, twin, x = layers(6), layers(6), inputs()
    bodies: list[Any] = []

    def begin() -> None:
        at_most = rng.choice([ROOM, 4 * LAYER, 5 * LAYER, None])
        body = qmove.resident(model, at_most=at_most)
        body.__enter__()
        bodies.append(body)

    def end() -> None:
        if bodies:
            bodies.pop().__exit__(None, None, None)

    def change() -> None:
        index, factor = rng.randrange(6), rng.random()
        for net in (model, twin):
            with torch.no_grad():
                net[index].weight.data.mul_(factor)

    def use_some() -> None:
        chosen = [rng.randrange(6) for _ in range(3)]
        given = [x, x]
        for index in chosen:
            given = [model[index](given[0]), twin[index](given[1])]
        assert torch.equal(*given)

    calls = [
        begin, begin, end, change, use_some,
        lambda: qmove.park(model), lambda: qmove.park(model, free=rng.randrange(5 * LAYER)),
        lambda: qmove.restore(model), lambda: qmove.prefetch(model), lambda: qmove.park(model[3]),
    ]  # fmt: skip
    for _ in range(25):
        rng.choice(calls)()
        if rng.random() < 0.6:
            assert torch.equal(model(x), twin(x))
    while bodies:
        end()
    assert torch.equal(model(x), twin(x))
    streaming.wait_for()
    qmove.restore(model)
    assert contents(model) == contents(twin)
