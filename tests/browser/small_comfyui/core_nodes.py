"""Some core nodes by their names, inputs and outputs: those of the templates, which run, and those
of the frontends' own first workflow and the loaders that old frontends expect, which are only shown.

They are not taken from the workflows: a workflow that names a node or an input that ComfyUI does
not have is to fail. A real ComfyUI (COMFYUI_DIR) says whether this list is true.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

INT, FLOAT, STRING = (
    ("INT", {"default": 0}),
    ("FLOAT", {"default": 1.0}),
    ("STRING", {"default": ""}),
)
TEXT = ("STRING", {"multiline": True})
FILE = (["model.safetensors"], {})
IMAGES = (["example.png"], {"image_upload": True})
METHODS = (["nearest-exact", "bilinear", "area", "bicubic", "lanczos"], {})
SAMPLERS = (["euler", "dpmpp_2m"], {})
SCHEDULERS = (["normal", "karras", "simple"], {})


def _core(
    name: str,
    outputs: str,
    /,
    output_node: bool = False,
    run: Callable[..., Any] | None = None,
    **inputs: Any,
) -> type:
    """A node class; an input that is a type's name is a socket."""
    required = {
        key: (value, {}) if isinstance(value, str) else value for key, value in inputs.items()
    }

    def execute(self: Any, **inputs: Any) -> Any:
        if run is None:
            raise NotImplementedError(f"{name} is shown only, it does not run here")
        return run(**inputs)

    return type(
        name,
        (),
        {
            "CATEGORY": "core",
            "FUNCTION": "execute",
            "RETURN_TYPES": tuple(outputs.split()),
            "OUTPUT_NODE": output_node,
            "INPUT_TYPES": classmethod(lambda cls: {"required": required}),
            "execute": execute,
        },
    )


def _empty_image(width: int, height: int, batch_size: int, color: int) -> tuple[torch.Tensor]:
    channels = [((color >> shift) & 255) / 255 for shift in (16, 8, 0)]
    return (torch.tensor(channels).expand(batch_size, height, width, 3).contiguous(),)


def _mask_to_image(mask: torch.Tensor) -> tuple[torch.Tensor]:
    return (mask.unsqueeze(-1).expand(-1, -1, -1, 3),)


def _show_text(source: Any) -> dict[str, Any]:
    return {"ui": {"text": [str(source)]}, "result": (str(source),)}


def _show_nothing(**inputs: Any) -> dict[str, Any]:
    """Pictures and sounds: what is to be seen of them lies in files, which nobody serves here."""
    return {"ui": {}, "result": ()}


CORE_NODES = (
    _core("CheckpointLoaderSimple", "MODEL CLIP VAE", ckpt_name=FILE),
    _core("ImageOnlyCheckpointLoader", "MODEL CLIP_VISION VAE", ckpt_name=FILE),
    _core("LoraLoader", "MODEL CLIP", model="MODEL", clip="CLIP", lora_name=FILE, strength_model=FLOAT, strength_clip=FLOAT),
    _core("LoraLoaderModelOnly", "MODEL", model="MODEL", lora_name=FILE, strength_model=FLOAT),
    _core("ControlNetLoader", "CONTROL_NET", control_net_name=FILE),
    _core("StyleModelLoader", "STYLE_MODEL", style_model_name=(["upscaler.safetensors"], {})),
    _core("GLIGENLoader", "GLIGEN", gligen_name=FILE),
    _core("UNETLoader", "MODEL", unet_name=FILE, weight_dtype=(["default", "fp8_e4m3fn"], {})),
    _core("CLIPLoader", "CLIP", clip_name=FILE, type=(["stable_diffusion", "qwen_image"], {})),
    _core("VAELoader", "VAE", vae_name=FILE),
    _core("CLIPTextEncode", "CONDITIONING", text=TEXT, clip="CLIP"),
    _core("ModelSamplingAuraFlow", "MODEL", model="MODEL", shift=FLOAT),
    _core("EmptySD3LatentImage", "LATENT", width=INT, height=INT, batch_size=INT),
    _core("EmptyLatentImage", "LATENT", width=INT, height=INT, batch_size=INT),
    _core(
        "KSampler", "LATENT", model="MODEL", seed=("INT", {"default": 0, "control_after_generate": True}), steps=INT,
        cfg=FLOAT, sampler_name=SAMPLERS, scheduler=SCHEDULERS, positive="CONDITIONING", negative="CONDITIONING",
        latent_image="LATENT", denoise=FLOAT,
    ),
    _core("VAEDecode", "IMAGE", samples="LATENT", vae="VAE"),
    _core("VAEEncode", "LATENT", pixels="IMAGE", vae="VAE"),
    _core("UpscaleModelLoader", "UPSCALE_MODEL", model_name=(["upscaler.safetensors"], {})),
    _core("ImageUpscaleWithModel", "IMAGE", upscale_model="UPSCALE_MODEL", image="IMAGE"),
    _core("ImageScale", "IMAGE", image="IMAGE", upscale_method=METHODS, width=INT, height=INT, crop=(["disabled", "center"], {})),
    _core("ImageScaleBy", "IMAGE", image="IMAGE", upscale_method=METHODS, scale_by=FLOAT),
    _core("LoadImage", "IMAGE MASK", image=IMAGES),
    _core("SaveImage", "", images="IMAGE", filename_prefix=STRING, output_node=True),
    _core("PreviewImage", "", images="IMAGE", output_node=True, run=_show_nothing),
    _core("PreviewAudio", "", audio="AUDIO", output_node=True, run=_show_nothing),
    _core("PreviewAny", "STRING", source="*", output_node=True, run=_show_text),
    _core("EmptyImage", "IMAGE", width=INT, height=INT, batch_size=INT, color=INT, run=_empty_image),
    _core("MaskToImage", "IMAGE", mask="MASK", run=_mask_to_image),
    _core("ImageInvert", "IMAGE", image="IMAGE"),
)  # fmt: skip
