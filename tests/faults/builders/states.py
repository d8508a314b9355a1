"""The state of a model, of the process around it and of its memory: what a fault must leave whole."""

from __future__ import annotations

import gc
import signal
import threading
from dataclasses import dataclass
from typing import Any

import torch

import qmove_core as qmove
import simcuda
from qmove_core import homes
from qmove_core.memory import arena, blocks, mirrors
from qmove_core.parking import streaming
from tests.builders.dispatched_models import meta_names
from tests.builders.snapshots import snapshot
from tests.faults.builders.subjects import Subject


def state_of(subject: Subject) -> dict[str, Any]:
    """Where everything lies and what it holds, without the identities of objects: two models that
    were built alike and went the same way have the same state."""
    state: dict[str, Any] = {}
    for part, model in subject.parts().items():
        for name, (device, *content) in snapshot(model).items():
            state[f"{part}: {name}"] = (device, *_without_identities(content))
        for name, module in model.named_modules():
            state[f"{part}: module {name}"] = (
                module.__class__.__qualname__,
                module.__class__ is not type(module),  # asleep
                "_hf_hook" in module.__dict__,
            )
        state[f"{part}: meta"] = sorted(meta_names(model))
        state[f"{part}: parked"] = qmove.is_parked(model)
    models = [id(model) for model in subject.parts().values()]
    state["parked models"] = [models.index(id(m)) for m in qmove.parked_models() if id(m) in models]
    return state


def _without_identities(content: list[Any]) -> list[Any]:
    """Drops the id of each tensor, and the ids of its attributes."""
    if isinstance(content[0], bytes):
        contents, tensors, names = content
        return [contents, tuple(_one(t) for t in tensors), names]
    return [_one(content[0])]


def _one(outside: tuple[Any, ...]) -> tuple[Any, ...]:
    _id, *rest, attributes = outside
    return (*rest, tuple(attributes))


def identities(subject: Subject) -> dict[str, tuple[int, ...]]:
    """The tensor objects behind each name of the model."""
    found: dict[str, tuple[int, ...]] = {}
    for part, model in subject.parts().items():
        for module_name, module in model.named_modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    found[f"{part}: {module_name}.{name}"] = (id(tensor), id(module))
    return found


def differences(now: dict[str, Any], wanted: dict[str, Any], most: int = 4) -> str:
    """What differs, in words."""
    names = [n for n in {**wanted, **now} if now.get(n, "absent") != wanted.get(n, "absent")]
    shown = [f"{n}: {_difference(now.get(n), wanted.get(n))}" for n in names[:most]]
    return "; ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _difference(now: Any, wanted: Any) -> str:
    if isinstance(now, tuple) and isinstance(wanted, tuple) and len(now) == len(wanted):
        pairs = [(a, b) for a, b in zip(now, wanted, strict=True) if a != b]
        return ", ".join(_difference(a, b) for a, b in pairs)
    if isinstance(now, bytes):
        return "other bytes"
    return f"{now!r} and not {wanted!r}"[:200]


@dataclass(frozen=True)
class Memory:
    """Bytes in use. What is kept only to be faster next time (mirrors, spares) is no part of it."""

    device: tuple[int, ...]
    host: int

    @classmethod
    def now(cls) -> Memory:
        gc.collect()
        device = tuple(torch.cuda.memory_allocated(index) for index in range(2))
        parts = {
            (id(block.ram), start, end)
            for block, start, end in list(blocks._places.values())
            if block.ram is not None
        }
        sizes = [end - start for _ram, start, end in parts]
        return cls(device, arena.bytes_for(sizes) - mirrors.nbytes())

    def __sub__(self, base: Memory) -> Memory:
        device = tuple(a - b for a, b in zip(self.device, base.device, strict=True))
        return Memory(device, self.host - base.host)


class Surroundings:
    """What no operation may leave otherwise than it was, whatever happens."""

    def __init__(self) -> None:
        self._wanted = self._now()

    def _now(self) -> dict[str, Any]:
        return {
            "garbage collector enabled": gc.isenabled(),
            "SIGINT handler": signal.getsignal(signal.SIGINT),
            "SIGUSR1 handler": signal.getsignal(signal.SIGUSR1),
            "current device": torch.cuda.current_device(),
            "current stream": torch.cuda.current_stream(),
            "grad mode": torch.is_grad_enabled(),
            "inference mode": torch.is_inference_mode_enabled(),
            "lock free": _is_free(homes.lock),
            "arena's lock free": _is_free(arena._lock),
            "arriving": len(streaming._under_way),
            "error of the driver": simcuda.last_error(),
        }

    def problems(self) -> list[str]:
        """What is otherwise now."""
        now = self._now()
        return [f"{n}: {now[n]} and not {w}" for n, w in self._wanted.items() if now[n] != w]


def put_back() -> None:
    """After a failure: the next point begins as if nothing had been."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.enable()
    torch.cuda.set_device(0)


def _is_free(lock: Any) -> bool:
    """Whether another thread could take the lock."""
    taken: list[bool] = []

    def take() -> None:
        if lock.acquire(blocking=False):
            lock.release()
            taken.append(True)

    thread = threading.Thread(target=take)
    thread.start()
    thread.join()
    return taken == [True]
