"""`qmove.diffusers.offload_strategy` with diffusers' own ComponentsManager: exact, nothing left
behind, and what is used again last leaves first."""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.diffusers import offload_strategy
from qmove_core.offload_hooks import diffusers_hooks
from qmove_core.offload_hooks.use_order import UseOrder
from tests.builders.components import NAMES, component, given, modular_pipeline
from tests.builders.device import GPU
from tests.builders.models import image_of, tiny_stable_diffusion
from tests.builders.snapshots import contents

diffusers = pytest.importorskip("diffusers")

KINDS = ("plain", "int8", "nf4", "torchao", "quanto")
ONLY_ONE = "4GiB"  # as a margin on a device of 4 GiB: never room for two
ALL = 0  # as a margin: room for all


def run(model: nn.Module, device: str = "cpu") -> torch.Tensor:
    with torch.no_grad():
        return model(given(model, device))


def on_gpu(*models: nn.Module) -> list[bool]:
    return [qmove.inventory(model).by_device.get("cuda:0", 0) > 0 for model in models]


def managed(
    *models: nn.Module, margin: int | str = ONLY_ONE, order: tuple[str, ...] = ()
) -> tuple[Any, list[str]]:
    """A manager with these models, and the ids it gave them."""
    manager = diffusers.ComponentsManager()
    ids = [manager.add(name, m) for name, m in zip((*NAMES, *"abcd"), models, strict=False)]
    manager.enable_auto_cpu_offload("cuda:0", offload_strategy=offload_strategy(margin, order))
    return manager, ids


def test_it_is_found_both_ways() -> None:
    assert qmove.diffusers.offload_strategy is offload_strategy


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_component_leaves_nothing_and_is_exact(kind: str, gpu: GPU) -> None:
    models = [component(kind, 2), component("plain", 3)]
    want = [run(model, "cuda:0").cpu() for model in models]
    if kind == "int8":  # a first forward moves the weights into the layers' states
        models[0] = component(kind, 2)
    before = contents(models[0])
    nbytes = sum(qmove.inventory(model).nbytes for model in models)
    there = gpu.allocated() - nbytes
    manager, _ids = managed(*models)
    assert gpu.allocated() == there, "as soon as it is enabled"
    for _ in range(3):
        for model, expected in zip(models, want, strict=True):
            assert torch.equal(run(model).cpu(), expected)
        assert on_gpu(*models) == [False, True]
    manager.disable_auto_cpu_offload()
    assert gpu.allocated() == there
    assert sorted(contents(models[0]).values()) == sorted(before.values())


def test_diffusers_own_strategy_leaves_an_int8_component_behind(gpu: GPU) -> None:
    """What this strategy is for; should it fail one day, diffusers has mended it."""
    manager = diffusers.ComponentsManager()
    model = component("int8")
    manager.add("unet", model)
    run(model, "cuda:0")
    manager.enable_auto_cpu_offload("cuda:0")
    assert on_gpu(model) == [True]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_stable_diffusion("cpu").save_pretrained(folder)
    return folder


def quantized_by_diffusers(kind: str) -> Any:
    both = {"components_to_quantize": ["unet", "text_encoder"]}
    if kind == "int8":
        options = {"quant_backend": "bitsandbytes_8bit", "quant_kwargs": {"load_in_8bit": True}}
        return diffusers.PipelineQuantizationConfig(**options, **both)
    if kind == "nf4":
        how = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
        options = {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": how}
        return diffusers.PipelineQuantizationConfig(**options, **both)
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        unet = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    else:
        unet = diffusers.QuantoConfig(weights_dtype="int8")
    return diffusers.PipelineQuantizationConfig(quant_mapping={"unet": unet})


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ("int8", "nf4", "torchao", "quanto"))
def test_a_pipeline_that_diffusers_has_quantized_gives_the_same_image(
    kind: str, saved: Path, gpu: GPU
) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        saved, quantization_config=quantized_by_diffusers(kind), torch_dtype=torch.float32
    )
    pipe.set_progress_bar_config(disable=True)
    models = {n: c for n, c in pipe.components.items() if isinstance(c, nn.Module)}
    for model in models.values():
        if not any(on_gpu(model)):
            model.to("cuda:0")
    want = image_of(pipe)
    manager = diffusers.ComponentsManager()
    for name, model in models.items():
        manager.add(name, model)
    manager.enable_auto_cpu_offload("cuda:0", offload_strategy=offload_strategy(ONLY_ONE))
    assert not any(on_gpu(*models.values()))
    for _ in range(2):
        assert (image_of(pipe) == want).all()
        assert sum(on_gpu(*models.values())) == 1
    manager.disable_auto_cpu_offload()
    assert not any(on_gpu(*models.values()))


