"""Finds every tensor an object holds by walking objects, not by asking `named_parameters`.

Quantized layers keep tensors where `nn.Module` does not look: quant states that hang on a weight, plain attributes,
lists, closures of hooks, the base of a view, the inner tensors of a wrapper subclass. The walk goes through all of these.

Where it stops matters as much. It never enters classes, modules of code, or an `nn.Module` that is not the model's own.
A module is the model's own when it is
  - registered in one (`model.children()`),
  - found on the way from a root that is no module (a pipeline, a dict, another pack's wrapper), or
  - kept by a module of the model in a plain list, tuple or dict: authors do this when they mean their own layers.
A module met elsewhere (through a hook, a closure, a plain object such as diffusers' ComponentsManager, or an attribute set
past `nn.Module.__setattr__` on purpose) belongs to somebody else. So does one that contains the root: a back-reference.
"""

from __future__ import annotations

import functools
import gc
import inspect
import io
import itertools
import logging
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import nn


class Reach(IntEnum):
    """How an object was come by; decides whose an `nn.Module` found there is."""

    ROOT = 0  # not below any module
    OWN = 1  # below a module, through registered names and plain containers only
    BEYOND = 2  # below a module, through a hook, a function, another object, or a tensor


@dataclass(slots=True)
class FoundTensor:
    """One tensor object, with every name it is reached by; `kind` is what it was when first met."""

    tensor: torch.Tensor
    kind: str
    names: list[str]


@dataclass
class Walk:
    """What a walk found. Holds strong references: keep it no longer than a move lasts.

    Attributes:
        tensors: by `id`, in the order in which they were met.
        modules: the model's own modules, by `id`, with their names.
        foreign: modules at which the walk stopped, as (name, module).
        fixed: objects that hold raw device addresses (CUDA graphs), as (name, object): what they point to cannot move.
    """

    tensors: dict[int, FoundTensor] = field(default_factory=dict)
    modules: dict[int, tuple[str, nn.Module]] = field(default_factory=dict)
    foreign: list[tuple[str, nn.Module]] = field(default_factory=list)
    fixed: list[tuple[str, object]] = field(default_factory=list)


def walk(roots: Iterable[tuple[str, object]], leave_out: Set[int] = frozenset()) -> Walk:
    """Walks everything reachable from `roots`, (name, object) pairs; an empty name adds no prefix.

    `leave_out` has the ids of tensors that belong to the whole process rather than to the model, such as the shared tables
    of a quantization library; they are not recorded.
    """
    walker = _Walker(leave_out)
    # Wrapper subclasses answer attribute access through __torch_function__; here their own Python attributes are wanted.
    with torch._C.DisableTorchFunctionSubclass():
        walker.run(roots)
    return walker.result


_PARAMETER, _BUFFER, _GRADIENT, _BASE = "parameter", "buffer", "gradient", "base of a view"
_INNER, _QUANTIZATION = "inner tensor", "quantization state"
_STATE = "state"  # a plain attribute of a module, or an object there
_CAPTURED = "captured"  # by a hook or a function
_TENSOR, _ATTRIBUTE = "tensor", "attribute"  # given as such; of an object that is no module

_Item = tuple[object, str, Reach, str]  # object, name, reach, kind for a tensor found here


