"""Whatever goes wrong with a digest, the move it was for goes on; what goes wrong with a copy is
never taken for a digest's."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.digests import choosing
from qmove_core.digests.digest_tree import FloatProducts, IntProducts
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.digests import try_out_anew
from tests.builders.mirrors import MODEL, WIDTH, mirrored, ones, round_trip
from tests.builders.models import layers
from tests.builders.snapshots import contents, snapshot

pytestmark = pytest.mark.simulated

MIB = 1 << 20


@pytest.fixture(autouse=True)
def fresh_choice() -> Iterator[None]:
    try_out_anew()
    yield
    try_out_anew()
    simcuda.set_workspaces(0)


ERRORS: dict[str, Callable[[], BaseException]] = {
    "a shape that cuBLAS lacks": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"),
    "no handle": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED, cublasCreate"),
    "not initialized": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED"),
    "out of memory": lambda: torch.OutOfMemoryError("CUDA out of memory."),
    "out of memory of the driver": lambda: torch.AcceleratorError("CUDA error: out of memory"),
    "HIP out of memory": lambda: RuntimeError("HIP out of memory"),
    "no kernel": lambda: NotImplementedError("not compiled for this device"),
    "deterministic": lambda: RuntimeError("Deterministic behavior was enabled"),
    "a host without memory": MemoryError,
    "odd": lambda: TypeError("an argument that an old release lacks"),
}
OPERATORS = ["_int_mm", "mm", "cat", "arange"]


@contextmanager
def failing(error: Callable[[], BaseException], *operators: str) -> Iterator[None]:
    with ExitStack() as all_of_them:
        for operator in operators:
            planned = simcuda.fail(f"op:{operator}", error=error(), times=10_000)
            all_of_them.enter_context(planned)
        yield


def wake(model: nn.Module) -> None:
    model(ones())


VERBS: dict[str, Callable[[nn.Module], object]] = {
    "restore": qmove.restore,
    "stream": lambda model: (qmove.restore(model, stream=True), streaming.wait_for()),
    "wake": wake,
    "swap": lambda model: qmove.swap(layers(2, width=WIDTH), model),
    "move": lambda model: qmove.move(model, "cuda"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_a_model_comes_home_whatever_fails_in_the_digests(
    gpu: GPU, error: Callable[[], BaseException], verb: Callable[[nn.Module], object]
) -> None:
    model = layers(4, width=WIDTH)
    before = contents(model)
    qmove.park(model)
    with failing(error, "_int_mm", "mm"):
        verb(model)
    assert contents(model) == before and not qmove.is_parked(model)
    round_trip(model)
    assert contents(model) == before
    assert qmove.park(model).copied_bytes == 0, "a failure is no verdict on the device"


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_a_model_is_parked_whatever_fails_in_the_digests(
    gpu: GPU, error: Callable[[], BaseException], operator: str, verify: bool
) -> None:
    model = mirrored()
    before = contents(model)
    qmove.configure(verify=verify)
    with failing(error, operator):
        parked = qmove.park(model)
        assert gpu.allocated() == 0 and contents(model) == before
        parked.restore()
    assert contents(model) == before
    qmove.configure(verify=False)
    round_trip(model)
    assert qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("error", ["a shape that cuBLAS lacks", "no handle", "out of memory"])
def test_digests_that_cannot_be_read_are_none(gpu: GPU, error: str) -> None:
    model = layers(4, width=WIDTH)
    before = contents(model)
    qmove.park(model)
    choosing.available(gpu.device)

    def refuse(notice: simcuda.CopyNotice) -> None:
        if notice.direction == "d2h":  # during a restore only digests go that way
            raise ERRORS[error]()

    for stream in (False, True):
        with simcuda.on_copy(refuse):
            qmove.restore(model, stream=stream)
            streaming.wait_for()
        assert contents(model) == before
        qmove.park(model)
        assert contents(model) == before
    qmove.restore(model)
    assert qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("rows", [17, 4097])
def test_a_shape_that_only_real_sizes_have_falls_back_to_float_products(
    gpu: GPU, rows: int
) -> None:
    model = nn.ParameterList([torch.ones(MIB * 3, device="cuda") for _ in range(2)])
    assert choosing.available(gpu.device)
    with simcuda.fail("op:_int_mm", min_rows=rows, times=1000) as fault:
        round_trip(model)
        assert fault.fired == 1, "not asked again"
        round_trip(model)
    assert choosing.products_on(gpu.device) is FloatProducts
    assert qmove.park(model).copied_bytes == 0


def test_a_shortage_in_the_first_digest_is_not_remembered(
    gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    model = layers(4, width=WIDTH)
    qmove.park(model)
    with caplog.at_level(logging.INFO, "qmove"), failing(ERRORS["no handle"], "_int_mm"):
        qmove.restore(model)
        qmove.park(model)
        qmove.restore(model)
    said = [record for record in caplog.records if "no digests on" in record.getMessage()]
    assert len(said) == 1 and "ALLOC_FAILED" in said[0].getMessage()
    qmove.park(model)
    qmove.restore(model)
    assert qmove.park(model).copied_bytes == 0
    assert choosing.products_on(gpu.device) is IntProducts


@pytest.mark.parametrize("operator", [None, "_int_mm"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tried_before", [False, True])
@pytest.mark.parametrize("nth", [1, 2, 3, 5, 8])
def test_a_copy_that_fails_late_is_never_taken_for_a_digest(
    gpu: GPU,
    monkeypatch: pytest.MonkeyPatch,
    nth: int,
    tried_before: bool,
    stream: bool,
    operator: str | None,
) -> None:
    monkeypatch.setattr("qmove_core.transfer.copies.SMALL", 0)
    model = layers(4, width=WIDTH)
    before = snapshot(model)
    qmove.park(model)
    parked = contents(model)
    if tried_before:
        choosing.available(gpu.device)
    with ExitStack() as planned, pytest.raises(torch.AcceleratorError, match="injected"):
        if operator is not None:
            planned.enter_context(failing(ERRORS["a shape that cuBLAS lacks"], operator))
        planned.enter_context(simcuda.fail("copy", nth=nth, late=True))
        qmove.restore(model, stream=stream)
        streaming.wait_for()
    assert qmove.is_parked(model) and contents(model) == parked
    qmove.restore(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("floats", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_after_a_move_nothing_of_ours_stays_on_the_device(
    gpu: GPU, stream: bool, floats: bool
) -> None:
    simcuda.set_workspaces("8MiB")
    if floats:
        choosing._failed.add((gpu.device, IntProducts))
    model, other = layers(4, width=WIDTH), layers(4, width=WIDTH)
    qmove.park(other)
    assert gpu.allocated() == MODEL
    for _ in range(3):
        qmove.park(model)
        assert gpu.allocated() == 0
        qmove.restore(model, stream=stream)
        streaming.wait_for()
        gc.collect()
        assert gpu.allocated() == MODEL
        qmove.swap(model, other)
        assert gpu.allocated() == MODEL
        model, other = other, model
    qmove.configure(verify=True)
    qmove.park(model)
    assert gpu.allocated() == 0