@pytest.mark.parametrize("kind", ("plain", "int8", "nf4"))
def test_a_modular_pipeline_gives_what_it_gives_without(kind: str, gpu: GPU) -> None:
    models = {name: component(kind, blocks) for blocks, name in enumerate(NAMES, 2)}
    x = torch.linspace(-1, 1, 256).reshape(2, 128)
    with torch.no_grad():
        want = x
        for name, steps in zip(NAMES, (1, 3, 1), strict=True):
            for _ in range(steps):
                want = models[name](want.to("cuda:0", given(models[name]).dtype))
    manager = diffusers.ComponentsManager()
    pipe = modular_pipeline(manager, models)
    manager.enable_auto_cpu_offload("cuda:0", offload_strategy=offload_strategy(ONLY_ONE))
    assert not any(on_gpu(*models.values()))
    for _ in range(2):
        assert torch.equal(pipe(x=x, output="x"), want)
        assert on_gpu(*models.values()) == [False, False, True]
    assert pipe._execution_device == torch.device("cuda:0")


def test_where_all_fit_nothing_leaves(gpu: GPU) -> None:
    models = [component(blocks=blocks) for blocks in (2, 3, 4)]
    managed(*models, margin=ALL)
    for model in models:
        run(model)
    assert on_gpu(*models) == [True] * 3
    copied = qmove.stats().copied_bytes
    for model in models:
        run(model)
    assert qmove.stats().copied_bytes == copied


def room_for(models: list[nn.Module], count: int) -> int:
    """A margin that leaves room for so many of equal models."""
    from qmove_core.devices import free_memory

    free = free_memory(torch.device("cuda:0"))
    assert free is not None
    on_device = sum(qmove.inventory(model).by_device.get("cuda:0", 0) for model in models)
    nbytes = qmove.inventory(models[0]).nbytes
    return free + on_device - count * nbytes - nbytes // 2


def equal_models(count: int = 3) -> list[nn.Module]:
    return [component(blocks=2) for _ in range(count)]


def test_the_farthest_next_use_leaves_first_once_the_order_was_seen(gpu: GPU) -> None:
    text, unet, vae = models = equal_models()
    managed(*models, margin=room_for(models, 2))
    for model in (text, unet, vae):
        run(model)
    assert on_gpu(text, unet, vae) == [False, True, True], "not known yet: the longest unused"
    run(text)
    assert on_gpu(text, unet, vae) == [True, True, False], "the unet is next, the vae after it"
    run(unet)
    run(vae)
    assert on_gpu(text, unet, vae) == [True, False, True], "text is next"


def test_an_order_that_was_given_holds_from_the_first_run_on(gpu: GPU) -> None:
    text, unet, vae = models = equal_models()
    managed(
        *models, margin=room_for(models, 2), order=("text_encoder", "unet", "text_encoder", "vae")
    )
    run(text)
    run(unet)
    run(text)
    run(vae)
    assert on_gpu(text, unet, vae) == [True, False, True], "text comes before the unet"


def test_no_more_leaves_than_is_lacking(gpu: GPU) -> None:
    small, large, coming = component(blocks=1), component(blocks=6), component(blocks=4)
    models: list[nn.Module] = [small, large, coming]
    manager, _ids = managed(*models, margin=ALL)
    run(small)
    run(large)
    from qmove_core.devices import free_memory

    free = free_memory(torch.device("cuda:0"))
    assert free is not None
    lacking = qmove.inventory(large).nbytes // 2
    margin = free - qmove.inventory(coming).nbytes + lacking
    manager.set_offload_strategy(offload_strategy(margin))
    run(coming)
    assert on_gpu(small, large, coming) == [True, False, True], "the small one alone is not enough"


