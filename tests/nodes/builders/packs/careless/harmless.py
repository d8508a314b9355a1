"""Nodes for which nothing should ever move: texts, a loop, ComfyUI's own model, scratch memory."""

import hashlib

import comfy.model_management
import comfy.model_patcher
import torch
from comfy_execution.graph_utils import GraphBuilder
from torch import nn

from .notes import note


class CarelessText:
    """Joins texts."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"text": ("STRING", {"multiline": True})},
            "optional": {"after": ("STRING", {"forceInput": True})},
        }

    def run(self, text, after=""):
        return (f"{after[:16]} {text}",)


class CarelessLoop:
    """Expands into rounds; in each the first model runs, then the second."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "first": ("CARELESS_MODEL", {"rawLink": True}),
                "second": ("CARELESS_MODEL", {"rawLink": True}),
                "rounds": ("INT", {"default": 5}),
                "seed": ("INT", {"default": 0}),
            }
        }

    def run(self, first, second, rounds, seed):
        graph = GraphBuilder()
        last = None
        for number in range(rounds):
            for model in (first, second):
                after = {} if last is None else {"after": last}
                inputs = {"seed": seed + number, "scratch_mib": 8, **after}
                last = graph.node("CarelessRun", model=model, **inputs).out(0)
        return {"result": (last,), "expand": graph.finalize()}


class CarelessRounds:
    """The same, but each round is made by the one before it."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        inputs = CarelessLoop.INPUT_TYPES()
        return inputs | {"optional": {"after": ("STRING", {"forceInput": True})}}

    def run(self, first, second, rounds, seed, after=""):
        graph = GraphBuilder()
        inputs = {"seed": seed, "scratch_mib": 8, "after": after}
        one = graph.node("CarelessRun", model=first, **inputs).out(0)
        last = graph.node("CarelessRun", model=second, **inputs | {"after": one}).out(0)
        if rounds > 1:
            inputs = {"rounds": rounds - 1, "seed": seed + 1, "after": last}
            last = graph.node("CarelessRounds", first=first, second=second, **inputs).out(0)
        return {"result": (last,), "expand": graph.finalize()}


class CarelessOwnLoader:
    """A model of ComfyUI's own: a ModelPatcher, which ComfyUI loads and unloads."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"mib": ("INT", {"default": 64, "max": 1 << 20})}}

    def run(self, mib):
        note(f"load own {mib}")
        rows = mib * 2**20 // 1024 // 4 // 8
        net = nn.Sequential(*[nn.Linear(1024, rows, bias=False) for _ in range(8)])
        for index, layer in enumerate(net):
            layer.weight.data.fill_(index / 1024)
        device = comfy.model_management.get_torch_device()
        return (comfy.model_patcher.ModelPatcher(net, device, torch.device("cpu")),)


class CarelessSample:
    """Has ComfyUI load its model and runs it."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("MODEL",), "seed": ("INT", {"default": 0})},
            "optional": {"after": ("STRING", {"forceInput": True})},
        }

    def run(self, model, seed, after=""):
        comfy.model_management.load_models_gpu([model])
        x = torch.full((1, 1024), float(seed + 1), device=model.load_device)
        result = sum(layer(x).sum() for layer in model.model)
        return (hashlib.sha256(result.cpu().numpy().tobytes()).hexdigest()[:16],)


class CarelessScratch:
    """Takes VRAM for a moment, on the device it is told."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "mib": ("INT", {"default": 64, "max": 1 << 20}),
                "device": ("STRING", {"default": "cuda:0"}),
                "seed": ("INT", {"default": 0}),
            },
            "optional": {"after": ("STRING", {"forceInput": True})},
        }

    def run(self, mib, device, seed, after=""):
        note(f"scratch {mib} {seed}")
        torch.empty(mib * 2**20, dtype=torch.uint8, device=device)
        return (f"{mib} {seed}",)


class CarelessSizes:
    """Gives a list of sizes: the node behind it runs once for each."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("INT",)
    OUTPUT_IS_LIST = (True,)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"sizes": ("STRING", {"default": "64 64"})},
            "optional": {"after": ("STRING", {"forceInput": True})},
        }

    def run(self, sizes, after=""):
        return ([int(size) for size in sizes.split()],)


class CarelessTiles:
    """Runs its model beside much scratch memory; out of memory it makes do with less, as many packs
    do, by what they take for out of memory."""

    CATEGORY = "careless"
    FUNCTION = "run"
    RETURN_TYPES = ("STRING",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("CARELESS_MODEL",),
                "mib": ("INT", {"default": 64, "max": 1 << 20}),
            }
        }

    def run(self, model, mib):
        import qmove_core

        qmove_core.park(model)
        scratch = torch.empty(mib * 2**20, dtype=torch.uint8, device="cuda:0")
        x = torch.ones(1, 1024, device="cuda:0")
        try:
            model(x)
        except comfy.model_management.OOM_EXCEPTION as error:
            is_oom = getattr(comfy.model_management, "is_oom", lambda error: True)  # from 0.18
            del scratch
            model(x)
            return (f"tiled {type(error).__name__} {is_oom(error)}",)
        return ("whole",)


class CarelessSave(CarelessScratch):
    """The same, in a node that does things outside: it must not run twice."""

    OUTPUT_NODE = True
    RETURN_TYPES = ()

    def run(self, mib, device, seed, after=""):
        super().run(mib, device, seed, after)
        return {"ui": {"text": [f"{mib} {seed}"]}}


NODES = (
    *(CarelessText, CarelessLoop, CarelessRounds, CarelessOwnLoader, CarelessSample),
    *(CarelessScratch, CarelessSizes, CarelessTiles, CarelessSave),
)
