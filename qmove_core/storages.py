"""Lets tensors look into another storage, with the geometry they had. They stay the same objects.

`tensor.data = view` exchanges what a tensor looks at and keeps its identity, its Python attributes,
`requires_grad` and hooks, across devices too (`set_` refuses to cross them). It does not bump
`_version`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

EMPTY = torch.UntypedStorage(0)  # stands where a storage was dropped

# `torch.empty`, past what replaces it for the whole process: accelerate's `init_empty_weights`.
empty = torch._C._VariableFunctions.empty


def use_count(storage: torch.UntypedStorage) -> int:
    """How many tensors look into a storage, and one for `storage` itself."""
    return torch._C._storage_Use_Count(storage._cdata)  # type: ignore[attr-defined, no-any-return]


def rebind(tensors: Iterable[torch.Tensor], storage: torch.UntypedStorage) -> None:
    """Makes `tensors`, which share one storage, look into `storage` with the same geometry."""
    rebind_all([(tensors, storage)])


def rebind_all(
    moves: Iterable[tuple[Iterable[torch.Tensor], torch.UntypedStorage]],
) -> None:
    """`rebind` for many storages. What raises leaves those before it in their new place."""
    with torch.no_grad(), torch._C.DisableTorchFunction():
        in_inference_mode = torch.is_inference_mode_enabled()
        for tensors, storage in moves:
            for tensor in tensors:
                is_inference = tensor.is_inference()
                if is_inference == in_inference_mode:
                    _look_into(tensor, storage)
                else:
                    # Outside inference mode an inference tensor refuses new data; inside it a
                    # normal one would become one.
                    with torch.inference_mode(is_inference):
                        _look_into(tensor, storage)


def _look_into(tensor: torch.Tensor, storage: torch.UntypedStorage) -> None:
    view = empty(0, dtype=tensor.dtype, device=storage.device).set_(
        storage, tensor.storage_offset(), tensor.size(), tensor.stride()
    )
    if tensor.is_conj():
        view = view.conj()
    if tensor.is_neg():
        view = torch._neg_view(view)
    tensor.data = view


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole storage as a flat uint8 tensor that shares its memory.

    Call it outside inference mode.
    """
    return empty(0, dtype=torch.uint8, device=storage.device).set_(
        storage, 0, (storage.nbytes(),), (1,)
    )


def tensor_over(
    storage: torch.UntypedStorage, dtype: torch.dtype, shape: Sequence[int]
) -> torch.Tensor:
    """A contiguous tensor at the start of `storage`, which shares its memory."""
    strides = empty(tuple(shape), device="meta").stride()
    with torch.inference_mode(False):
        return empty(0, dtype=dtype, device=storage.device).set_(storage, 0, tuple(shape), strides)


def stand_in(tensor: torch.Tensor, content: torch.Tensor) -> torch.Tensor:
    """A tensor that shares the memory of `content` and is otherwise as `tensor`; for `exchange`."""
    with (
        torch.no_grad(),
        torch._C.DisableTorchFunctionSubclass(),
        torch.inference_mode(tensor.is_inference()),
    ):
        shared = empty(0, dtype=content.dtype, device=content.device).set_(
            content.untyped_storage(), content.storage_offset(), content.size(), content.stride()
        )
        return shared.requires_grad_(tensor.requires_grad)


def exchange(tensor: torch.Tensor, other: torch.Tensor) -> None:
    """Lets two tensors exchange what they look at.

    It also works where `tensor.data = ...` refuses: from and to the meta device. Both keep their
    identity, class, attributes and weak references. Doing it again undoes it.
    """
    with torch._C.DisableTorchFunctionSubclass():
        torch._C._swap_tensor_impl(tensor, other)
