"""The private names of accelerate, diffusers and bitsandbytes that qmove uses, as they are today.

A release that renames one of them would otherwise pass unnoticed: qmove asks for most of them where
they may be absent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import hooks
from accelerate.utils import OffloadedWeightsLoader, PrefixedDataset
from torch import nn

from qmove_core.integrations import accelerate_dispatch, diffusers_offload
from qmove_core.model.kinds import bitsandbytes_layout
from tests.builders.device import GPU
from tests.builders.dispatched_models import ON_DISK, dispatched


def test_accelerate_keeps_a_hook_and_the_forward_it_wraps_on_the_module() -> None:
    layer = nn.Linear(2, 2)
    own, before = layer.forward, set(layer.__dict__)
    first, second = hooks.ModelHook(), hooks.ModelHook()
    hooks.add_hook_to_module(layer, first)
    assert set(layer.__dict__) - before == {"_hf_hook", "_old_forward", "forward"}
    assert layer._hf_hook is first and layer._old_forward == own

    hooks.add_hook_to_module(layer, second, append=True)
    assert type(layer._hf_hook) is hooks.SequentialHook
    assert list(layer._hf_hook.hooks) == [first, second]


def test_accelerate_replaces_the_forward_of_a_graph_modules_class() -> None:
    graph = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2)))
    own = type(graph).forward
    hooks.add_hook_to_module(graph, hooks.ModelHook())
    assert "GraphModuleImpl" in str(type(graph))
    assert type(graph).forward is not own and "forward" not in graph.__dict__


def test_accelerate_guards_the_root_of_a_dispatch(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    assert "hf_device_map" in model.__dict__
    for name in ("to", "cuda"):
        assert name in accelerate_dispatch._GUARDED
        assert model.__dict__[name].__globals__["__name__"] == "accelerate.big_modeling"


def test_accelerates_dispatch_hook_says_what_it_keeps_and_where(tmp_path: Path, gpu: GPU) -> None:
    model = dispatched(tmp_path, ON_DISK)
    hook = next(h for h in accelerate_dispatch.hooks_of(model.blocks[1].linear) if h.offload)
    assert type(hook) is hooks.AlignDevicesHook
    names = {
        "offload", "offload_buffers", "place_submodules", "execution_device", "skip_keys",
        "weights_map", "tied_params_map", "tied_params_names",
    }  # fmt: skip
    assert names <= hook.__dict__.keys()
    assert type(hook.weights_map) is PrefixedDataset
    assert isinstance(hook.weights_map.prefix, str)
    loader: Any = hook.weights_map.dataset
    while type(loader) is PrefixedDataset:
        loader = loader.dataset
    assert type(loader) is OffloadedWeightsLoader
    assert {"state_dict", "index", "save_folder"} <= loader.__dict__.keys()
    assert isinstance(hooks.CpuOffload(), hooks.ModelHook)


def test_diffusers_keeps_a_chain_of_hooks_on_the_module() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    class Replaces(ModelHook):
        def new_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self.fn_ref.original_forward(*args, **kwargs)

    layer = nn.Linear(2, 2)
    own = layer.forward
    registry = HookRegistry.check_if_exists_or_initialize(layer)
    registry.register_hook(Replaces(), "inner")
    wrapped = layer.forward
    registry.register_hook(ModelHook(), "outer")

    assert layer.__dict__["_diffusers_hook"] is registry and "forward" in layer.__dict__
    assert list(registry.hooks) == registry._hook_order == ["inner", "outer"]
    inner, outer = registry._fn_refs
    assert inner.original_forward == own and "forward" in inner.__dict__
    assert (outer.original_forward, outer.forward) == (None, wrapped)


def test_diffusers_group_offload_has_the_names_that_are_taken_off(tmp_path: Path, gpu: GPU) -> None:
    from diffusers.hooks import apply_group_offloading, group_offloading

    names = ("_GROUP_OFFLOADING", "_LAYER_EXECUTION_TRACKER", "_LAZY_PREFETCH_GROUP_OFFLOADING")
    assert tuple(getattr(group_offloading, name) for name in names) == diffusers_offload._HOOKS

    model = nn.Sequential(nn.Linear(2, 2)).requires_grad_(False)
    apply_group_offloading(
        model, torch.device("cuda:0"), offload_type="leaf_level", offload_to_disk_path=str(tmp_path)
    )
    hook = model[0]._diffusers_hook.hooks["group_offloading"]
    names_of_a_group = {
        "offload_to_disk_path", "_is_offloaded_to_disk", "onload_device", "offload_device",
        "key_to_tensor", "safetensors_file_path", "cpu_param_dict",
    }  # fmt: skip
    assert names_of_a_group <= hook.group.__dict__.keys()
    assert Path(hook.group.safetensors_file_path).is_file()
    assert all(isinstance(key, str) for key in hook.group.key_to_tensor)


def test_diffusers_pipelines_note_their_offload_hooks() -> None:
    import diffusers
    from diffusers.modular_pipelines.components_manager import CustomOffloadHook

    assert CustomOffloadHook.__name__ == "CustomOffloadHook"
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            sample_size=8, layers_per_block=1, block_out_channels=(32,), norm_num_groups=8,
            down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
        ),
        diffusers.DDPMScheduler(),
    )  # fmt: skip
    pipe.enable_model_cpu_offload(device="cuda:0")
    assert pipe._all_hooks and "_all_hooks" in pipe.__dict__
    assert all(accelerate_dispatch.is_dispatch_hook(hook.hook) for hook in pipe._all_hooks)


@pytest.mark.parametrize("quant_type", bitsandbytes_layout.QUANT_TYPES)
def test_bitsandbytes_keeps_and_saves_a_4_bit_weight_as_it_did(quant_type: str, gpu: GPU) -> None:
    import bitsandbytes as bnb
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, name2qmap

    layer = bnb.nn.Linear4bit(64, 64, quant_type=quant_type, bias=False).half().cuda()
    assert "support_avx512bf16_for_cpu" in layer.__dict__ and isinstance(name2qmap, dict)
    assert {"quant_state", "bnb_quantized", "blocksize"} <= layer.weight.__dict__.keys()
    assert layer.weight.quant_state is layer.quant_state
    expected = {"weight", f"weight.{bitsandbytes_layout.PACKED_STATE[quant_type]}"}
    for in_file, in_memory in bitsandbytes_layout.QUANT_STATE.items():
        part = layer.weight
        for name in in_memory.split("."):
            part = getattr(part, name)
        assert isinstance(part, torch.Tensor)
        expected.add(f"weight.{in_file}")
        assert bitsandbytes_layout.saved_name(f"weight.{in_memory}") == f"weight.{in_file}"
    assert layer.state_dict().keys() == expected

    on_cpu = bnb.nn.Linear4bit(64, 64, quant_type=quant_type, bias=False).half().to("cpu")
    packed = on_cpu.weight
    packed.data, packed.quant_state = _convert_weight_packed_for_cpu(
        packed.data, on_cpu.quant_state
    )
    assert bitsandbytes_layout.is_packed_for_cpu(packed)


def test_bitsandbytes_keeps_and_saves_an_8_bit_weight_as_it_did(gpu: GPU) -> None:
    import bitsandbytes as bnb

    layer = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False, bias=False).half().cuda()
    assert {"CB", "SCB", "has_fp16_weights"} <= layer.weight.__dict__.keys()
    layer(torch.ones(1, 64, dtype=torch.float16, device="cuda"))
    assert layer.state.CB is not None and layer.state.SCB is not None
    assert {"weight", "SCB"} <= layer.state_dict().keys()
    assert bitsandbytes_layout.saved_name("a.weight.SCB") == "a.SCB"
