"""A node pack like many: it puts models straight onto the GPU and knows nothing of ComfyUI's memory
management.

The nodes note what was on the device while they ran, so that tests can ask for it.
"""

import hashlib

import torch
from torch import nn

from . import counting, files, harmless, hiding, purging  # noqa: F401 (counting adds routes)
from .notes import note


class Wrapped:
    """What packs hand around: an object of their own with the module somewhere inside."""

    def __init__(self, module):
        self.payload = {"net": module, "name": "wrapped"}

    def __call__(self, x):
        return self.payload["net"](x)

    @property
    def device(self):
        return next(self.payload["net"].parameters()).device


class CarelessLoader:
    CATEGORY = "careless"
    FUNCTION = "load"
    RETURN_TYPES = ("CARELESS_MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "mib": ("INT", {"default": 64, "max": 1 << 20}),
                "seed": ("INT", {"default": 0}),
                "wrapped": ("BOOLEAN", {}),
            },
            "optional": {
                "after": ("STRING", {"forceInput": True}),
                "device": ("STRING", {"default": "cuda"}),
            },
        }

    def load(self, mib, seed, wrapped, after="", device="cuda"):
        note(f"load {mib} {seed}")
        rows = mib * 2**20 // 1024 // 4 // 8
        net = nn.Sequential(*[nn.Linear(1024, rows, bias=False, device=device) for _ in range(8)])
        for index, layer in enumerate(net):
            layer.weight.data.fill_((seed + index) / 1024)
        return (Wrapped(Stack(net)) if wrapped else Stack(net),)


class Stack(nn.Module):
    def __init__(self, layers):
        super().__init__()
        self.layers = layers

    @property
    def device(self):
        return next(self.parameters()).device

    def forward(self, x):
        return sum(layer(x).sum() for layer in self.layers)


class CarelessInt8Loader:
    CATEGORY = "careless"
    FUNCTION = "load"
    RETURN_TYPES = ("CARELESS_MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {})}}

    def load(self, folder):
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        config = BitsAndBytesConfig(load_in_8bit=True)
        return (
            AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float16, device_map={"": "cuda:0"}, quantization_config=config
            ).eval(),
        )


class CarelessRun:
    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("*",),
                "seed": ("INT", {"default": 0}),
                "scratch_mib": ("INT", {"default": 0, "max": 1 << 20}),
            },
            "optional": {
                "after": ("STRING", {"forceInput": True}),
                "fail": ("BOOLEAN", {"default": False}),
            },
        }

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, model, seed, scratch_mib, after="", fail=False):
        import simcuda

        note(f"run {seed}")
        before = simcuda.counters(0)
        scratch = (
            torch.empty(scratch_mib * 2**20, dtype=torch.uint8, device="cuda")
            if scratch_mib
            else None
        )
        if fail:
            raise ValueError("the node fails on purpose")
        if hasattr(model, "generate"):
            ids = torch.arange(3, 11, device=model.device)[None] + seed % 7
            result = model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        else:
            result = model(torch.full((1, 1024), float(seed + 1), device=model.device))
        del scratch
        digest = hashlib.sha256(result.cpu().numpy().tobytes()).hexdigest()[:16]
        return (
            f"{digest} {before.allocated} {simcuda.counters(0).h2d_bytes} {simcuda.counters(0).d2h_bytes}",
        )


class CarelessSlow:
    """Waits until it is interrupted: an hour, in steps at which the host can stop it."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("*",), "after": ("STRING", {"forceInput": True})}}

    @classmethod
    def VALIDATE_INPUTS(cls, input_types):
        return True

    def run(self, model, after):
        import time

        import comfy.model_management

        note("slow")
        for _ in range(36000):
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.1)
        return ("never",)


class CarelessShow:
    CATEGORY = "careless"
    FUNCTION = "show"
    OUTPUT_NODE = True
    RETURN_TYPES = ()

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"forceInput": True})}}

    def show(self, text):
        return {"ui": {"text": [text]}}


NODE_CLASS_MAPPINGS = {
    cls.__name__: cls
    for cls in (
        *(CarelessLoader, CarelessInt8Loader, CarelessRun, CarelessSlow, CarelessShow),
        *files.NODES,
        *harmless.NODES,
        *hiding.NODES,
        *purging.NODES,
    )
}
