"""Functions of PyTorch that take a tensor past its class: a tensor that is away comes home first.

They are wrapped when the first model is parked, for the rest of the process, as nothing else is
asked: the transforms of `torch.func`, `swap_tensors`, `to_dlpack`, and the grouping of tensors for
foreach operators. Given only tensors that are home, each calls the original.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils.dlpack
from torch._functorch import eager_transforms

from . import streaming
from .away_tensors import bring_home, meet

_wrapped = False


def guard() -> None:
    """Wraps them once."""
    global _wrapped
    if _wrapped:
        return
    _wrapped = True
    _guard(eager_transforms, "_wrap_tensor_for_grad", bring_home)
    _guard(eager_transforms, "_maybe_wrap_functional_tensor", bring_home)
    _guard(torch.utils, "swap_tensors", _be_all_there)  # it refuses weak references, our own too
    _guard(torch.utils.dlpack, "to_dlpack", bring_home)
    _guard(torch._C, "_group_tensors_by_device_and_dtype", meet)


def _be_all_there(objects: Any) -> None:
    bring_home(objects)
    streaming.wait_for()


def _guard(module: Any, name: str, first: Any) -> None:
    function = getattr(module, name)

    @functools.wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        first((args, kwargs))
        return function(*args, **kwargs)

    setattr(module, name, guarded)
