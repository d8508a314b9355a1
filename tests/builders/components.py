"""A ComponentsManager of diffusers with the models of a small pipeline, and a modular pipeline that
uses them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

NAMES = ("text_encoder", "unet", "vae")


def component(kind: str = "plain", blocks: int = 2, device: Any = "cuda:0") -> Any:
    """A model of diffusers of `blocks` blocks of two layers of 128 x 128, quantized as `kind` says:
    "plain", "int8", "nf4", "torchao", "quanto"."""
    import diffusers
    from diffusers.configuration_utils import register_to_config

    class Tower(diffusers.ModelMixin, diffusers.ConfigMixin):  # type: ignore[misc]
        @register_to_config
        def __init__(self, depth: int = 2) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 128)) for _ in range(depth)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = torch.tanh(block(x))
            return x

    torch.manual_seed(blocks)
    dtype = {"int8": torch.float16, "nf4": torch.float16, "torchao": torch.bfloat16}
    model = Tower(blocks).eval().requires_grad_(False)
    for parameter in model.parameters():  # .to(dtype) of diffusers warns
        parameter.data = parameter.data.to(dtype.get(kind, torch.float32))
    _quantize(model, kind)
    return model.to(device)


def _quantize(model: nn.Module, kind: str) -> None:
    if kind in ("int8", "nf4"):
        import bitsandbytes as bnb

        for block in model.blocks:  # type: ignore[union-attr]
            for place, layer in enumerate(block):  # type: ignore[arg-type]
                if kind == "int8":
                    new = bnb.nn.Linear8bitLt(128, 128, has_fp16_weights=False)
                    new.weight = bnb.nn.Int8Params(layer.weight.data, False, False)
                else:
                    new = bnb.nn.LinearNF4(128, 128, compute_dtype=torch.float16)
                    new.weight = bnb.nn.Params4bit(
                        layer.weight.data, False, quant_type="nf4", module=new
                    )
                new.bias = layer.bias
                block[place] = new  # type: ignore[index]
    elif kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    elif kind == "quanto":
        import optimum.quanto

        optimum.quanto.quantize(model, weights=optimum.quanto.qint8)
        optimum.quanto.freeze(model)
        model.requires_grad_(False)


def given(model: nn.Module, device: Any = "cpu") -> torch.Tensor:
    """What a component takes: two rows of 128."""
    bias = next(p for name, p in model.named_parameters() if name.endswith("bias"))
    return torch.linspace(-1, 1, 256, dtype=bias.dtype, device=device).reshape(2, 128)


def modular_pipeline(manager: Any, models: dict[str, Any]) -> Any:
    """A modular pipeline of diffusers: encode, three steps of the unet, decode."""
    from diffusers.modular_pipelines import (
        ComponentSpec,
        InputParam,
        ModularPipelineBlocks,
        OutputParam,
        SequentialPipelineBlocks,
    )

    class Block(ModularPipelineBlocks):  # type: ignore[misc]
        model_name, component, steps = "tower", "", 1

        @property
        def expected_components(self) -> list[Any]:
            return [ComponentSpec(self.component, type(models[self.component]))]

        @property
        def inputs(self) -> list[Any]:
            return [InputParam("x", required=True)]

        @property
        def intermediate_outputs(self) -> list[Any]:
            return [OutputParam("x", type_hint=torch.Tensor)]

        @torch.no_grad()
        def __call__(self, pipeline: Any, state: Any) -> Any:
            block_state = self.get_block_state(state)
            model = getattr(pipeline, self.component)
            for _ in range(self.steps):
                x = block_state.x.to(pipeline._execution_device, given(model).dtype)
                block_state.x = model(x)
            self.set_block_state(state, block_state)
            return pipeline, state

    class Encode(Block):
        component = "text_encoder"

    class Denoise(Block):
        component, steps = "unet", 3

    class Decode(Block):
        component = "vae"

    class Blocks(SequentialPipelineBlocks):  # type: ignore[misc]
        block_classes = [Encode, Denoise, Decode]  # noqa: RUF012
        block_names = ["encode", "denoise", "decode"]  # noqa: RUF012

    pipe = Blocks().init_pipeline(components_manager=manager)
    pipe.update_components(**models)
    return pipe
