"""Describes the storages of a model for a file, and finds them again in a model that was built
anew: by the names, kinds, dtypes and shapes of its tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import homes
from ..class_variants import own_class
from ..memory.disk_manifest import Manifest, SavedStorage, SavedTensor
from . import kinds
from .holdings import Holding, Inventory
from .kinds import bitsandbytes_saved
from .walk import FoundTensor, Walk, walk

# What a model is not whole without. Others (caches, gradients, what hooks keep) may be missing.
_NEEDED = frozenset({"parameter", "buffer", "quantization state", "inner tensor", "tensor"})


def walked(model: object) -> Walk:
    """All tensors of a model, with their names."""
    return walk([("", model)], leave_out=kinds.process_wide_tensors())


def describe(model: object, held: Inventory, holdings: Sequence[Holding]) -> Manifest:
    """What a file says of these holdings of a model, but for checksums and places. Those that the
    model itself does not reach are left out, and so are the tables of bitsandbytes."""
    found = walked(model)
    tables = bitsandbytes_saved.tables(held.modules.values())
    storages = []
    for holding in holdings:
        tensors = [
            _described(found.tensors[id(tensor)])
            for tensor in holding.tensors
            if id(tensor) in found.tensors and id(tensor) not in tables
        ]
        home = _home_of(holding)
        storages.append(SavedStorage(holding.nbytes, 0, str(home), "", None, tensors))
    wrappers = [
        {"names": found.tensors[id(outer)].names, **_class_of(outer)}
        for _name, outer in held.wrappers
        if id(outer) in found.tensors
    ]
    return Manifest(storages, wrappers, bitsandbytes_saved.describe(held.modules))


def _home_of(holding: Holding) -> torch.device:
    origin = homes.origin_of(holding.storage) if holding.device.type == "cpu" else None
    return origin.home if origin is not None and origin.is_parked else holding.device


def _described(found: FoundTensor) -> SavedTensor:
    tensor = found.tensor
    with torch._C.DisableTorchFunctionSubclass():
        bits = [name for name in ("conj", "neg") if getattr(tensor, f"is_{name}")()]
        return SavedTensor(
            [str(name) for name in found.names],
            found.kind,
            own_class(tensor).__name__,
            str(tensor.dtype).removeprefix("torch."),
            int(tensor.storage_offset()),
            list(tensor.shape),
            list(tensor.stride()),
            bits,
        )


def _class_of(outer: torch.Tensor) -> dict[str, Any]:
    with torch._C.DisableTorchFunctionSubclass():
        return {
            "cls": own_class(outer).__name__,
            "dtype": str(outer.dtype).removeprefix("torch."),
            "shape": list(outer.shape),
        }


@dataclass
class Matching:
    """Which tensors of a model a manifest means.

    Attributes:
        storages: each storage with (saved tensor, the model's tensors) of those that were found.
        problems: (name, problem) of what does not fit.
        left_out: names of what the model does not have, and does not need.
        own_tables: tables of bitsandbytes that the model has on an accelerator, and no other one.
    """

    storages: list[tuple[SavedStorage, list[tuple[SavedTensor, list[torch.Tensor]]]]] = field(
        default_factory=list
    )
    problems: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    own_tables: list[tuple[torch.Tensor, str]] = field(default_factory=list)


def match(model: object, manifest: Manifest, modules: Iterable[Any]) -> Matching:
    """Finds the tensors of a manifest in a model."""
    result, found = Matching(), walked(model)
    tables = bitsandbytes_saved.tables(modules)
    by_name = {
        bitsandbytes_saved.same_name(name): item
        for item in found.tensors.values()
        for name in item.names
    }
    taken: dict[int, SavedTensor] = {}
    for storage in manifest.storages:
        pairs = []
        for saved in storage.tensors:
            needed = saved.kind in _NEEDED
            items = {
                id(item.tensor): item
                for name in saved.names
                if (item := by_name.get(bitsandbytes_saved.same_name(name))) is not None
            }
            problem = "" if items else "the model has no such tensor"
            for key, item in items.items():
                problem = problem or _difference(saved, item)
                if not problem and taken.setdefault(key, saved) is not saved:
                    problem = "it is two tensors in the folder and one in the model"
            if problem and needed:
                result.problems.append((saved.names[0], problem))
            elif problem:
                result.left_out.append(saved.names[0])
            else:
                pairs.append((saved, [item.tensor for item in items.values()]))
        if pairs:
            result.storages.append((storage, pairs))
    result.own_tables = [
        (item.tensor, str(item.tensor.device))
        for key, item in found.tensors.items()
        if key in tables and item.tensor.device.type not in ("cpu", "meta")
    ]
    result.problems += [
        (item.names[0], "the folder has nothing for it")
        for key, item in found.tensors.items()
        if key not in taken
        and key not in tables
        and item.kind in _NEEDED
        and not hasattr(type(item.tensor), "__tensor_flatten__")
    ]
    result.problems += _wrapper_problems(manifest, by_name)
    return result


def _difference(saved: SavedTensor, item: FoundTensor) -> str:
    """How a tensor of the model differs from what was saved; empty if it does not."""
    here = _described(item)
    if (here.dtype, here.shape) != (saved.dtype, saved.shape):
        return (
            f"the folder has {saved.dtype} {saved.shape}, and the model {here.dtype} {here.shape}"
        )
    if here.cls != saved.cls:
        return f"it is a {saved.cls} in the folder, and a {here.cls} in the model"
    kinds_here = {saved.kind, here.kind}
    if len(kinds_here & {"parameter", "buffer"}) == 2:
        return f"it is a {saved.kind} in the folder, and a {here.kind} in the model"
    if here.bits != saved.bits:
        return "it is conjugated or negated in one of the two"
    return ""


def _wrapper_problems(manifest: Manifest, by_name: dict[str, FoundTensor]) -> list[tuple[str, str]]:
    problems = []
    for wrapper in manifest.wrappers:
        item = next((by_name[name] for name in wrapper["names"] if name in by_name), None)
        wanted = {key: wrapper[key] for key in ("cls", "dtype", "shape")}
        if item is None:
            problems.append((wrapper["names"][0], "the model has no such tensor"))
        elif _class_of(item.tensor) != wanted:
            here, there = _class_of(item.tensor), wanted
            problems.append((wrapper["names"][0], f"the folder has {there}, the model {here}"))
    return problems
