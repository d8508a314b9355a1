"""`qmove.accelerate.cpu_offload_with_hook`: accelerate's signature and objects, and a hook that
parks."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload_with_hook as accelerates
from accelerate.hooks import CpuOffload, UserCpuOffloadHook
from torch import nn

import qmove_core as qmove
from qmove_core.accelerate import cpu_offload_with_hook
from tests.builders.device import GPU
from tests.builders.models import (
    inputs,
    layers,
    llama_inputs,
    quanto_layers,
    tiny_llama,
    torchao_layers,
)
from tests.builders.snapshots import contents

KINDS = ("plain", "int8", "nf4", "torchao int8", "quanto qint8")


def quantized(kind: str, folder: Path) -> tuple[nn.Module, torch.Tensor]:
    """A model on the GPU, and what it takes, on the host."""
    if kind == "plain":
        return layers(), inputs().cpu()
    if kind in ("int8", "nf4"):
        return tiny_llama(kind, folder), llama_inputs("cpu")
    library, _, quantization = kind.partition(" ")
    if library == "torchao":
        return torchao_layers(quantization), inputs(128).cpu().bfloat16()
    return quanto_layers(quantization), inputs(128).cpu()


def run(model: Any, given: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result = model(given)
    return getattr(result, "logits", result)


def test_the_signature_and_what_it_gives_are_accelerates() -> None:
    ours, theirs = inspect.signature(cpu_offload_with_hook), inspect.signature(accelerates)
    assert [(p.name, p.default) for p in ours.parameters.values()] == [
        (p.name, p.default) for p in theirs.parameters.values()
    ]
    model = nn.Linear(2, 2)
    given = cpu_offload_with_hook(model, "cuda:0")
    assert qmove.accelerate.cpu_offload_with_hook is cpu_offload_with_hook
    assert given[0] is model and type(given[1]) is UserCpuOffloadHook
    assert isinstance(model._hf_hook, CpuOffload)  # diffusers asks for that
    assert given[1].model is model and given[1].hook is model._hf_hook


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_is_parked_until_it_is_used_and_comes_back_bit_for_bit(
    kind: str, tmp_path: Path, gpu: GPU
) -> None:
    model, given = quantized(kind, tmp_path)
    want, before, there = run(model, given.cuda()), contents(model), gpu.allocated()
    model, hook = cpu_offload_with_hook(model, "cuda:0")
    assert gpu.allocated() == there - sum(map(len, before.values()))
    for _ in range(2):
        assert torch.equal(run(model, given), want), "inputs on the host are brought too"
        hook.offload()
        assert gpu.allocated() == there - sum(map(len, before.values()))
        assert contents(model) == before
    hook.remove()
    assert not hasattr(model, "_hf_hook") and qmove.is_parked(model)
    assert torch.equal(run(model, given.cuda()), want), "it wakes as any parked model does"


def chain(models: list[nn.Module]) -> list[Any]:
    hooks: list[Any] = []
    for model in models:
        hooks.append(cpu_offload_with_hook(model, "cuda:0", hooks[-1] if hooks else None)[1])
    return hooks


def test_in_a_chain_of_three_each_leaves_before_the_next_one_comes(gpu: GPU) -> None:
    width = 2112  # storages of more than 16 MiB cross the link without staging
    models: list[nn.Module] = [layers(count, width) for count in (2, 3, 1)]
    sizes = [qmove.inventory(model).nbytes for model in models]
    want = [run(model, inputs(width)) for model in models]
    gpu_before = gpu.allocated() - sum(sizes)
    hooks = chain(models)
    for _ in range(2):
        for place, model in enumerate(models):
            gpu.reset_peak()
            assert torch.equal(run(model, inputs(width).cpu()), want[place])
            assert [qmove.inventory(m).by_device.get("cuda:0", 0) for m in models] == [
                size if at == place else 0 for at, size in enumerate(sizes)
            ]
            largest = max(sizes[place], sizes[place - 1])
            assert gpu.peak() - gpu_before < largest + (4 << 20), "never two of them"
        hooks[-1].offload()
    assert gpu.allocated() == gpu_before


def test_a_loop_over_one_model_moves_it_once(gpu: GPU) -> None:
    models: list[nn.Module] = [layers(), layers(8)]
    chain(models)
    run(models[0], inputs())
    run(models[1], inputs())
    copied = qmove.stats().copied_bytes
    for _ in range(5):
        run(models[1], inputs())
    assert qmove.stats().copied_bytes == copied


def test_a_predecessor_that_was_used_again_leaves_for_one_that_is_there(gpu: GPU) -> None:
    models: list[nn.Module] = [layers(), layers(8)]
    chain(models)
    for model in (models[0], models[1], models[0]):
        run(model, inputs())
    assert [qmove.is_parked(model) for model in models] == [False, False], "as with accelerate"
    run(models[1], inputs())
    assert [qmove.is_parked(model) for model in models] == [True, False]


def test_the_second_offload_of_unchanged_weights_copies_nothing(gpu: GPU) -> None:
    model, hook = cpu_offload_with_hook(layers(), "cuda:0")
    run(model, inputs())
    hook.offload()
    run(model, inputs())
    copied = qmove.stats().copied_bytes
    hook.offload()
    assert qmove.is_parked(model) and qmove.stats().copied_bytes == copied


def test_hooks_come_off_in_any_order(gpu: GPU) -> None:
    models: list[nn.Module] = [layers(count) for count in (2, 3, 4)]
    want = [run(model, inputs()) for model in models]
    hooks = chain(models)
    hooks[1].remove()
    for model in models:
        run(model, inputs())
    assert [qmove.is_parked(model) for model in models] == [False, True, False]
    hooks[0].remove()
    hooks[2].remove()
    for model, expected in zip(models, want, strict=True):
        assert "forward" not in model.__dict__ or not hasattr(model, "_hf_hook")
        assert torch.equal(run(model, inputs()), expected)
    hooks[0].offload()  # as accelerate's: it needs no hook on the model
    assert qmove.is_parked(models[0])


def test_a_pinned_model_stays(gpu: GPU) -> None:
    models: list[nn.Module] = [layers(2), layers(3)]
    hooks = chain(models)
    run(models[0], inputs())
    qmove.pin(models[0])
    run(models[1], inputs())
    hooks[0].offload()
    assert not qmove.is_parked(models[0])
    qmove.unpin(models[0])
    hooks[0].offload()
    assert qmove.is_parked(models[0])


def test_a_chain_runs_with_gradients_too(gpu: GPU) -> None:
    models: list[nn.Module] = [layers(2).requires_grad_(), layers(3).requires_grad_()]
    want = models[1](models[0](inputs()))
    hooks = chain(models)
    got = models[1](models[0](inputs()))
    assert torch.equal(got, want) and got.requires_grad
    assert qmove.is_parked(models[0])
    hooks[1].offload()
    assert qmove.is_parked(models[1])


def test_on_the_cpu_it_stays_there(gpu: GPU) -> None:
    model = layers()
    want = run(model, inputs()).cpu()
    _model, hook = cpu_offload_with_hook(model, "cpu")
    assert next(model.parameters()).device.type == "cpu" and not qmove.is_parked(model)
    assert torch.allclose(run(model, inputs().cpu()), want)
    hook.offload()
    hook.remove()


def test_a_hook_can_be_added_twice(gpu: GPU) -> None:
    first = layers(2)
    _first, before = cpu_offload_with_hook(first, "cuda:0")
    model, one = cpu_offload_with_hook(layers(), "cuda:0")
    model, two = cpu_offload_with_hook(model, "cuda:0", before)
    run(first, inputs())
    run(model, inputs())
    assert qmove.is_parked(first) and not qmove.is_parked(model)
    one.offload()
    assert qmove.is_parked(model)
    two.remove()
    assert not hasattr(model, "_hf_hook"), "accelerate takes all hooks of a module off"
    one.remove()
    run(model, inputs())


def test_accelerates_own_hooks_can_be_in_the_chain(gpu: GPU) -> None:
    models: list[nn.Module] = [layers(2), layers(3), layers(4)]
    want = [run(model, inputs()) for model in models]
    _model, one = accelerates(models[0], "cuda:0")
    _model, two = cpu_offload_with_hook(models[1], "cuda:0", one)
    _model, three = accelerates(models[2], "cuda:0", two)
    for model, expected in zip(models, want, strict=True):
        assert torch.equal(run(model, inputs()), expected)
    assert next(models[0].parameters()).device.type == "cpu"
    assert qmove.is_parked(models[1])
    assert next(models[2].parameters()).device.type == "cuda"
    three.offload()


class Fails(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.fails = layers(), True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fails:
            raise ValueError("no")
        return self.inner(x)


def test_a_forward_that_raises_leaves_the_chain_usable(gpu: GPU) -> None:
    failing = Fails()
    models: list[nn.Module] = [layers(2), failing, layers(3)]
    want = run(failing.inner, inputs())
    hooks = chain(models)
    run(models[0], inputs())
    with pytest.raises(ValueError, match="no"):
        run(failing, inputs())
    assert qmove.is_parked(models[0])
    failing.fails = False
    assert torch.equal(run(failing, inputs()), want)
    run(models[2], inputs())
    assert qmove.is_parked(failing)
    hooks[2].offload()


@pytest.mark.simulated
def test_a_model_that_finds_no_room_stays_parked_and_comes_later(gpu: GPU) -> None:
    import simcuda

    model, _hook = cpu_offload_with_hook(layers(16, width=512), "cuda:0")
    before = contents(model)
    simcuda.set_memory("8MiB")
    with pytest.raises(qmove.NotEnoughMemory):
        run(model, torch.zeros(1, 512))
    assert qmove.is_parked(model) and contents(model) == before
    simcuda.set_memory("4GiB")
    run(model, torch.zeros(1, 512))


def test_a_model_on_the_host_goes_to_the_execution_device(gpu: GPU, second_gpu: GPU) -> None:
    model = layers(device="cpu")
    want = run(model, inputs().cpu())
    for device in ("cuda:1", 1, torch.device("cuda", 1)):
        _model, hook = cpu_offload_with_hook(model, device)
        got = run(model, inputs())
        assert got.device == torch.device("cuda:1") and torch.equal(got.cpu(), want)
        hook.offload()
        hook.remove()
    assert qmove.is_parked(model)
    _model, hook = cpu_offload_with_hook(model, "cuda:0")
    assert run(model, inputs().cpu()).device == torch.device("cuda:0"), "not its old home"


def test_a_layer_that_bitsandbytes_has_not_quantized_yet_is_quantized_there(gpu: GPU) -> None:
    import bitsandbytes as bnb

    for layer in (bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False), bnb.nn.Linear4bit(64, 64)):
        _model, hook = cpu_offload_with_hook(layer, "cuda:0")
        given = torch.ones(1, 64, dtype=torch.float16)
        want = run(layer, given)
        assert layer.weight.dtype in (torch.int8, torch.uint8)
        hook.offload()
        assert torch.equal(run(layer, given), want)


def test_a_device_that_is_not_there_is_refused_with_the_model_as_it_was(gpu: GPU) -> None:
    model = layers()
    with pytest.raises(qmove.UnknownDevice, match="cuda:7"):
        cpu_offload_with_hook(model, "cuda:7")
    assert not hasattr(model, "_hf_hook") and not qmove.is_parked(model)


PROGRAM = """
import sys
sys.modules["accelerate"] = sys.modules["diffusers"] = None
import torch
import qmove_core as qmove
for ask in (lambda: qmove.accelerate.cpu_offload_with_hook(torch.nn.Linear(2, 2)), qmove.diffusers.offload_strategy):
    try:
        ask()
    except qmove.MissingDependency as error:
        print(error)
"""


def test_where_a_library_is_missing_the_call_says_which() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.strip().splitlines()
    assert (
        "pip install accelerate" in first and "pip install 'diffusers>=0.42' accelerate" in second
    )
