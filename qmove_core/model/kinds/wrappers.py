"""Wrapper subclasses (torchao, optimum-quanto): an outer tensor around those that have bytes.

The inner tensors move like all others and stay the objects they were. What remains is the outer
tensor's device, which is fixed at its birth: an empty shell of the same class and geometry is made
for the new device, and the old object takes over what the shell has in C++. Assigning `data` does
this and, unlike `torch.utils.swap_tensors`, keeps the object's attributes and the weak references
to it.

The subclass's own `__tensor_unflatten__` is asked only where a shell cannot be made without it. It
may refuse the host (quanto's packing for Marlin and AWQ asserts that it is on CUDA), or take the
device from its context, which names the old one (torchao's NF4Tensor).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch

from ...actions import Action
from ...class_variants import own_class
from ...errors import CannotMove
from ...homes import parked_home
from ..holdings import Inventory
from .base import Kind

# Classes whose bytes are laid out for the kernels of one device type. Parked and restored they are
# exact like all others.
_PACKED_FOR_KERNELS = frozenset({
    # optimum-quanto
    "AWQPackedTensor", "MarlinF8PackedTensor", "MarlinInt4PackedTensor", "TinyGemmPackedTensor",
    # torchao
    "Int4OpaqueTensor", "Int4PlainInt32Tensor", "Int4PreshuffledTensor", "Int4Tensor",
    "Int4TilePackedTo4dTensor", "Float8OpaqueTensor", "IntxOpaqueTensor",
    # torchao up to 0.13: what is inside an AffineQuantizedTensor
    "BlockSparseAQTTensorImpl", "CutlassSemiSparseTensorImpl", "DA8W4CPUAQTTensorImpl",
    "FloatxTensorCoreAQTTensorImpl", "GemliteAQTTensorImpl", "Int4CPUAQTTensorImpl",
    "Int4PackedTensorImpl", "Int4XPUAQTTensorImpl", "MarlinQQQAQTTensorImpl",
    "MarlinSparseAQTTensorImpl", "PackedLinearInt8DynamicActivationIntxWeightAQTTensorImpl",
    "SemiSparseAQTTensorImpl", "TensorCoreTiledAQTTensorImpl",
})  # fmt: skip


class WrapperSubclasses(Kind):
    """Every class with `__tensor_flatten__`, nested ones too."""

    def obstacles(self, inventory: Inventory, device: torch.device) -> list[tuple[str, str]]:
        found = []
        for name, outer in inventory.wrappers:
            packed_for = (parked_home(outer) or _outer_device(outer)).type
            if type(outer).__name__ in _PACKED_FOR_KERNELS and packed_for != device.type:
                packed = f"{type(outer).__name__} is packed for the kernels of {packed_for}"
                found.append((name, f"{packed}, and {device.type} has none for it"))
        return found

    def refresh(self, inventory: Inventory) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            wanted = [(outer, _inner_device(outer)) for _name, outer in inventory.wrappers]
            # All shells first: what can fail fails before anything has changed.
            shells = [
                (outer, _shell(outer, device))
                for outer, device in wanted
                if _outer_device(outer) != device
            ]
            for outer, shell in shells:
                # An inference tensor sends this assignment to the subclass's __torch_dispatch__,
                # which knows nothing of the shell.
                with torch.inference_mode(outer.is_inference()), torch._C._DisableTorchDispatch():
                    torch.Tensor.data.__set__(outer, shell)  # type: ignore[attr-defined]


def _outer_device(outer: Any) -> torch.device:
    """What the tensor itself says; a subclass may have put a property of its own over `device`."""
    return torch.Tensor.device.__get__(outer)  # type: ignore[attr-defined, no-any-return]


def _inner_device(tensor: Any) -> torch.device:
    """The device of the first innermost tensor, which decides where outer tensors are made."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return tensor.device  # type: ignore[no-any-return]
    names, _context = tensor.__tensor_flatten__()
    return _inner_device(getattr(tensor, names[0])) if names else _outer_device(tensor)


def is_wrapper(tensor: torch.Tensor) -> bool:
    return hasattr(type(tensor), "__tensor_flatten__")


def outers(outer: Any) -> Iterator[torch.Tensor]:
    """A wrapper, and those inside it."""
    if is_wrapper(outer):
        yield outer
        for inner in _parts_of(outer):
            yield from outers(inner)


def innermost(outer: Any) -> list[torch.Tensor]:
    """The tensors that have the bytes of a wrapper, in the order of its class; of a plain tensor
    itself."""
    if not is_wrapper(outer):
        return [outer]
    return [tensor for inner in _parts_of(outer) for tensor in innermost(inner)]


def _parts_of(outer: Any) -> list[torch.Tensor]:
    with torch._C.DisableTorchFunctionSubclass():
        names, _context = outer.__tensor_flatten__()
        return [getattr(outer, name) for name in names]


def empty_like(outer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the class and geometry of a wrapper, for `device`, without its inner tensors."""
    with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
        return _shell(outer, device)


def _shell(outer: Any, device: torch.device) -> torch.Tensor:
    """A tensor of the same class and geometry for `device`, if possible without inner tensors."""
    cls, plain = own_class(outer), cast(Any, torch.Tensor)
    size, stride = plain.size(outer), plain.stride(outer)
    with torch.inference_mode(outer.is_inference()):
        if all(type(length) is int for length in size):
            made = plain._make_wrapper_subclass(
                cls,
                size,
                strides=stride,
                storage_offset=plain.storage_offset(outer),
                dtype=plain.dtype.__get__(outer),
                layout=plain.layout.__get__(outer),
                device=device,
            )
            return made  # type: ignore[no-any-return]
        # Jagged nested tensors: only they know what their size means.
        names, context = outer.__tensor_flatten__()
        inner = {name: getattr(outer, name) for name in names}
        try:
            rebuilt: torch.Tensor = cast(Any, cls).__tensor_unflatten__(
                inner, context, size, stride
            )
        except Exception as error:
            reason = f"its __tensor_unflatten__ raises {type(error).__name__}: {error}"
            action = Action("rebuild", outer, f"on {device}")
            raise CannotMove(action, [(cls.__qualname__, reason)]) from error
        return rebuilt