def test_added_and_removed_components_keep_the_strategy(gpu: GPU) -> None:
    first, second, third = component("int8"), component("nf4", 3), component("torchao", 2)
    manager, ids = managed(first, second)
    strategy = manager._offload_strategy
    run(first)
    there = gpu.allocated()
    added = manager.add("vae", third)
    assert manager._offload_strategy is strategy
    assert not any(on_gpu(first, second, third)), "no byte of an int8 one is left either"
    assert gpu.allocated() < there
    for model in (first, second, third):
        run(model)
    assert on_gpu(first, second, third) == [False, False, True]
    manager.remove(ids[0])
    assert manager._offload_strategy is strategy
    assert not any(on_gpu(first, second, third)) and not hasattr(first, "_hf_hook")
    run(second)
    run(third)
    assert on_gpu(first, second, third) == [False, False, True]
    manager.remove(added)
    del third, model
    gc.collect()
    assert len(qmove.parked_models()) == 2, "what nobody has any more takes no RAM"


def test_after_disabling_the_models_are_parked_and_wake_by_themselves(gpu: GPU) -> None:
    models = equal_models()
    manager, _ids = managed(*models)
    want = [run(model) for model in models]
    manager.disable_auto_cpu_offload()
    assert not any(on_gpu(*models)) and not any(hasattr(m, "_hf_hook") for m in models)
    for model, expected in zip(models, want, strict=True):
        assert torch.equal(run(model, "cuda:0"), expected)
    assert on_gpu(*models) == [True] * 3, "nothing leaves for them any more"


def test_enabling_anew_without_it_and_other_strategies_are_diffusers_own(gpu: GPU) -> None:
    model = component()
    manager, _ids = managed(model)
    run(model)
    manager.disable_auto_cpu_offload()
    manager.enable_auto_cpu_offload("cuda:0")
    assert isinstance(
        manager._offload_strategy, diffusers_hooks.ComponentsManager.__init__.__globals__["AutoOffloadStrategy"]
    )  # fmt: skip
    assert next(model.parameters()).device.type == "cpu" and not qmove.is_parked(model)
    run(model)
    assert on_gpu(model) == [True]


def test_it_can_take_over_from_diffusers_own_and_hand_back(gpu: GPU) -> None:
    models = equal_models()
    manager = diffusers.ComponentsManager()
    for name, model in zip(NAMES, models, strict=True):
        manager.add(name, model)
    manager.enable_auto_cpu_offload("cuda:0", memory_reserve_margin="4GiB")
    own = manager._offload_strategy
    want = [run(model) for model in models]
    manager.set_offload_strategy(offload_strategy(ONLY_ONE))
    for model, expected in zip(models, want, strict=True):
        assert torch.equal(run(model), expected)
    assert qmove.is_parked(models[1])
    manager.set_offload_strategy(own)
    for model, expected in zip(models, want, strict=True):
        assert torch.equal(run(model), expected)


def test_a_forward_that_raises_leaves_everything_usable(gpu: GPU) -> None:
    models = equal_models(2)
    managed(*models)
    want = run(models[1])
    with pytest.raises(RuntimeError), torch.no_grad():
        models[0](torch.zeros(1, 7))
    assert on_gpu(*models) == [True, False]
    assert torch.equal(run(models[1]), want)
    assert on_gpu(*models) == [False, True]


@pytest.mark.simulated
def test_one_that_finds_no_room_even_alone_stays_parked(gpu: GPU) -> None:
    import simcuda

    small, large = component(blocks=1), component(blocks=160)
    managed(small, large)
    run(small)
    before = contents(large)
    simcuda.set_memory("8MiB")
    with pytest.raises(qmove.NotEnoughMemory):
        run(large)
    assert qmove.is_parked(large) and contents(large) == before
    simcuda.set_memory("4GiB")
    run(large)
    assert on_gpu(small, large) == [False, True]


def test_a_pinned_component_stays_and_another_one_leaves_for_it(gpu: GPU) -> None:
    text, unet, vae = models = equal_models()
    managed(*models, margin=room_for(models, 2))
    run(text)
    run(unet)
    qmove.pin(text)
    run(vae)
    assert on_gpu(text, unet, vae) == [True, False, True], "the longest unused is pinned"
    qmove.unpin(text)


