"""Takes the inventory of a model: its storages with all tensors that look into them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .. import homes
from ..collector import collection_deferred
from ..moving import ordinary_state
from . import kinds
from .addresses import keeps_addresses, pointed_to
from .holdings import Holding, Immovable, Inventory, MetaTensor
from .walk import FoundTensor, Walk, walk


def inventory(model: object, *, extra: Iterable[object] = ()) -> Inventory:
    """Lists every tensor `model` holds, grouped by storage; moves and copies nothing.

    Args:
        model: anything that holds tensors: an `nn.Module`, a pipeline, a dict or list of them, a
            wrapper object.
        extra: further objects that go with the model, such as an optimizer or a cache.

    Returns:
        An `Inventory`. It refers to the model's tensors, and so keeps them alive.
    """
    roots = [("", model), *((f"<extra {index}>", root) for index, root in enumerate(extra))]
    with ordinary_state(), collection_deferred():
        walked = walk(roots, leave_out=kinds.process_wide_tensors())
        result = Inventory(holdings=[])
        _sort_in(walked.tensors.values(), walked.unreachable, result)
        _find_addressed(walked, result)
    result.immovable += [
        Immovable(name, None, _GRAPH.format(type(obj).__name__)) for name, obj in walked.fixed
    ]
    result.foreign = [name for name, _module in walked.foreign]
    for name, module in walked.modules.values():
        while name in result.modules:  # reached in two ways that read the same
            name += "'"
        result.modules[name] = module
    return result


_GRAPH = "a {} replays kernels with the raw addresses of the weights; delete it first"


_ADDRESS = "{} has its raw address, and would read other memory if it moved"


def _find_addressed(walked: Walk, result: Inventory) -> None:
    """Notes the storages that something in the model points to: they stay where they are."""
    pointed = pointed_to(result.holdings, walked.numbers)
    keepers = [(name, m) for name, m in walked.modules.values() if keeps_addresses(m)]
    if keepers:
        by_tensor = {id(tensor): h for h in result.holdings for tensor in h.tensors}
        for name, module in keepers:
            kernel = f"the kernel of {name} ({type(module).__name__})"
            for tensor in (*module.__dict__.values(), *module.parameters(), *module.buffers()):
                if (holding := by_tensor.get(id(tensor))) and holding.device.type != "cpu":
                    pointed[id(holding)] = holding, kernel
    for holding, name in pointed.values():
        reason = _ADDRESS.format(name)
        result.addressed.add(holding.storage._cdata)
        result.immovable.append(Immovable(holding.name, holding.device, reason, holding.nbytes))


def _sort_in(
    tensors: Iterable[FoundTensor], unreachable: Mapping[int, str], result: Inventory
) -> None:
    by_storage: dict[int, Holding] = {}
    lazy: Any = nn.parameter.UninitializedTensorMixin  # type: ignore[attr-defined]
    with torch._C.DisableTorchFunction():
        for found in tensors:
            tensor, names = found.tensor, found.names
            if isinstance(tensor, lazy):
                continue  # of a module before its first forward: no bytes yet
            if id(tensor) in unreachable:
                reason = unreachable[id(tensor)]
                result.immovable.append(Immovable(names[0], tensor.device, reason))
                continue
            if hasattr(type(tensor), "__tensor_flatten__"):
                result.wrappers.append((names[0], tensor))
                continue
            if tensor.is_meta:
                shape, dtype = tuple(tensor.shape), tensor.dtype
                result.meta.append(MetaTensor(names[0], shape, dtype, tensor.nbytes, tensor))
                continue
            obstacle = _obstacle(tensor)
            if obstacle:
                nbytes = _bytes_of(tensor)
                result.immovable.append(Immovable(names[0], tensor.device, obstacle, nbytes))
                continue
            storage = tensor.untyped_storage()
            holding = by_storage.get(storage._cdata)
            if holding is None:
                origin = homes.origin_of(storage)
                device = tensor.device if origin is None or not origin.arrival else origin.home
                by_storage[storage._cdata] = Holding(
                    storage.nbytes(), device, found.kind, tensor.dtype, names, [tensor]
                )
            else:
                holding.names += names
                holding.tensors.append(tensor)
    result.holdings = list(by_storage.values())


def _bytes_of(tensor: torch.Tensor) -> int:
    """As far as they can be counted."""
    if tensor.layout is torch.sparse_coo:
        return int(tensor._indices().nbytes + tensor._values().nbytes)
    return tensor.untyped_storage().nbytes() if torch._C._has_storage(tensor) else 0


def _obstacle(tensor: torch.Tensor) -> str:
    """Why the bytes of this tensor cannot be moved; empty if they can."""
    if tensor.is_nested:
        return (
            "a strided nested tensor has no single storage geometry; "
            "build it with layout=torch.jagged"
        )
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}, which has no single storage; call .to_dense()"
    if tensor.is_quantized:
        return (
            "torch's own quantized tensors (qint8, ...) keep scales outside the storage; "
            "use torchao instead"
        )
    if getattr(tensor, "__dict__", {}).get("is_paged") is True:  # bitsandbytes' get_paged
        return (
            "it is managed memory of a paged optimizer of bitsandbytes, which the driver itself "
            "brings to the GPU and back; park the model, and leave the optimizer out"
        )
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "it belongs to a running functorch transform"
    try:
        storage = tensor.untyped_storage()
        # Asking that of a fake tensor, on the meta device in truth, warns or raises.
        is_real = storage.device.type != "meta"
        if is_real and (storage.data_ptr() != 0 or storage.nbytes() == 0):
            return ""
    except RuntimeError:  # a wrapper subclass: its storage has no data pointer to ask for
        pass
    return (
        f"{type(tensor).__name__} is a wrapper subclass without __tensor_flatten__: "
        "its bytes cannot be reached"
    )
