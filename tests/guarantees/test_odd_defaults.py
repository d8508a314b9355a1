"""What PyTorch is set to, for a thread or the whole process, changes nothing in what qmove does."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.digests import try_out_anew
from tests.builders.dispatched_models import ON_DISK, dispatched, state, tower
from tests.builders.file_mirrors import saved
from tests.builders.models import layers
from tests.builders.quantized_layers import LAYERS, quantized
from tests.builders.snapshots import contents, snapshot

Odd = Callable[[], AbstractContextManager[object]]


@contextmanager
def switched(switch: Callable[[Any], object], on: Any, off: Any) -> Iterator[None]:
    switch(on)
    try:
        yield
    finally:
        switch(off)


@contextmanager
def warnings_as_errors() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextmanager
def both(*contexts: AbstractContextManager[object]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


@contextmanager
def in_another_thread(odd: Odd) -> Iterator[None]:
    """Another thread is inside of `odd` for as long as the body runs."""
    inside, done = threading.Event(), threading.Event()

    def be_odd() -> None:
        with odd():
            inside.set()
            done.wait()

    thread = threading.Thread(target=be_odd)
    thread.start()
    try:
        assert inside.wait(60)
        yield
    finally:
        done.set()
        thread.join()


class _NoFunction(TorchFunctionMode):
    def __torch_function__(self, func: Any, *_arguments: Any) -> Any:
        raise AssertionError(f"{func} was seen by a mode of the user")


class _NoOperator(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, *_arguments: Any) -> Any:
        raise AssertionError(f"{func} was seen by a mode of the user")


def fake_tensors() -> AbstractContextManager[object]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


def init_empty_weights() -> AbstractContextManager[object]:
    import accelerate

    return accelerate.init_empty_weights(include_buffers=True)  # type: ignore[no-any-return]


@contextmanager
def transform() -> Iterator[None]:
    from torch._C._functorch import _grad_decrement_nesting, _grad_increment_nesting

    _grad_increment_nesting()
    try:
        yield
    finally:
        _grad_decrement_nesting()


@contextmanager
def filled() -> Iterator[None]:
    with switched(torch.use_deterministic_algorithms, True, False):
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        yield


def no_saving(_tensor: torch.Tensor) -> object:
    raise AssertionError("something was saved for a backward")


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[object]:
    return switched(torch.set_default_dtype, dtype, torch.float32)


ODD: dict[str, Odd] = {
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "device context": lambda: torch.device("cuda"),
    "meta device context": lambda: torch.device("meta"),
    "default device": lambda: switched(torch.set_default_device, "meta", None),
    "deterministic": filled,
    "inference mode": lambda: torch.inference_mode(),
    "no gradients": lambda: torch.no_grad(),
    "anomaly mode": lambda: torch.autograd.detect_anomaly(check_nan=False),
    "autocast": lambda: both(
        torch.autocast("cuda", torch.float16), torch.autocast("cpu", torch.bfloat16)
    ),
    "warnings as errors": warnings_as_errors,
    "function mode": _NoFunction,
    "two function modes": lambda: both(torch.device("meta"), _NoFunction(), _NoFunction()),
    "dispatch mode": _NoOperator,
    "fake tensors": fake_tensors,
    "fake tensors and a function mode": lambda: both(fake_tensors(), _NoFunction()),
    "init_empty_weights": init_empty_weights,
    "functorch transform": transform,
    "saved tensor hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        no_saving, lambda held: held
    ),
    "profiler": lambda: torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True, profile_memory=True
    ),
    "none": nullcontext,
    "another thread: bfloat16": lambda: in_another_thread(lambda: default_dtype(torch.bfloat16)),
    "another thread: init_empty_weights": lambda: in_another_thread(init_empty_weights),
    "another thread: fake tensors": lambda: in_another_thread(fake_tensors),
    "another thread: default device": lambda: in_another_thread(
        lambda: switched(torch.set_default_device, "meta", None)
    ),
    "another thread: inference mode": lambda: in_another_thread(lambda: torch.inference_mode()),
}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Anomaly Detection"),
    pytest.mark.filterwarnings("ignore:.*profiler"),
]


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest) -> Iterator[Odd]:
    """A setting of PyTorch, in which no seed changes. What a device can do is found out under it."""

    @contextmanager
    def setting() -> Iterator[None]:
        seeds = torch.random.get_rng_state(), torch.cuda.get_rng_state()
        with ODD[request.param]():
            yield
        assert torch.equal(torch.random.get_rng_state(), seeds[0])
        assert torch.equal(torch.cuda.get_rng_state(), seeds[1])

    try_out_anew()
    yield setting
    try_out_anew()


def test_a_round_trip_is_exact_and_the_second_park_copies_nothing(gpu: GPU, odd: Odd) -> None:
    model: nn.Module = layers(3, width=256)
    before = snapshot(model)

    with odd():
        first = qmove.park(model)
        assert qmove.is_parked(model) and qmove.parked_models() == [model]
        assert qmove.restore(model).nbytes == first.nbytes
        second = qmove.park(model)
        qmove.restore(model, stream=True)

    assert (first.stragglers, second.stragglers) == ([], [])
    assert first.copied_bytes == first.nbytes
    assert second.copied_bytes == 0
    x = torch.ones(1, 256, device=gpu.device)
    model(x)
    qmove.restore(model)
    assert snapshot(model) == before


def test_a_model_moves_and_its_bytes_are_proved(gpu: GPU, odd: Odd) -> None:
    model = layers(3, width=256)
    before = snapshot(model)
    qmove.configure(verify=True)
    try:
        with odd():
            assert qmove.park(model).restore().verified
            moved = qmove.move(model, "cpu"), qmove.move(model, gpu.device)
            with qmove.parked(model):
                inside = qmove.inventory(model).by_device
            with qmove.resident(model):
                pass
    finally:
        qmove.configure(verify=False)
    assert inside.keys() == {"cpu"}
    assert [figures.nbytes for figures in moved] == [qmove.inventory(model).nbytes] * 2
    assert snapshot(model) == before


def test_two_models_swap_and_one_is_fetched_ahead(gpu: GPU, odd: Odd) -> None:
    one, other = layers(3, width=256), layers(3, width=256)
    before = snapshot(one), snapshot(other)
    qmove.park(other)
    with odd():
        qmove.swap(one, other)
        qmove.swap(other, one)
        qmove.prepare(one)
        assert qmove.prefetch(other) is not None
        qmove.trim()
    other(torch.ones(1, 256, device=gpu.device))
    qmove.restore(other)
    assert (snapshot(one), snapshot(other)) == before


def test_a_model_wakes_when_it_is_used(gpu: GPU, odd: Odd, request: Any) -> None:
    """Where a forward on the device is possible at all under the setting."""
    name = request.node.callspec.params["odd"]
    if any(word in name for word in ("fake tensors", "mode")) and (
        "another thread" not in name and name not in ("inference mode", "anomaly mode")
    ):
        pytest.skip("a forward is not computed there")
    model = layers(3, width=256).requires_grad_(False)
    x = torch.ones(1, 256, device=gpu.device)
    before = snapshot(model)
    with odd():
        expected = model(x)
        qmove.park(model)
        result = model(x)
    assert torch.equal(result, expected) and result.dtype == expected.dtype
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("source", ["dat", "safetensors"])
def test_a_dispatched_model_gets_its_data(gpu: GPU, odd: Odd, tmp_path: Path, source: str) -> None:
    truth = state(tower())
    model = dispatched(tmp_path, ON_DISK, source)
    with odd():
        with qmove.materialized(model):
            inside = not qmove.inventory(model).meta
        again = len(qmove.inventory(model).meta)
        qmove.materialize_meta_tensors(model, gpu.device)
    assert inside and again
    content = state(model)
    assert all(torch.equal(content[name].cpu(), truth[name]) for name in truth)
    assert {name: t.dtype for name, t in content.items()} == {n: t.dtype for n, t in truth.items()}


@pytest.mark.parametrize("kind", ["int8", "nf4 double"])
def test_weights_are_dequantized_and_quantized_again(gpu: GPU, odd: Odd, kind: str) -> None:
    assert kind in LAYERS
    reference, model = quantized(kind), quantized(kind)
    plain = contents(qmove.dequantize_and_move(reference, "cpu"))
    again = contents(qmove.move_and_requantize(reference, gpu.device))
    with odd():
        qmove.dequantize_and_move(model, "cpu")
        inside = contents_of(model)
        qmove.move_and_requantize(model, gpu.device)
    assert inside == plain
    assert contents(model) == again


def contents_of(model: nn.Module) -> dict[str, bytes]:
    """`contents`, under whatever is set."""
    result: dict[str, bytes] = {}
    thread = threading.Thread(target=lambda: result.update(contents(model)))
    thread.start()
    thread.join()
    return result


def test_files_become_mirrors(gpu: GPU, odd: Odd, tmp_path: Path) -> None:
    model = layers(3, width=256)
    file = saved(model, tmp_path)
    before = snapshot(model)
    with odd():
        mirrored = qmove.mirror_files(model, file)
        copied = qmove.park(model).copied_bytes
        qmove.restore(model)
    assert mirrored == qmove.inventory(model).nbytes and copied == 0
    assert snapshot(model) == before


def traced_by_jit(function: Any, x: torch.Tensor) -> Any:
    made = torch.jit.trace(function, x, check_trace=False)
    assert "copy_" not in str(made.graph) and "set_" not in str(made.graph)
    return made


def traced_by_fx(function: Any, x: torch.Tensor) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    made = make_fx(function)(x)
    assert "copy_" not in made.code and "set_" not in made.code
    return made


def compiled(function: Any, x: torch.Tensor) -> Any:
    made = torch.compile(function, backend="eager")
    made(x)
    return made


@pytest.mark.parametrize("trace", [traced_by_jit, traced_by_fx, compiled])
@pytest.mark.filterwarnings("ignore")
def test_moves_inside_of_what_is_traced_are_made_and_not_recorded(
    gpu: GPU, tmp_path: Path, trace: Callable[[Any, torch.Tensor], Any]
) -> None:
    model, other, quant = layers(3, width=256), layers(3, width=256), quantized("nf4 double")
    offloaded = dispatched(tmp_path, ON_DISK, "safetensors")
    truth, codes = state(tower()), contents(quantized("nf4 double"))
    before = snapshot(model), snapshot(other)
    calls = []

    def function(x: torch.Tensor) -> torch.Tensor:
        qmove.park(model).restore()
        qmove.park(other)
        qmove.swap(model, other)
        qmove.restore(model)
        qmove.move(model, "cpu")
        qmove.move(model, "cuda:0")
        qmove.park(model)
        qmove.restore(model, stream=True)
        qmove.materialize_meta_tensors(offloaded)
        qmove.dequantize_and_move(quant, "cpu")
        qmove.move_and_requantize(quant, "cuda:0")
        calls.append(1)
        return x + 1

    x = torch.ones(2, device=gpu.device)
    assert torch.equal(trace(function, x)(x), x + 1)
    assert calls
    qmove.restore(model)
    assert (snapshot(model), snapshot(other)) == before
    content = state(offloaded)
    assert all(torch.equal(content[name].cpu(), truth[name]) for name in truth)
    assert contents(quant).keys() == codes.keys()