class _Walker:
    def __init__(self, leave_out: Set[int]) -> None:
        self.result = Walk()
        self._leave_out = leave_out
        self._queue: deque[_Item] = deque()
        # For this walk only: a cache that outlives it would keep classes alive that were made for one model.
        self._visitor_of = functools.cache(_visitor_of)
        self._slots_of = functools.cache(slots_of)
        self._seen: dict[
            int, object
        ] = {}  # keeps what was seen alive, so that no id is used twice during the walk

    def run(self, roots: Iterable[tuple[str, object]]) -> None:
        for name, root in roots:
            if isinstance(root, nn.Module):
                self._own(name, root)
            self._push(root, name, Reach.ROOT, _TENSOR)
        while self._queue:
            item = self._queue.popleft()
            self._visitor_of(type(item[0]))(self, *item)  # type: ignore[arg-type]
        result = self.result
        result.foreign = [
            (name, module) for name, module in result.foreign if id(module) not in result.modules
        ]

    def _push(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        if self._visitor_of(type(obj)) is _Walker._skip:  # type: ignore[arg-type]
            return
        if id(obj) in self._seen:
            found = self.result.tensors.get(id(obj))
            if (
                found is not None and name not in found.names
            ):  # inner tensors are attributes as well
                found.names.append(name)
            return
        if (
            isinstance(obj, nn.Module)
            and id(obj) not in self.result.modules
            and not self._claim(obj, name, reach)
        ):
            return
        self._seen[id(obj)] = obj
        if isinstance(obj, torch.Tensor):
            if id(obj) in self._leave_out:
                return
            self.result.tensors[id(obj)] = FoundTensor(obj, kind, [name])
            self._tensor(
                obj, name
            )  # at once: a quant state is then named after its weight, not after the module
        else:
            self._queue.append((obj, name, reach, kind))

    def _claim(self, module: nn.Module, name: str, reach: Reach) -> bool:
        """Whether a module met for the first time is the model's own; a foreign one is noted."""
        own = self.result.modules
        contains_the_model = reach is Reach.OWN and any(
            id(child) in own for child in module.modules()
        )
        if reach is Reach.BEYOND or contains_the_model:
            self.result.foreign.append((name, module))
            return False
        self._own(name, module)
        return True

    def _own(self, name: str, module: nn.Module) -> None:
        for child_name, child in module.named_modules(prefix=name):
            self.result.modules.setdefault(id(child), (child_name, child))

    # One visitor for each shape of object ------------------------------------------------------------------------

    def _skip(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        pass

    def _fixed(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        self.result.fixed.append((name, obj))

    def _tensor(self, tensor: torch.Tensor, name: str) -> None:
        if hasattr(type(tensor), "__tensor_flatten__"):
            inner_names, _context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
            for inner in inner_names:
                self._push(getattr(tensor, inner), f"{name}.{inner}", Reach.BEYOND, _INNER)
        for attribute, value in tensor.__dict__.items():
            self._push(value, f"{name}.{attribute}", Reach.BEYOND, _QUANTIZATION)
        # The base of a view is held in C++ and keeps its storage alive. (An inference tensor has no base to ask for.)
        if not tensor.is_inference() and tensor._base is not None:
            self._push(tensor._base, f"{name}._base", Reach.BEYOND, _BASE)
        if tensor.is_leaf and tensor.grad is not None:  # .grad of a non-leaf warns
            self._push(tensor.grad, f"{name}.grad", Reach.BEYOND, _GRADIENT)
        if tensor._backward_hooks:
            self._push(tensor._backward_hooks, f"{name}._backward_hooks", Reach.BEYOND, _CAPTURED)

    def _module(self, module: nn.Module, name: str, reach: Reach, kind: str) -> None:
        prefix = f"{name}." if name else ""
        for child_name, child in module._modules.items():
            if child is not None:
                self._push(child, prefix + child_name, Reach.OWN, _STATE)
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None:
                self._push(parameter, prefix + parameter_name, Reach.OWN, _PARAMETER)
        for buffer_name, buffer in module._buffers.items():
            if buffer is not None:
                self._push(buffer, prefix + buffer_name, Reach.OWN, _BUFFER)
        slots = ((slot, getattr(module, slot, None)) for slot in self._slots_of(type(module)))  # type: ignore[arg-type]
        for attribute, value in itertools.chain(module.__dict__.items(), slots):
            if attribute in _REGISTERED or not _may_hold(value):
                continue
            is_hook = "hook" in attribute
            deliberate = isinstance(
                value, nn.Module
            )  # nn.Module.__setattr__ would have registered it
            reach = Reach.BEYOND if deliberate or is_hook else Reach.OWN
            self._push(value, prefix + attribute, reach, _CAPTURED if is_hook else _STATE)

    def _mapping(self, mapping: Mapping[Any, Any], name: str, reach: Reach, kind: str) -> None:
        for index, (key, value) in enumerate(mapping.items()):
            if isinstance(key, str):
                self._push(value, f"{name}.{key}" if name else key, reach, kind)
            elif isinstance(key, int):
                self._push(value, f"{name}[{key}]", reach, kind)
            else:  # an optimizer's state has parameters for keys
                self._push(key, f"{name}.keys()[{index}]", reach, kind)
                self._push(value, f"{name}.values()[{index}]", reach, kind)
        self._attributes(mapping, name, reach, kind)

    def _sequence(self, sequence: Iterable[object], name: str, reach: Reach, kind: str) -> None:
        for index, value in enumerate(sequence):
            self._push(value, f"{name}[{index}]", reach, kind)
        self._attributes(sequence, name, reach, kind)

    def _function(self, function: types.FunctionType, name: str, reach: Reach, kind: str) -> None:
        for variable, cell in zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        ):
            if not _is_empty(cell):
                self._push(
                    cell.cell_contents, f"{name}.<closure>.{variable}", _beyond(reach), _CAPTURED
                )
        for value in (function.__defaults__, function.__kwdefaults__):
            self._push(value, f"{name}.<defaults>", _beyond(reach), _CAPTURED)
        self._push(function.__dict__, name, _beyond(reach), _CAPTURED)

    def _method(self, method: types.MethodType, name: str, reach: Reach, kind: str) -> None:
        self._push(method.__self__, f"{name}.__self__", _beyond(reach), _CAPTURED)
        self._push(method.__func__, name, _beyond(reach), _CAPTURED)

    def _partial(self, partial: functools.partial[Any], name: str, reach: Reach, kind: str) -> None:
        self._push(partial.func, f"{name}.func", _beyond(reach), _CAPTURED)
        self._push(partial.args, f"{name}.args", _beyond(reach), _CAPTURED)
        self._push(partial.keywords, f"{name}.keywords", _beyond(reach), _CAPTURED)

    def _object(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        self._attributes(obj, name, _beyond(reach), _ATTRIBUTE if kind is _TENSOR else kind)

    def _opaque(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        """An object of an extension type (an lru_cache, an iterator): only the garbage collector sees inside."""
        for index, value in enumerate(gc.get_referents(obj)):
            self._push(value, f"{name}.<referent {index}>", _beyond(reach), kind)

    def _attributes(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        prefix = f"{name}." if name else ""
        for attribute, value in getattr(obj, "__dict__", {}).items():
            if _may_hold(value):
                self._push(value, prefix + attribute, reach, kind)
        for slot in self._slots_of(type(obj)):  # type: ignore[arg-type]
            value = getattr(obj, slot, None)
            if _may_hold(value):
                self._push(value, prefix + slot, reach, kind)


_REGISTERED = frozenset({"_modules", "_parameters", "_buffers"})

_SKIPPED: tuple[type, ...] = (
    *(
        type,
        types.ModuleType,
        types.CodeType,
        types.FrameType,
        types.TracebackType,
        types.BuiltinFunctionType,
    ),
    *(
        types.GenericAlias,
        types.UnionType,
        property,
        staticmethod,
        classmethod,
        inspect.Signature,
        inspect.Parameter,
    ),
    *(
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        memoryview,
        range,
        slice,
        type(Ellipsis),
    ),
    *(
        torch.dtype,
        torch.device,
        torch.layout,
        torch.memory_format,
        torch.Generator,
        torch.Size,
        torch.UntypedStorage,
    ),
    *(
        weakref.ReferenceType,
        weakref.ProxyType,
        weakref.CallableProxyType,
        logging.Logger,
        io.IOBase,
    ),
)


def _visitor_of(cls: type) -> Callable[..., None]:
    if issubclass(cls, nn.Module):
        return _Walker._module
    if issubclass(cls, torch.cuda.CUDAGraph):
        return _Walker._fixed
    if issubclass(cls, _SKIPPED) or cls.__module__ in ("numpy", "threading", "_thread", "enum"):
        return _Walker._skip
    if issubclass(
        cls, dict
    ):  # another mapping may load what it is asked for (accelerate's offloaded weights): see its attributes
        return _Walker._mapping
    if issubclass(cls, (list, tuple, set, frozenset, deque)):
        return _Walker._sequence
    if cls is types.FunctionType:
        return _Walker._function
    if cls is types.MethodType:
        return _Walker._method
    if issubclass(cls, functools.partial):
        return _Walker._partial
    if cls is not functools._lru_cache_wrapper and (cls.__dictoffset__ or slots_of(cls)):  # type: ignore[arg-type]
        return _Walker._object
    return _Walker._opaque


_ATOMS = frozenset({type(None), bool, int, float, str, type, torch.dtype, torch.device, torch.Size})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})


def _may_hold(value: object) -> bool:
    """Rules out, cheaply, the bulk of what a module's `__dict__` has: plain values and empty hook dictionaries."""
    cls = type(value)
    return cls not in _ATOMS and (cls not in _CONTAINERS or bool(value))


def _beyond(reach: Reach) -> Reach:
    return Reach.ROOT if reach is Reach.ROOT else Reach.BEYOND


def _is_empty(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except (
        ValueError
    ):  # a variable of the enclosing function that was not assigned yet, or was deleted
        return True
    return False


def slots_of(cls: type) -> tuple[str, ...]:
    """The names of all `__slots__` of a class and its bases that hold a value of an instance."""
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
