"""Dequantizing and requantizing: refusals and failures change nothing, and the peak of memory is
known."""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from torch import nn

import qmove_core as qmove
import simcuda
from tests.builders.device import GPU
from tests.builders.quantized_layers import WIDTH, quantized
from tests.builders.snapshots import snapshot


def full_model() -> nn.Module:
    """Quantized layers, and plain ones on the device that have to come along."""
    torch.manual_seed(0)
    return nn.Sequential(
        *quantized("int8"), nn.Linear(64, WIDTH).half().cuda(), *quantized("nf4 double")
    ).eval()


def seen(model: nn.Module) -> Any:
    return snapshot(model), [(type(module), dict(vars(module))) for module in model.modules()]


@pytest.mark.parametrize("was_parked", [False, True], ids=["resident", "parked"])
@pytest.mark.parametrize("where", ["layer", "move"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_dequantization_that_fails_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, was_parked: bool, where: str, error: type[BaseException]
) -> None:
    model = full_model()
    x = torch.ones(2, WIDTH, device="cuda", dtype=torch.float16)
    expected = model(x)
    if was_parked:
        qmove.park(model)
    before = seen(model)

    _fail_at(where, error, monkeypatch, "dequantize")
    with pytest.raises((error, qmove.QMoveError)) as raised:
        qmove.dequantize_and_move(model, "cpu", torch.float32)

    monkeypatch.undo()
    assert raised.value is _raised or raised.value.__cause__ is _raised
    assert seen(model) == before
    assert qmove.is_parked(model) is was_parked
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("where", ["layer", "move"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_requantization_that_fails_leaves_the_model_as_it_was(
    monkeypatch: pytest.MonkeyPatch, where: str, error: type[BaseException]
) -> None:
    model = qmove.dequantize_and_move(full_model(), "cpu", torch.float32)
    before = seen(model)

    _fail_at(where, error, monkeypatch, "quantize")
    with pytest.raises((error, qmove.QMoveError)):
        qmove.move_and_requantize(model, "cuda")

    monkeypatch.undo()
    assert seen(model) == before
    qmove.move_and_requantize(model, "cuda")
    assert type(model[2]) is bnb.nn.LinearNF4


_raised: BaseException | None = None


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a signal that a test may send")
def test_what_a_handler_raises_in_the_middle_of_a_layer_stays_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A time-out is no reason why the layer cannot be dequantized."""
    from qmove_core.requantize import layer_formats

    class TimeOut(Exception):
        pass

    def handle(_number: int, _frame: object) -> None:
        raise TimeOut

    dequantize = layer_formats.FourBit.dequantize

    def dequantize_in_time(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return dequantize(*args, **kwargs)

    model = full_model()
    before, handler = seen(model), signal.signal(signal.SIGUSR1, handle)
    monkeypatch.setattr(layer_formats.FourBit, "dequantize", dequantize_in_time)
    try:
        with pytest.raises(TimeOut):
            qmove.dequantize_and_move(model, "cpu")
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert seen(model) == before


def _fail_at(
    where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    global _raised
    raised = _raised = error("on purpose")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    if where == "layer":  # the last one: the first has been made already
        from qmove_core.requantize import layer_formats

        monkeypatch.setattr(layer_formats.FourBit, method, fail)
    else:  # the bytes of the plain layers have been copied
        monkeypatch.setattr("qmove_core.model.kinds.refresh", _in_the_commit(fail))


def _in_the_commit(fail: Callable[..., None]) -> Callable[..., None]:
    from qmove_core.model import kinds

    refresh, calls = kinds.refresh, []

    def refresh_or_fail(inventory: Any) -> None:
        calls.append(inventory)
        # The commit and the move in it are begun anew after the first failure; every third call
        # brings the move back.
        if len(calls) in (1, 2, 4, 5):
            fail()
        refresh(inventory)

    return refresh_or_fail


@pytest.mark.simulated
@pytest.mark.parametrize(
    "room", [0.4, 1.1], ids=["less than the result", "less than result and original"]
)
def test_too_little_room_is_said_before_the_first_byte(gpu: GPU, room: float) -> None:
    import simcuda

    model = full_model()
    result = sum(p.numel() * 4 for p in model.parameters()) + 64 * WIDTH * 4 * 2
    qmove.move(model, "cpu") if room < 1 else None
    gc.collect()
    before, held = seen(model), torch.cuda.memory_allocated()
    simcuda.set_memory(held + int(result * room / 2), device=0)
    gpu.reset_peak()

    with pytest.raises(qmove.NotEnoughMemory, match="Dequantizing Sequential to cuda:0 needs"):
        qmove.dequantize_and_move(model, "cuda", torch.float32)

    assert gpu.peak() == held - gpu.before
    assert seen(model) == before


def test_the_peak_is_the_result_and_one_layer(gpu: GPU) -> None:
    before = gpu.allocated()
    model = nn.Sequential(*[quantized("nf4 double")[0] for _ in range(16)])
    qmove.move(model, "cpu")
    assert gpu.allocated() == before
    gpu.reset_peak()

    qmove.dequantize_and_move(model, "cuda", torch.float32)

    result, layer = gpu.allocated() - before, WIDTH * 64 * 4
    assert result >= 16 * layer
    assert gpu.peak() - before <= result + 4 * layer  # bitsandbytes' own working memory among it


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda layer: _pack(layer), "packed it for AVX512-BF16"),
        (lambda layer: setattr(layer.weight, "SCB", None), r"row scales \(SCB\) are lost"),
        (
            lambda layer: setattr(
                layer, "codes", nn.Parameter(torch.ones(2, dtype=torch.int8), False)
            ),
            "knows no way",
        ),
    ],
    ids=["packed for the CPU", "scales lost", "unknown format"],
)
def test_weights_without_a_way_to_their_values_are_refused(
    spoil: Callable[[Any], None], reason: str
) -> None:
    model = full_model()
    if "packed" in reason:
        qmove.move(model, "cpu")
    spoil(model[2] if "packed" in reason else model[0])
    before = seen(model)

    with pytest.raises(qmove.CannotMove, match=reason):
        qmove.dequantize_and_move(model, "cpu")

    assert seen(model) == before


def _pack(layer: Any) -> None:
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.quant_state
    )


def test_meta_tensors_are_refused() -> None:
    model = full_model()
    model.append(bnb.nn.LinearNF4(64, 64, device="meta"))

    with pytest.raises(qmove.MetaTensorsPresent, match=r"the first is '3\.weight'"):
        qmove.dequantize_and_move(model, "cpu")

    assert type(model[0]) is bnb.nn.Linear8bitLt


@pytest.mark.simulated
@pytest.mark.parametrize("nth", range(1, 24))
def test_the_error_of_requantizing_keeps_no_vram_while_it_is_alive(gpu: GPU, nth: int) -> None:
    """So that its `except` block can make room and try again."""
    model = qmove.dequantize_and_move(full_model(), "cpu")
    gc.collect()
    before = torch.cuda.memory_allocated()
    gc.disable()
    try:
        with (
            pytest.raises(qmove.QMoveError) as raised,
            simcuda.fail("alloc", nth=nth, times=100),
        ):
            qmove.move_and_requantize(model, "cuda:0")

        assert raised.value is not None
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()
    qmove.move_and_requantize(model, "cuda:0")
