"""What tests of a real ComfyUI share: where it is, prompts of the careless pack, what they gave."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import simcuda

from .comfyui_process import HERE, ComfyUI

COMFYUI_DIR = os.environ.get("COMFYUI_DIR")
needs_comfyui = [
    pytest.mark.skipif(
        COMFYUI_DIR is None, reason="needs a ComfyUI: name a checkout in COMFYUI_DIR"
    ),
    pytest.mark.skipif(not simcuda.is_active(), reason="runs on the simulated GPU only"),
]
CARELESS = HERE / "packs" / "careless"


def start(folder: Path, memory: str, **options: Any) -> ComfyUI:
    assert COMFYUI_DIR is not None
    return ComfyUI(Path(COMFYUI_DIR), folder, memory=memory, **options)


def node(name: str, **inputs: Any) -> dict[str, Any]:
    """A node of a prompt; an input ("id", 0) is a link."""
    linked = {name: list(v) if isinstance(v, tuple) else v for name, v in inputs.items()}
    return {"class_type": name, "inputs": linked}


def load(mib: int, seed: int = 0, **inputs: Any) -> dict[str, Any]:
    """A loader that puts a model of `mib` MiB straight onto the GPU."""
    return node("CarelessLoader", mib=mib, seed=seed, wrapped=False, **inputs)


def use(model: str, seed: int = 0, scratch_mib: int = 8, **inputs: Any) -> dict[str, Any]:
    """A node that runs the model of the node `model`."""
    return node("CarelessRun", model=(model, 0), seed=seed, scratch_mib=scratch_mib, **inputs)


def show(source: str) -> dict[str, Any]:
    return node("CarelessShow", text=(source, 0))


def model_bytes(mib: int) -> int:
    """Bytes of the model that CarelessLoader makes: eight layers whose width is rounded down."""
    return mib * 2**20 // 1024 // 4 // 8 * 1024 * 4 * 8


def messages(history: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [content for name, content in history["status"]["messages"] if name == kind]


def shown(history: dict[str, Any]) -> dict[str, list[str]]:
    """For each stage what its node saw: digest of its output, and bytes: allocated before it,
    copied in, copied out."""
    return {
        name: node["text"][0].split()
        for name, node in sorted(history["outputs"].items())
        if name.startswith("show")
    }


def digests(history: dict[str, Any]) -> dict[str, str]:
    return {name: words[0] for name, words in shown(history).items()}


def assert_passed(comfyui: ComfyUI, history: dict[str, Any]) -> None:
    wrong = messages(history, "execution_error") + messages(history, "execution_interrupted")
    said = [
        {k: e.get(k) for k in ("node_id", "exception_type", "exception_message")} for e in wrong
    ]
    assert history["status"]["status_str"] == "success", (said, comfyui.tail(2000))
