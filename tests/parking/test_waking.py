"""A parked model wakes when it is used, gives the very results of a resident one, and then carries
no trace of its sleep."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
import simcuda
from qmove_core.memory import arena
from tests.builders.device import GPU
from tests.builders.models import (
    image_of,
    inputs,
    layers,
    llama_inputs,
    tiny_diffusion,
    tiny_llama,
    tiny_stable_diffusion,
)
from tests.builders.places import places
from tests.builders.snapshots import snapshot, traces


def places_and_bytes(model: nn.Module) -> dict[str, tuple[str, bytes]]:
    """Device and bytes of every storage, not the tensors: a forward of bitsandbytes replaces empty
    ones."""
    return {name: content[:2] for name, content in snapshot(model).items()}


# With the libraries people use -------------------------------------------------------------------


@pytest.mark.usefixtures("avx512_bf16")
@pytest.mark.parametrize("precision", ["fp16", "int8", "nf4"])
def test_generate_on_a_parked_llama(gpu: GPU, precision: str, tmp_path) -> None:  # type: ignore[no-untyped-def]
    model = tiny_llama(precision, tmp_path)
    options = {"max_new_tokens": 6, "do_sample": False}
    expected = model.generate(llama_inputs(model.device), **options)
    before, places_before = traces(model), places_and_bytes(model)

    parked = qmove.park(model)
    assert parked.nbytes > 0
    assert model.device == gpu.device
    assert places(model) == {"cpu"}
    result = model.generate(llama_inputs(model.device), **options)

    assert torch.equal(result, expected)
    assert not qmove.is_parked(model)
    assert traces(model) == before
    assert places_and_bytes(model) == places_before


@pytest.mark.parametrize(
    "build", [tiny_diffusion, tiny_stable_diffusion], ids=lambda build: build.__name__
)
def test_a_parked_pipeline_gives_the_very_image_of_a_resident_one(
    gpu: GPU, build: Callable[[], Any]
) -> None:
    pipe = build()
    expected = image_of(pipe)
    modules = [
        component for component in pipe.components.values() if isinstance(component, nn.Module)
    ]
    before, resident = [traces(module) for module in modules], gpu.allocated()

    parked = qmove.park(pipe)
    assert gpu.allocated() == resident - parked.nbytes
    assert parked.nbytes >= sum(
        tensor.nbytes for module in modules for tensor in module.state_dict().values()
    )
    assert pipe.device == pipe._execution_device == gpu.device
    assert {module.device for module in modules} == {gpu.device}

    assert (image_of(pipe) == expected).all()
    assert not qmove.is_parked(pipe)
    assert gpu.allocated() == resident
    assert [traces(module) for module in modules] == before


def test_a_part_of_a_pipeline_that_is_used_wakes_alone(gpu: GPU) -> None:
    empty = gpu.allocated()
    pipe = tiny_stable_diffusion()
    latents = torch.ones(1, 4, 8, 8, device="cuda")
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample.cpu()
        qmove.park(pipe)
        assert torch.equal(pipe.vae.decode(latents).sample.cpu(), expected)
    assert (places(pipe.vae), places(pipe.unet), places(pipe.text_encoder)) == (
        {"cuda"}, {"cpu"}, {"cpu"}
    )  # fmt: skip
    assert gpu.allocated() == empty + latents.nbytes + qmove.inventory(pipe.vae).nbytes


# What counts as use ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model(inputs()),
        lambda model: model.forward(inputs()),
        lambda model: model[3](model[2](model[1](model[0](inputs())))),
        lambda model: model[3].forward(model[2](model[1](model[0].forward(inputs())))),
    ],
    ids=["call", "forward", "call of the submodules", "forward of a submodule"],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_call_wakes_the_whole_model(
    gpu: GPU, use: Callable[[nn.Module], torch.Tensor], mode: Any
) -> None:
    model = layers(4)
    with mode():
        expected = use(model)
        before, traces_before = snapshot(model), traces(model)

        qmove.park(model)
        result = use(model)

    assert torch.equal(result, expected)
    assert not qmove.is_parked(model)
    assert snapshot(model) == before
    assert traces(model) == traces_before


def test_the_first_call_of_one_submodule_brings_all_of_them_home(gpu: GPU) -> None:
    model = layers(4)
    qmove.park(model)

    model[2](inputs())

    assert {parameter.device for parameter in model.parameters()} == {gpu.device}


def test_a_forward_that_somebody_put_on_the_module_itself_wakes_it_too(gpu: GPU) -> None:
    model = layers(1)
    forward = model[0].forward
    model[0].forward = lambda x: forward(x) + 1
    expected, before = model[0](inputs()), traces(model)

    for use in (lambda: model[0](inputs()), lambda: model[0].forward(inputs())):
        qmove.park(model)
        assert torch.equal(use(), expected)
        assert not qmove.is_parked(model)
        assert traces(model) == before


def test_a_forward_that_is_set_while_the_model_is_parked_stays(gpu: GPU) -> None:
    model = layers(1)
    qmove.park(model)

    model[0].forward = lambda x: x + 1

    assert torch.equal(model(inputs()), inputs() + 1)
    assert torch.equal(model[0].forward(inputs()), inputs() + 1)
    del model[0].forward
    assert "forward" not in vars(model[0])


def test_two_threads_call_a_parked_model_at_once(gpu: GPU) -> None:
    model = layers(8)
    expected = model(inputs())
    together = threading.Barrier(2)
    results: list[Any] = [None, None]

    def call(index: int) -> None:
        together.wait()
        try:
            results[index] = model(inputs())
        except Exception as error:
            results[index] = error

    for _ in range(10):
        qmove.park(model)
        threads = [threading.Thread(target=call, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(torch.equal(result, expected) for result in results), results
        assert not qmove.is_parked(model)


def test_a_module_that_was_taken_out_of_a_parked_model_wakes_by_itself(gpu: GPU) -> None:
    model = layers(2)
    expected = model[1](inputs())
    qmove.park(model)
    head, model[1] = model[1], nn.Identity()

    assert torch.equal(head(inputs()), expected)
    assert head.weight.device == model[0].weight.device == gpu.device


def test_a_module_outlives_the_pipeline_it_was_parked_with(gpu: GPU) -> None:
    pipe = tiny_diffusion()
    unet, sample = pipe.unet, torch.ones(1, 3, 8, 8, device="cuda")
    with torch.no_grad():
        expected = unet(sample, 1).sample
        qmove.park(pipe)
        del pipe
        gc.collect()
        assert torch.equal(unet(sample, 1).sample, expected)


def test_a_wake_that_finds_no_room_says_so_and_works_when_there_is(gpu: GPU) -> None:
    if not simcuda.is_active():
        pytest.skip("needs the simulated GPU's memory limit")
    model = layers(4)
    expected, before = model(inputs()), snapshot(model)
    x = inputs()
    qmove.park(model)
    parked = snapshot(model)
    simcuda.set_memory(gpu.allocated() + 1000)

    with pytest.raises(qmove.NotEnoughMemory, match="Restoring Sequential needs"):
        model(x)

    assert qmove.is_parked(model)
    assert snapshot(model) == parked
    simcuda.set_memory("4GiB")
    assert torch.equal(model(x), expected)
    assert snapshot(model) == before


# Forgotten while parked --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        layers,
        lambda: {"a": layers()},
        lambda: torch.fx.symbolic_trace(layers()),
        lambda: [torch.ones(9, device="cuda")],
    ],
    ids=["module", "dict", "GraphModule", "list of tensors"],
)
def test_a_parked_model_that_is_deleted_leaves_nothing(gpu: GPU, build: Callable[[], Any]) -> None:
    empty = gpu.allocated()
    model = build()
    qmove.park(model)
    assert arena.bytes_in_use() > 0
    assert len(qmove.parked_models()) == 1

    del model
    gc.collect()

    assert arena.bytes_in_use() == 0
    assert qmove.parked_models() == []
    assert gpu.allocated() == empty


# A part and the whole ----------------------------------------------------------------------------


def test_a_part_is_parked_and_then_the_whole(gpu: GPU) -> None:
    empty = gpu.allocated()
    pipe = tiny_stable_diffusion()
    before, nbytes = snapshot(pipe), gpu.allocated() - empty

    first = qmove.park(pipe.unet)
    assert gpu.allocated() == empty + nbytes - first.nbytes
    second = qmove.park(pipe)
    assert first.nbytes + second.nbytes == nbytes
    assert gpu.allocated() == empty

    qmove.restore(pipe)
    assert snapshot(pipe) == before
    assert qmove.parked_models() == []


def test_a_part_of_what_is_parked_comes_home_alone(gpu: GPU) -> None:
    empty = gpu.allocated()
    pipe = tiny_stable_diffusion()
    before = snapshot(pipe)
    qmove.park(pipe)

    qmove.restore(pipe.unet)

    assert not qmove.is_parked(pipe.unet)
    assert qmove.is_parked(pipe.vae)
    assert qmove.is_parked(pipe)
    assert gpu.allocated() == empty + sum(parameter.nbytes for parameter in pipe.unet.parameters())
    with torch.no_grad():
        pipe.vae.decode(torch.ones(1, 4, 8, 8, device="cuda"))
    assert places(pipe.text_encoder) == {"cpu"}
    qmove.restore(pipe)
    assert snapshot(pipe) == before


def test_a_part_that_was_parked_on_its_own_wakes_alone(gpu: GPU) -> None:
    model = layers(2)
    qmove.park(model[0])
    qmove.park(model)

    model[0](inputs())
    assert (places(model[0]), places(model[1])) == ({"cuda"}, {"cpu"})

    model(inputs())
    assert places(model[1]) == {"cuda"}
