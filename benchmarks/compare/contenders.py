"""Those who are compared. Each holds two models, at most one of them in VRAM, and brings in the one
that is used.

Each is used as its own documentation shows it for models that take turns, with pinned memory and
streams where it offers them.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .workloads import Workload, load

Load = Callable[[int, str], nn.Module]


class Contender:
    """Holds model 0 and model 1. `Contender()` gets them ready, with model 0 used last."""

    name: str
    package: str | None = None  # whose version the page names

    def __init__(self, load: Load) -> None:
        """`load(index, device)` gives a model, freshly read from its file."""
        raise NotImplementedError

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """One forward of model `index`, with the other one out of VRAM."""
        raise NotImplementedError

    def put_away(self) -> None:
        """Both out of VRAM."""
        raise NotImplementedError

    def model(self, index: int) -> nn.Module:
        """The model, wherever its weights are."""
        return self.models[index]

    models: list[Any]


class QMove(Contender):
    name = "qmove"
    package = "qmove"

    def __init__(self, load: Load) -> None:
        import qmove_core  # here, so that it is not in the processes of the others

        self.qmove = qmove_core
        second = load(1, "cuda:0")
        self.qmove.park(second)
        self.models = [load(0, "cuda:0"), second]

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.qmove.is_parked(self.models[index]):
            self.bring_in(index)
        return self.models[index](x)

    def bring_in(self, index: int) -> None:
        self.qmove.swap(self.models[1 - index], self.models[index])

    def put_away(self) -> None:
        for model in self.models:
            self.qmove.park(model)


class QMoveStreaming(QMove):
    name = "qmove, streaming"

    def bring_in(self, index: int) -> None:
        self.qmove.park(self.models[1 - index])
        self.qmove.restore(self.models[index], stream=True)


class PlainTo(Contender):
    name = "plain .to()"
    package = "torch"

    def __init__(self, load: Load) -> None:
        second = load(1, "cpu").to("cpu")
        self.models = [load(0, "cuda:0"), second]

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.models[index].device != x.device:
            self.models[1 - index].to("cpu")
            self.models[index].to(x.device)
        return self.models[index](x)

    def put_away(self) -> None:
        for model in self.models:
            model.to("cpu")


class AccelerateHook(Contender):
    name = "accelerate cpu_offload_with_hook"
    package = "accelerate"

    def __init__(self, load: Load) -> None:
        from accelerate import cpu_offload_with_hook

        pairs = [cpu_offload_with_hook(load(index, "cpu"), "cuda:0") for index in range(2)]
        self.models, self.hooks = (
            [model for model, _hook in pairs],
            [hook for _model, hook in pairs],
        )

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.models[index].device != x.device:
            self.hooks[1 - index].offload()
        return self.models[index](x)

    def put_away(self) -> None:
        for hook in self.hooks:
            hook.offload()


class DiffusersModelOffload(Contender):
    """A pipeline of two models: within a call the second one's hook sends the first one out, after
    it all are freed."""

    name = "diffusers model offload"
    package = "diffusers"

    def __init__(self, load: Load) -> None:
        from diffusers import DiffusionPipeline

        class Pipeline(DiffusionPipeline):
            model_cpu_offload_seq = "first->second"

            def __init__(self, first: nn.Module, second: nn.Module) -> None:
                super().__init__()
                self.register_modules(first=first, second=second)

        self.models = [load(0, "cpu"), load(1, "cpu")]
        self.pipeline = Pipeline(*self.models)
        self.pipeline.enable_model_cpu_offload(device="cuda:0")

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if index == 0 and self.models[0].device != x.device:
            self.pipeline.maybe_free_model_hooks()  # the end of the call before
        return self.models[index](x)

    def put_away(self) -> None:
        self.pipeline.maybe_free_model_hooks()


class DiffusersGroupOffload(Contender):
    """Leaf by leaf, with a stream that prefetches from pinned memory.

    The weights go again after each forward.
    """

    name = "diffusers group offload, streams"
    package = "diffusers"

    def __init__(self, load: Load) -> None:
        from diffusers.hooks import apply_group_offloading

        self.models = [load(0, "cpu"), load(1, "cpu")]
        for model in self.models:
            apply_group_offloading(
                model,
                onload_device=torch.device("cuda:0"),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                use_stream=True,
                record_stream=True,
            )

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return self.models[index](x)

    def put_away(self) -> None:
        pass  # it is after each forward


class Mmgp(Contender):
    """`offload.all` with every model pinned and no quantization of its own."""

    name = "mmgp, pinned"
    package = "mmgp"

    def __init__(self, load: Load) -> None:
        from mmgp import offload

        self.models = [load(0, "cpu"), load(1, "cpu")]
        pipe = {"first": self.models[0], "second": self.models[1]}
        with contextlib.redirect_stdout(io.StringIO()):
            self.manager = offload.all(
                pipe,
                pinnedMemory=True,
                quantizeTransformer=False,
                convertWeightsFloatTo=None,
                verboseLevel=0,
            )
        torch.set_default_device(None)  # it sets "cuda" for the whole process

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        return self.models[index](x)

    def put_away(self) -> None:
        self.manager.unload_all()


class Reload(Contender):
    """The model that is not used is deleted, and read again from its safetensors file, which is in
    the page cache."""

    name = "reload from safetensors"
    package = "safetensors"

    def __init__(self, load: Load) -> None:
        self.load = load
        self.models = [load(0, "cuda:0"), None]

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if self.models[index] is None:
            self.models[1 - index] = None
            self.models[index] = self.load(index, "cuda:0")
        return self.models[index](x)

    def put_away(self) -> None:
        self.models = [None, None]

    def model(self, index: int) -> nn.Module:
        return self.models[index] or self.load(index, "cuda:0")


ALL: tuple[type[Contender], ...] = (
    QMove,
    QMoveStreaming,
    PlainTo,
    AccelerateHook,
    DiffusersModelOffload,
    DiffusersGroupOffload,
    Mmgp,
    Reload,
)


def by_name(name: str) -> type[Contender]:
    return next(contender for contender in ALL if contender.name == name)


def loader(workload: Workload, folder: Path) -> Load:
    """Asked for the CPU it still puts what bitsandbytes quantized on the GPU, as `from_pretrained`
    does."""

    def load_model(index: int, device: str) -> nn.Module:
        return load(workload, folder, index, device if workload.precision == "fp16" else "cuda:0")

    return load_model
