"""Models that accelerate spread over devices, RAM and disk: one builder for each place where
offloaded weights can lie."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from packaging.version import Version
from torch import nn


def needs_accelerate(release: str, because: str) -> pytest.MarkDecorator:
    """Skips a test on older releases of accelerate, which `test_oldest_accelerate` runs others
    with."""
    too_old = Version(accelerate.__version__) < Version(release)
    return pytest.mark.skipif(too_old, reason=f"needs accelerate {release}: {because}")


RELOADED_TIES = needs_accelerate(
    "1.7", "its own forward raises KeyError for tied weights that are both offloaded"
)


class Block(nn.Module):
    """A little of everything: weights, a persistent and a non-persistent buffer, a 0-d parameter."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, dtype=dtype)
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.scale = nn.Parameter(torch.tensor(0.5, dtype=dtype))
        self.register_buffer("shift", torch.randn(width).to(dtype))
        self.register_buffer("mask", torch.ones(width, dtype=dtype), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(self.linear(x) * self.mask) * self.scale + self.shift


class Tower(nn.Module):
    """An embedding, blocks, and a head that is tied to the embedding."""

    def __init__(
        self, blocks: int = 4, width: int = 32, words: int = 64, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width, dtype=dtype)
        self.blocks = nn.ModuleList([Block(width, dtype) for _ in range(blocks)])
        self.head = nn.Linear(width, words, bias=False, dtype=dtype)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def tower(**options: Any) -> Tower:
    """A Tower with fixed weights, on the CPU."""
    torch.manual_seed(0)
    return Tower(**options).requires_grad_(False).eval()


def tokens(device: Any = "cuda:0") -> torch.Tensor:
    """Token ids of shape (2, 8), int64."""
    return torch.arange(16, device=device).reshape(2, 8)


# Two GPUs, RAM and disk.
SPREAD = {
    "embedding": "cuda:0", "blocks.0": "cuda:0", "blocks.1": "cuda:1", "blocks.2": "cpu", "blocks.3": "disk", "head": "disk"
}  # fmt: skip
IN_RAM = {
    "embedding": "cpu",
    "blocks.0": "cuda:0",
    "blocks.1": "cpu",
    "blocks.2": "cpu",
    "blocks.3": "cpu",
    "head": "cpu",
}
ON_DISK = {name: "disk" if place == "cpu" else place for name, place in IN_RAM.items()}
SOURCES = [
    pytest.param(IN_RAM, "dat", id="ram"),
    pytest.param(ON_DISK, "dat", id="dat files"),
    pytest.param(ON_DISK, "safetensors", id="safetensors"),
    pytest.param(SPREAD, "dat", id="two GPUs, RAM and dat files"),
    pytest.param(SPREAD, "safetensors", id="two GPUs, RAM and safetensors"),
]


# accelerate knows tied weights by the addresses that they had before the dispatch, and by those that
# they get each time they are loaded from a file. If that memory is freed and another weight happens
# to get the address, it is taken for the tied one, and the forward is wrong or raises (with
# `offload_buffers` a bias becomes a block's buffer). Small models meet that, whether or not qmove is
# there.
_originals: list[torch.Tensor] = []
loaded_in_test: list[torch.Tensor] = []  # emptied after each test (`tests/conftest.py`)


def keeping_addresses(model: nn.Module) -> nn.Module:
    """The model. The memory that its weights have now is never used again."""
    _keep_what_is_loaded()
    _originals.extend(parameter.detach() for parameter in model.parameters())
    return model


def _keep_what_is_loaded() -> None:
    """The memory of a weight that accelerate loads into RAM is not used again in the same test."""
    from accelerate.utils import OffloadedWeightsLoader

    load = OffloadedWeightsLoader.__getitem__
    if load.__module__ == __name__:  # done already
        return

    def load_and_keep(self: OffloadedWeightsLoader, key: str) -> torch.Tensor:
        value = load(self, key)
        if value.device.type == "cpu":
            loaded_in_test.append(value)
        return value

    OffloadedWeightsLoader.__getitem__ = load_and_keep


def dispatched(
    folder: Path, device_map: dict[str, Any], source: str = "dat", model: Any = None, **options: Any
) -> Any:
    """`model` (a Tower) as accelerate dispatches it; weights on "disk" come from `.dat` files or
    from "safetensors"."""
    from accelerate import dispatch_model

    model = keeping_addresses(tower() if model is None else model)
    if "disk" in device_map.values():
        if source == "dat":
            options["offload_dir"] = str(folder / "offload")
        else:
            options["offload_index"] = safetensors_index(model, folder)
    return dispatch_model(model, device_map, **options)


def safetensors_index(model: nn.Module, folder: Path) -> dict[str, dict[str, str]]:
    """Saves a model to two files, tied weights once, and returns the offload index that
    transformers would make of them."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, torch.Tensor]] = [{}, {}]
    first_name: dict[int, str] = {}
    index = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        stored = first_name.setdefault(id(tensor), name)
        number = list(model.state_dict()).index(stored) % 2
        if stored == name:
            files[number][stored] = tensor.detach().cpu().clone()
        path = folder / f"model-{number}.safetensors"
        index[name] = {
            "safetensors_file": str(path),
            "weight_name": stored,
            "dtype": str(tensor.dtype).split(".")[1],
        }
    for number, content in enumerate(files):
        save_file(content, folder / f"model-{number}.safetensors")
    return index


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors, on the CPU."""
    return {
        name: copy.deepcopy(tensor.detach().cpu()) for name, tensor in model.state_dict().items()
    }


def spread_llama(folder: Path, place: str) -> Any:
    """A Llama with tied embeddings that `from_pretrained` puts half on a GPU, half on `place`
    ("cpu" or "disk")."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=128, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    if not (folder / "llama").exists():
        LlamaForCausalLM(config).save_pretrained(folder / "llama")
    device_map = {
        "model.embed_tokens": place, "model.layers.0": "cuda:0", "model.layers.1": place, "model.norm": place,
        "model.rotary_emb": "cuda:0", "lm_head": place,
    }  # fmt: skip
    return (
        LlamaForCausalLM.from_pretrained(
            folder / "llama", device_map=device_map, offload_folder=str(folder / "offload")
        )
        .eval()
        .requires_grad_(False)
    )


def meta_names(model: nn.Module) -> set[str]:
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    return {name for name, tensor in tensors if tensor.is_meta}


def objects_of(model: nn.Module) -> dict[str, Any]:
    """Hooks, wrapped methods, and every parameter and buffer object with its device."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        attributes = ("_hf_hook", "_old_forward", "forward", "to", "cuda", "hf_device_map")
        found[name] = {
            key: id(module.__dict__[key]) for key in attributes if key in module.__dict__
        }
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None:
                found[f"{name}.{key}"] = (
                    id(tensor),
                    tensor.device,
                    tensor.dtype,
                    tensor.shape,
                    tensor.requires_grad,
                )
    return found


def change_everything(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
