"""`comfy.model_management` and `ModelPatcher` of the fake host, as the contract describes them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from types import ModuleType
from typing import Any

import torch
from torch import nn

INFERENCE = 16 << 20  # bytes the host keeps free for computing; the real one has 1.2 GiB


class Line:
    """`LoadedModel`, one line of the list of loaded models: it holds the entry weakly, and once
    loaded it watches the real model die."""

    management: FakeModelManagement  # of the host whose class it is

    def __init__(self, entry: Any) -> None:
        self._entry = weakref.ref(entry)
        self.device = entry.load_device
        self.currently_used = True
        self.real_model: Any = None
        self.model_finalizer: Any = None

    @property
    def model(self) -> Any:
        return self._entry()

    def model_load(self) -> Any:
        self.model.model_patches_to(self.device)
        self.model.model_patches_to(self.model.model_dtype())
        self.model.partially_load(self.device, 1e32, force_patch_weights=False)
        real = self.model.model
        self.real_model = weakref.ref(real)
        self.model_finalizer = weakref.finalize(real, self.management.drop_dead_lines)
        return real

    def is_dead(self) -> bool:
        return self.real_model() is not None and self.model is None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Line) and self.model is other.model

    __hash__ = None  # type: ignore[assignment]


class FakeModelManagement(ModuleType):
    """`comfy.model_management`."""

    def __init__(self, old: bool) -> None:
        super().__init__("comfy.model_management")
        self.current_loaded_models: list[Line] = []
        self.LoadedModel = type("LoadedModel", (Line,), {"management": self})
        self.InterruptProcessingException = type(
            "InterruptProcessingException", (Exception if old else BaseException,), {}
        )
        self._interrupted = False
        self.emptied = 0
        self.requests: list[list[str]] = []
        self.free_memory = _plain_function(self._free_memory)

    def get_torch_device(self) -> torch.device:
        return torch.device("cuda:0")

    def minimum_inference_memory(self) -> int:
        return INFERENCE

    def get_free_memory(self, dev: torch.device) -> int:
        return (
            torch.cuda.mem_get_info(dev)[0]
            + torch.cuda.memory_reserved(dev)
            - torch.cuda.memory_allocated(dev)
        )

    def soft_empty_cache(self) -> None:
        self.emptied += 1
        torch.cuda.empty_cache()

    def load_models_gpu(
        self, models: Iterable[Any], memory_required: float = 0, *, force_full_load: bool = False
    ) -> None:
        models = list(models)
        self.requests.append([type(entry.model).__name__ for entry in models])
        for entry in models:
            for line in [line for line in self.current_loaded_models if entry.is_clone(line.model)]:
                self.current_loaded_models.remove(line)
                line.model.detach(unpatch_all=False)
                line.model_finalizer.detach()
        for device in {entry.load_device for entry in models}:
            missing = sum(
                e.model_size() - e.loaded_size() for e in models if e.load_device == device
            )
            self.free_memory(missing * 1.1 + max(INFERENCE, memory_required), device)
        for entry in models:
            line = self.LoadedModel(entry)
            line.model_load()
            self.current_loaded_models.insert(0, line)

    def _free_memory(
        self, memory_required: float, device: torch.device, keep_loaded: Iterable[Any] = ()
    ) -> list[Line]:
        keep = list(keep_loaded)
        lines = [
            x
            for x in self.current_loaded_models
            if x.device == device and x.model is not None and x not in keep
        ]
        gone = []
        for line in sorted(lines, key=lambda line: line.model.loaded_size(), reverse=True):
            missing = memory_required - self.get_free_memory(device)
            if missing <= 0:
                break
            if (
                missing < line.model.loaded_size()
                and line.model.partially_unload(torch.device("cpu"), missing) >= missing
            ):
                continue
            line.model.detach(True)
            line.model_finalizer.detach()
            gone.append(line)
        ids = {id(line) for line in gone}
        self.current_loaded_models = [x for x in self.current_loaded_models if id(x) not in ids]
        if gone:
            self.soft_empty_cache()
        return gone

    def unload_all_models(self) -> None:
        for index in range(torch.cuda.device_count()):
            self.free_memory(1e30, torch.device("cuda", index))

    def drop_dead_lines(self) -> None:
        self.current_loaded_models = [
            x for x in self.current_loaded_models if x.real_model() is not None
        ]

    def interrupt_current_processing(self, value: bool = True) -> None:
        self._interrupted = value

    def processing_interrupted(self) -> bool:
        return self._interrupted

    def throw_exception_if_processing_interrupted(self) -> None:
        if self._interrupted:
            self._interrupted = False
            raise self.InterruptProcessingException


class ModelPatcher:
    """One of the host's own models: it moves whole, by `.to`."""

    parent = None

    def __init__(self, model: nn.Module, device: str = "cuda:0") -> None:
        self.model = model
        self.load_device, self.offload_device = torch.device(device), torch.device("cpu")

    def model_size(self) -> int:
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def loaded_size(self) -> int:
        return self.model_size() if next(self.model.parameters()).device == self.load_device else 0

    def current_loaded_device(self) -> torch.device:
        return self.load_device if self.loaded_size() else self.offload_device

    def partially_load(
        self, device: torch.device, extra: float, force_patch_weights: bool = False
    ) -> int:
        before = self.loaded_size()
        self.model.to(device)
        return self.loaded_size() - before

    def partially_unload(self, offload_device: torch.device, memory_to_free: float) -> int:
        return 0

    def detach(self, unpatch_all: bool = True) -> None:
        if unpatch_all:
            self.model.to(self.offload_device)

    def is_clone(self, other: Any) -> bool:
        return other is not None and getattr(other, "model", None) is self.model

    def model_patches_models(self) -> list[Any]:
        return []

    def model_patches_to(self, device_or_dtype: Any) -> None:
        pass

    def model_dtype(self) -> None:
        return None

    def is_dynamic(self) -> bool:
        return False

    def lowvram_patch_counter(self) -> int:
        return 0


def _plain_function(method: Any) -> Any:
    """A function that a module has, as the host's: others may put theirs in its place."""

    def function(*args: Any, **options: Any) -> Any:
        return method(*args, **options)

    return function
