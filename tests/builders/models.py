"""Models for tests, built from configs: real architectures and real quantization, small sizes,
fixed seeds."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

PRECISIONS = ("fp16", "int8", "nf4", "fp4")


def quantization_config(precision: str, **options: Any) -> Any:
    """transformers' (and diffusers') own config for bitsandbytes; None for "fp16"."""
    from transformers import BitsAndBytesConfig

    if precision == "fp16":
        return None
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, **options)
    options = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float16} | options
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=precision, **options)


def tiny_llama(precision: str, folder: Any, device: Any = "cuda:0", **options: Any) -> Any:
    """A Llama of 2 layers, saved to `folder` and loaded from there by `from_pretrained`, as users
    do it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).half().save_pretrained(folder)
    return LlamaForCausalLM.from_pretrained(
        folder,
        **dtype_of_load(torch.float16),
        device_map={"": device},
        quantization_config=quantization_config(precision, **options),
    ).eval()


def dtype_of_load(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The argument of `from_pretrained` for it: `dtype` since transformers 4.56."""
    import transformers

    is_old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
    return {"torch_dtype" if is_old else "dtype": dtype}


def llama_inputs(device: Any = "cuda:0") -> torch.Tensor:
    """Token ids of shape (2, 8), int64."""
    return torch.arange(3, 19, device=device).reshape(2, 8)


def layers(
    count: int = 4, width: int = 64, device: Any = "cuda:0", dtype: torch.dtype = torch.float32
) -> nn.Sequential:
    """A plain stack of `count` linear layers of `width` x `width`."""
    torch.manual_seed(0)
    return (
        nn.Sequential(*[nn.Linear(width, width, dtype=dtype) for _ in range(count)])
        .to(device)
        .requires_grad_(False)
    )


def torchao_layers(kind: str) -> nn.Sequential:
    """Two linear layers of 128 x 128, quantized by torchao: "int8", "int4", "float8" (weights only)
    or "nf4"."""
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
        quantize_,
    )
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

    model = layers(2, width=128, dtype=torch.bfloat16)
    if kind == "nf4":
        for layer in model:
            layer.weight = nn.Parameter(
                to_nf4(layer.weight, block_size=64, scaler_block_size=64), requires_grad=False
            )
        return model
    configs = {
        "int8": Int8WeightOnlyConfig,
        # The one int4 of torchao that a CPU build can run; the others need mslk or CUDA's tinygemm.
        "int4": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4),
        "float8": Float8WeightOnlyConfig,
    }
    quantize_(model, configs[kind]())
    return model


def quanto_layers(kind: str) -> nn.Sequential:
    """Two linear layers of 128 x 128, quantized by optimum-quanto: "qint8", "qint4", "qint2" or
    "qfloat8"."""
    import optimum.quanto

    model = layers(2, width=128)
    optimum.quanto.quantize(model, weights=getattr(optimum.quanto, kind))
    optimum.quanto.freeze(model)
    return model.requires_grad_(False)


def tiny_diffusion(device: Any = "cuda:0") -> Any:
    """An unconditional image pipeline of diffusers: a U-Net and a scheduler."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    pipe = DDPMPipeline(unet.eval(), DDPMScheduler(num_train_timesteps=10)).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_stable_diffusion(device: Any = "cuda:0") -> Any:
    """A text-to-image pipeline of diffusers, with text encoder, U-Net, VAE and a tokenizer of four
    words."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = Tokenizer(
        models.WordLevel({"<pad>": 0, "<unk>": 1, "a": 2, "cat": 3}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", model_max_length=8
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        )
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=16, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, steps_offset=1)
    pipe = StableDiffusionPipeline(
        vae.eval(),
        text_encoder.eval(),
        tokenizer,
        unet.eval(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    ).to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def inputs(width: int = 64) -> torch.Tensor:
    """What `layers` take: two rows of `width` numbers, float32."""
    return torch.linspace(-1, 1, 2 * width, device="cuda").reshape(2, width)


def image_of(pipe: Any) -> Any:
    """The image that a pipeline of this file gives after two steps from a fixed seed."""
    prompt = {"prompt": "a cat"} if hasattr(pipe, "text_encoder") else {}
    seed = torch.Generator(pipe._execution_device).manual_seed(0)
    return pipe(**prompt, generator=seed, num_inference_steps=2, output_type="np").images
