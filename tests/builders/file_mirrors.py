"""Models that lie in their own safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import nn

import qmove_core as qmove
from tests.builders.mirrors import MODEL, WIDTH
from tests.builders.models import layers


def saved(model: nn.Module, folder: Path, prefix: str = "") -> Path:
    """The model's weights in a file."""
    path = folder / "model.safetensors"
    save_file({prefix + name: tensor.cpu() for name, tensor in model.state_dict().items()}, path)
    return path


def mirrored(folder: Path) -> tuple[nn.Sequential, Path]:
    """A resident model of 8 storages, mirrored by its file."""
    model = layers(4, width=WIDTH)
    path = saved(model, folder)
    assert qmove.mirror_files(model, path) == MODEL
    return model, path


def is_mapped(path: Path) -> bool:
    return str(path) in Path("/proc/self/maps").read_text()