def test_a_submodule_that_is_used_makes_room_for_its_component(gpu: GPU) -> None:
    models = equal_models(2)
    managed(*models)
    run(models[0])
    run(models[1])
    with torch.no_grad():
        models[0].blocks[0](given(models[0], "cuda:0"))
    assert on_gpu(*models) == [True, False]


def test_several_strategies_and_managers_do_not_meet(gpu: GPU, second_gpu: GPU) -> None:
    here, there = equal_models(2), equal_models(2)
    managed(*here)
    other = diffusers.ComponentsManager()
    for name, model in zip(NAMES, there, strict=False):
        other.add(name, model)
    other.enable_auto_cpu_offload("cuda:1", offload_strategy=offload_strategy(ONLY_ONE))
    for model in (*here, *there):
        run(model)
    assert on_gpu(*here) == [False, True]
    devices = [set(qmove.inventory(model).by_device) for model in there]
    assert devices == [{"cpu"}, {"cuda:1"}]


def test_other_hooks_of_diffusers_work_as_before(
    gpu: GPU, caplog: pytest.LogCaptureFixture
) -> None:
    """Its methods ask qmove's strategy only."""
    offload_strategy()
    model = component()
    manager = diffusers.ComponentsManager()
    manager.add("unet", model)
    with caplog.at_level(logging.INFO, "qmove"):
        manager.enable_auto_cpu_offload("cuda:0")
        run(model)
    assert not [record for record in caplog.records if record.name == "qmove"]
    assert next(model.parameters()).device == torch.device("cuda:0")


def test_a_group_offloaded_component_places_itself(gpu: GPU) -> None:
    plain, grouped = component(), component(blocks=3)
    want = run(grouped, "cuda:0")
    grouped.enable_group_offload(
        onload_device=torch.device("cuda:0"), offload_type="block_level", num_blocks_per_group=1
    )
    managed(plain, grouped)
    run(plain)
    assert torch.equal(run(grouped), want)
    assert not qmove.is_parked(grouped)


def test_bad_arguments_are_refused() -> None:
    for margin in ("3 bananas", -1, "GB"):
        with pytest.raises(ValueError):
            offload_strategy(margin)
    with pytest.raises(ValueError, match=r"\['unet'\]"):
        offload_strategy(order="unet")


def test_an_older_diffusers_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def enable_auto_cpu_offload(
        self: Any, device: Any = None, memory_reserve_margin: str = "3GB"
    ) -> None:
        raise AssertionError

    monkeypatch.setattr(
        diffusers.ComponentsManager, "enable_auto_cpu_offload", enable_auto_cpu_offload
    )
    with pytest.raises(qmove.MissingDependency, match=r"diffusers, .* takes no offload_strategy"):
        offload_strategy()


def test_as_a_plain_callable_it_chooses_among_hooks(gpu: GPU) -> None:
    """As diffusers calls a strategy."""
    models = equal_models()
    hooks = [SimpleNamespace(model_id=f"m_{i}", model=model) for i, model in enumerate(models)]
    incoming = component(device="cpu")
    device = torch.device("cuda:0")
    keep_one = offload_strategy(room_for(models, 2))
    assert (
        len(keep_one(hooks=hooks, model_id="new_1", model=incoming, execution_device=device)) == 2
    )
    assert offload_strategy(ALL)(hooks, "new_1", incoming, device) == []
    assert offload_strategy(ONLY_ONE)([], "new_1", incoming, device) == []


def test_the_order_of_uses_is_learned() -> None:
    order = UseOrder()
    for name in "abbca":
        order.note(name)
    assert order.uses_until() == {"b": 0, "c": 1, "a": 2}
    order.note("c")  # it was never c after a: what followed the last c
    assert order.uses_until() == {"a": 0, "c": 1}
    repeating = UseOrder("xyxz" * 3)
    repeating.note("x")
    assert repeating.uses_until()["y"] < repeating.uses_until()["z"], "before it came a z"
    repeating.note("y")
    repeating.note("x")
    assert repeating.uses_until()["z"] < repeating.uses_until()["y"], "before it came a y"
    assert UseOrder().uses_until() == {} and UseOrder().last_use("a") == -1
