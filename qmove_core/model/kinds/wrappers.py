"""Wrapper subclasses (torchao, optimum-quanto, DTensor-like): an outer tensor without bytes around inner tensors that have them.

The inner tensors move like all others and stay the objects they were. What remains is the outer tensor's device, which is fixed
at its birth: an empty shell of the same class and geometry is made for the new device, and the old object takes over what the
shell has in C++. Assigning `data` does this and, unlike `torch.utils.swap_tensors`, keeps the object's attributes and the weak
references to it.

The subclass's own `__tensor_unflatten__` is asked only where a shell cannot be made without it. It may refuse the host (quanto's
packing for Marlin and AWQ asserts that it is on CUDA), or take the device from its context, which names the old one (torchao's
NF4Tensor).
"""

from __future__ import annotations

import torch

from ...actions import Action
from ...errors import CannotMove
from ...homes import parked_home
from ..holdings import Inventory
from .base import Kind

# Classes whose bytes are laid out for the kernels of one device type. Parked and restored they are exact like all others.
_PACKED_FOR_KERNELS = frozenset(
    {
        # optimum-quanto
        *(
            "AWQPackedTensor",
            "MarlinF8PackedTensor",
            "MarlinInt4PackedTensor",
            "TinyGemmPackedTensor",
        ),
        # torchao
        *(
            "Int4OpaqueTensor",
            "Int4PlainInt32Tensor",
            "Int4PreshuffledTensor",
            "Int4Tensor",
            "Int4TilePackedTo4dTensor",
        ),
        *("Float8OpaqueTensor", "IntxOpaqueTensor"),
    }
)


class WrapperSubclasses(Kind):
    """Every class with `__tensor_flatten__`, nested ones too."""

    def obstacles(self, inventory: Inventory, device: torch.device) -> list[tuple[str, str]]:
        found = []
        for name, outer in inventory.wrappers:
            packed_for = (parked_home(outer) or _outer_device(outer)).type
            if type(outer).__name__ in _PACKED_FOR_KERNELS and packed_for != device.type:
                reason = f"{type(outer).__name__} is packed for the kernels of {packed_for}, and {device.type} has none for it"
                found.append((name, reason))
        return found

    def refresh(self, inventory: Inventory) -> None:
        with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
            misplaced = [(outer, _inner_device(outer)) for _name, outer in inventory.wrappers]
            # All shells first: what can fail fails before anything has changed.
            shells = [
                (outer, _shell(outer, device))
                for outer, device in misplaced
                if _outer_device(outer) != device
            ]
            for outer, shell in shells:
                _adopt(outer, shell)


def _outer_device(outer: torch.Tensor) -> torch.device:
    """What the tensor itself says; a subclass may have put a property of its own over `device`."""
    return torch.Tensor.device.__get__(outer)  # type: ignore[attr-defined]


def _inner_device(tensor: torch.Tensor) -> torch.device:
    """Where the first of the innermost tensors is. Outer tensors are born on the device of their data, which comes first."""
    if not hasattr(type(tensor), "__tensor_flatten__"):
        return tensor.device
    names, _context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
    return _inner_device(getattr(tensor, names[0])) if names else _outer_device(tensor)


def _shell(outer: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the same class and geometry for `device`. It has no inner tensors where it can do without."""
    size, stride = torch.Tensor.size(outer), torch.Tensor.stride(outer)
    with torch.inference_mode(outer.is_inference()):
        if all(type(length) is int for length in size):
            return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
                type(outer),
                size,
                strides=stride,
                storage_offset=torch.Tensor.storage_offset(outer),
                dtype=torch.Tensor.dtype.__get__(outer),  # type: ignore[attr-defined]
                layout=torch.Tensor.layout.__get__(outer),  # type: ignore[attr-defined]
                device=device,
            )
        return _unflattened(
            outer, device, size, stride
        )  # jagged nested tensors: only they know what their size means


def _unflattened(
    outer: torch.Tensor, device: torch.device, size: torch.Size, stride: tuple[int, ...]
) -> torch.Tensor:
    names, context = outer.__tensor_flatten__()  # type: ignore[attr-defined]
    inner = {name: getattr(outer, name) for name in names}
    try:
        return type(outer).__tensor_unflatten__(inner, context, size, stride)  # type: ignore[attr-defined, no-any-return]
    except Exception as error:
        reason = f"its __tensor_unflatten__ raises {type(error).__name__}: {error}"
        raise CannotMove(
            Action("rebuild", outer, f"on {device}"), [(type(outer).__qualname__, reason)]
        ) from error


def _adopt(outer: torch.Tensor, shell: torch.Tensor) -> None:
    # An inference tensor sends this assignment to the subclass's __torch_dispatch__, which knows nothing of the shell.
    with torch.inference_mode(outer.is_inference()), torch._C._DisableTorchDispatch():
        torch.Tensor.data.__set__(outer, shell)  # type: ignore[attr-defined]
