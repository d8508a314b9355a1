"""The models that are moved: stacks of linear layers as fp16, int8 or nf4, written to files once
and loaded by every contender.

The weights of each layer differ, but are made from one layer that was really quantized, as
quantizing gigabytes on a CPU would take longer than the benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn


@dataclass(frozen=True)
class Workload:
    """A model of `layers` square linear layers of `width`, each with a bias.

    Attributes:
        precision: "fp16", "int8" (`bitsandbytes.nn.Linear8bitLt`) or "nf4" (`Linear4bit`, double
            quantization).
    """

    name: str
    precision: str
    width: int
    layers: int

    def file(self, folder: Path, index: int) -> Path:
        """Where model number `index` of two lies."""
        return folder / f"{self.name.replace(' ', '-').replace(',', '')}-{index}.safetensors"


def workloads(quick: bool) -> list[Workload]:
    """The four models; `quick`: two, small enough to see in a minute that all works."""
    if quick:
        return [
            Workload("int8", "int8", 256, 8),
            Workload("fp16 of 200 tensors", "fp16", 64, 100),
        ]
    return [
        Workload("fp16", "fp16", 2048, 238),
        Workload("int8", "int8", 2048, 238),
        Workload("nf4", "nf4", 2048, 238),
        Workload("fp16 of 10,000 tensors", "fp16", 224, 5000),
    ]


class Stack(nn.Module):
    """Layers one after the other; `device` and `dtype` as the models of transformers and diffusers
    have them."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float16


def inputs(workload: Workload, device: torch.device | str) -> torch.Tensor:
    """Shape (1, width), float16."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, workload.width, generator=generator).half().to(device)


def save(workload: Workload, folder: Path) -> None:
    """Writes the two models, which differ in every layer."""
    template = _template(workload)
    for index in range(2):
        content = {
            f"layers.{number}.{name}": _varied(name, tensor, 2 * number + index)
            for number in range(workload.layers)
            for name, tensor in template.items()
        }
        save_file(content, workload.file(folder, index))


def load(workload: Workload, folder: Path, index: int, device: torch.device | str) -> Stack:
    """The model as libraries load prequantized weights, ready to run on `device`, in memory of its
    own."""
    with torch.device("meta"):
        layers = [_empty_layer(workload) for _ in range(workload.layers)]
    with safe_open(workload.file(folder, index), "pt", device=str(device)) as file:
        names = file.keys()
        tensors: list[dict[str, torch.Tensor]] = [{} for _ in layers]
        for name in names:
            _layers, number, rest = name.split(".", 2)
            tensor = file.get_tensor(name)  # on the CPU: a view of the mapped file
            tensors[int(number)][rest] = tensor.clone() if tensor.device.type == "cpu" else tensor
    for number, layer in enumerate(layers):
        _fill(layer, tensors[number], torch.device(device))
        tensors[number].clear()
    return Stack(layers).eval().requires_grad_(False)


def differing(model: nn.Module, workload: Workload, folder: Path, index: int) -> list[str]:
    """Names of the tensors whose bytes, shape or dtype are not those of the file."""
    state, wrong = model.state_dict(), []
    with safe_open(workload.file(folder, index), "pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118  (it is no dict)
            there, expected = state.get(name), file.get_tensor(name)
            if (
                there is None
                or there.dtype != expected.dtype
                or not torch.equal(there.cpu(), expected)
            ):
                wrong.append(name)
    return wrong


def nbytes(workload: Workload, folder: Path) -> int:
    """Bytes of one model's tensors, as its file holds them."""
    with safe_open(workload.file(folder, 0), "pt", device="cpu") as file:
        return sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118


def _template(workload: Workload) -> dict[str, torch.Tensor]:
    """One layer's state dict, on the CPU."""
    torch.manual_seed(0)
    layer = _empty_layer(workload).float()
    with torch.no_grad():
        nn.init.orthogonal_(
            layer.weight
        )  # thousands of layers must neither blow a signal up nor lose it
        layer.bias.normal_(std=0.01)
    layer = layer.half().to("cuda")  # here bitsandbytes quantizes
    return {name: tensor.cpu() for name, tensor in layer.state_dict().items()}


def _varied(name: str, tensor: torch.Tensor, seed: int) -> torch.Tensor:
    """Another layer's tensor of the same kind: rows and columns rotated, an int8 layer's scales
    with its rows."""
    if name == "weight":
        return tensor.roll((seed, seed // tensor.shape[0]), (0, 1))
    return tensor.roll(seed) if name in ("bias", "SCB") else tensor.clone()


def _empty_layer(workload: Workload) -> nn.Linear:
    width = workload.width
    if workload.precision == "fp16":
        return nn.Linear(width, width, dtype=torch.float16)
    import bitsandbytes as bnb

    if workload.precision == "int8":
        return bnb.nn.Linear8bitLt(width, width, has_fp16_weights=False)
    return bnb.nn.Linear4bit(
        width, width, compute_dtype=torch.float16, quant_type="nf4", compress_statistics=True
    )


def _fill(layer: nn.Linear, tensors: dict[str, torch.Tensor], device: torch.device) -> None:
    """Puts tensors from a file into a layer that was made on the meta device."""
    layer.bias = nn.Parameter(tensors.pop("bias"), requires_grad=False)
    weight = tensors.pop("weight")
    if not tensors:
        layer.weight = nn.Parameter(weight, requires_grad=False)
        return
    from bitsandbytes.nn import Int8Params, Params4bit

    if "SCB" in tensors:
        layer.weight = Int8Params(weight, requires_grad=False, CB=weight, SCB=tensors["SCB"])
    else:
        layer.weight = Params4bit.from_prequantized(weight, tensors, device=device, module=layer)
