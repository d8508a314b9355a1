"""Finds every tensor an object holds by walking objects, not by asking `named_parameters`.

Quantized layers keep tensors where `nn.Module` does not look: quant states that hang on a weight,
plain attributes, lists, closures of hooks, the base of a view, the inner tensors of a wrapper
subclass. The walk goes through all of these.

It never enters classes, modules of code, or an `nn.Module` that is not the model's own. A module is
the model's own when it is
  - registered in one (`model.children()`),
  - found on the way from a root that is no module (a pipeline, a dict, another pack's wrapper), or
  - kept by a module of the model in a plain list, tuple or dict: so authors keep their own layers.
A module met elsewhere belongs to something else: through a hook, a closure, a plain object such as
diffusers' ComponentsManager, or an attribute set past `nn.Module.__setattr__` on purpose. So does a
module that contains the root: a back-reference.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import inspect
import io
import logging
import types
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, TypeGuard

import torch
from torch import nn

from ..slots import slots_of
from .addresses import LEAST, numbers_in


class Reach(IntEnum):
    """How an object was reached; decides whether an `nn.Module` found there is the model's own."""

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
        fixed: objects that hold raw device addresses (CUDA graphs), as (name, object). What they
            point to cannot move.
        numbers: integers that are large enough to be raw addresses, as (name, number).
        unreachable: wrapper subclasses whose inner tensors cannot be asked for, by `id`, and why.
    """

    tensors: dict[int, FoundTensor] = field(default_factory=dict)
    modules: dict[int, tuple[str, nn.Module]] = field(default_factory=dict)
    foreign: list[tuple[str, nn.Module]] = field(default_factory=list)
    fixed: list[tuple[str, object]] = field(default_factory=list)
    numbers: list[tuple[str, int]] = field(default_factory=list)
    unreachable: dict[int, str] = field(default_factory=dict)


def walk(roots: Iterable[tuple[str, object]], leave_out: Set[int] = frozenset()) -> Walk:
    """Walks everything reachable from `roots`, (name, object) pairs; an empty name adds no prefix.

    `leave_out` has the ids of tensors that belong to the whole process, such as the shared tables
    of a quantization library. They are not recorded.
    """
    walker = _Walker(leave_out)
    # Wrapper subclasses and modes (`with torch.device(...)`) answer attribute access through
    # __torch_function__; here the tensors' own Python attributes are wanted.
    with torch._C.DisableTorchFunction():
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
        # For this walk only: a longer cache would keep classes alive that were made for one model.
        self._visitor_of = functools.cache(_visitor_of)
        self._slots_of = functools.cache(slots_of)
        self._seen: dict[int, object] = {}  # alive, so that no id is used twice during the walk

    def run(self, roots: Iterable[tuple[str, object]]) -> None:
        for name, root in roots:
            if _is_module(root):
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
        """Records a tensor with what hangs on it, and queues what else may hold one, each once."""
        visitor = self._visitor_of(type(obj))  # type: ignore[arg-type]
        if visitor is _Walker._skip:
            if type(obj) is int and obj >= LEAST:
                self.result.numbers.append((name, obj))
            return
        key = id(obj)
        if key in self._seen:
            found = self.result.tensors.get(key)
            if (
                found is not None and name not in found.names
            ):  # inner tensors are attributes as well
                found.names.append(name)
        elif visitor is _Walker._tensor:
            self._seen[key] = obj
            if key not in self._leave_out:
                self.result.tensors[key] = FoundTensor(obj, kind, [name])  # type: ignore[arg-type]
                # At once: a quant state is then named after its weight, not after the module.
                self._tensor(obj, name)  # type: ignore[arg-type]
        elif not _is_module(obj) or key in self.result.modules or self._claim(obj, name, reach):
            self._seen[key] = obj
            self._queue.append((obj, name, reach, kind))

    def _claim(self, module: nn.Module, name: str, reach: Reach) -> bool:
        """Whether a module met for the first time is the model's own; a foreign one is noted."""
        own = self.result.modules
        contains_the_model = reach is Reach.OWN and any(
            id(child) in own for _name, child in _modules_below("", module)
        )
        if reach is Reach.BEYOND or contains_the_model:
            self.result.foreign.append((name, module))
            return False
        self._own(name, module)
        return True

    def _own(self, name: str, module: nn.Module) -> None:
        for child_name, child in _modules_below(name, module):
            self.result.modules.setdefault(id(child), (child_name, child))

    # One visitor for each shape of object ----------------------------------------------------

    def _skip(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        pass

    def _numbers(self, obj: Any, name: str, reach: Reach, kind: str) -> None:
        """Of ctypes and numpy. An array of objects may hold tensors as well."""
        if getattr(getattr(obj, "dtype", None), "kind", "") == "O":
            self._sequence(obj.reshape(-1).tolist(), name, reach, kind)
        else:
            self.result.numbers += [(name, number) for number in numbers_in(obj)]

    def _fixed(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        self.result.fixed.append((name, obj))

    def _tensor(self, tensor: torch.Tensor, name: str) -> None:
        if hasattr(type(tensor), "__tensor_flatten__"):
            try:
                inner_names, _context = tensor.__tensor_flatten__()  # type: ignore[attr-defined]
                parts = [(f"{name}.{inner}", getattr(tensor, inner)) for inner in inner_names]
            except Exception as error:  # the author's own code
                parts, reason = [], f"its __tensor_flatten__ raises {type(error).__name__}: {error}"
                self.result.unreachable[id(tensor)] = reason
            for inner, part in parts:
                self._push(part, inner, Reach.BEYOND, _INNER)
        for attribute, value in tensor.__dict__.items():
            self._push(value, f"{name}.{attribute}", Reach.BEYOND, _QUANTIZATION)
        # A view holds its base in C++. (An inference tensor has no base to ask for.)
        if not tensor.is_inference() and tensor._base is not None:
            self._push(tensor._base, f"{name}._base", Reach.BEYOND, _BASE)
        if tensor.is_leaf and tensor.grad is not None:  # .grad of a non-leaf warns
            self._push(tensor.grad, f"{name}.grad", Reach.BEYOND, _GRADIENT)
        if tensor._backward_hooks:
            self._push(tensor._backward_hooks, f"{name}._backward_hooks", Reach.BEYOND, _CAPTURED)

    def _module(self, module: nn.Module, name: str, reach: Reach, kind: str) -> None:
        prefix = f"{name}." if name else ""
        # One that never called super().__init__() has none of these.
        registered: tuple[tuple[Mapping[str, object], str], ...] = (
            (_read(module, "_modules") or {}, _STATE),
            (_read(module, "_parameters") or {}, _PARAMETER),
            (_read(module, "_buffers") or {}, _BUFFER),
        )
        for named, its_kind in registered:
            for attribute, value in named.items():
                self._push(value, prefix + attribute, Reach.OWN, its_kind)
        for attribute, value in self._attributes_of(module):
            if attribute in _REGISTERED:
                continue
            is_hook = "hook" in attribute
            deliberate = _is_module(value)  # nn.Module.__setattr__ would have registered it
            reach = Reach.BEYOND if deliberate or is_hook else Reach.OWN
            self._push(value, prefix + attribute, reach, _CAPTURED if is_hook else _STATE)
        if isinstance(module, torch.jit.ScriptModule):
            script = module._c
            methods = [script._get_method(method) for method in script._method_names()]
            self._constants(methods, name, reach)
            for method, examples in script._retrieve_traced_inputs().items():
                self._push(list(examples), f"{name}.<traced {method}>", reach, _CAPTURED)

    def _script_function(self, function: Any, name: str, reach: Reach, kind: str) -> None:
        self._constants([function], name, _beyond(reach))

    def _constants(self, methods: Iterable[Any], name: str, reach: Reach) -> None:
        """What TorchScript keeps in code: weights of a frozen module, tensors of a traced one."""
        for method in methods:
            for node in method.graph.findAllNodes("prim::Constant", recurse=True):
                kind = node.kindOf("value") if node.hasAttribute("value") else ""
                if kind in ("t", "ts", "ival"):
                    value = getattr(node, kind)("value")
                    constant = f"{name}.<constant>.{node.output().debugName()}"
                    self._push(value, constant, reach, _CAPTURED)

    def _mapping(self, mapping: Mapping[Any, Any], name: str, reach: Reach, kind: str) -> None:
        for index, (key, value) in enumerate(mapping.items()):
            if isinstance(key, str):
                self._push(value, f"{name}.{key}" if name else key, reach, kind)
            elif isinstance(key, int):
                self._push(key, f"a key of {name}", reach, kind)
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
        """Of an extension type (lru_cache, an iterator): only the garbage collector sees inside."""
        for index, value in enumerate(gc.get_referents(obj)):
            self._push(value, f"{name}.<referent {index}>", _beyond(reach), kind)

    def _attributes(self, obj: object, name: str, reach: Reach, kind: str) -> None:
        prefix = f"{name}." if name else ""
        for attribute, value in self._attributes_of(obj):
            self._push(value, prefix + attribute, reach, kind)

    def _attributes_of(self, obj: object) -> Iterator[tuple[str, object]]:
        """The attributes of an object, without the bulk that can hold no tensor."""
        named = _read(obj, "__dict__") or {}
        slots = self._slots_of(type(obj))  # type: ignore[arg-type]
        if slots:
            named = named | {slot: _read(obj, slot) for slot in slots}
        for attribute, value in named.items():
            cls = type(value)
            if cls is int:
                if value >= LEAST:
                    yield attribute, value
            elif cls not in _BUILT_IN or (value and cls not in _PLAIN):
                yield attribute, value


_REGISTERED = frozenset({"_modules", "_parameters", "_buffers"})
_PLAIN = frozenset({type(None), bool, int, float, str, type, torch.dtype, torch.device, torch.Size})
_BUILT_IN = _PLAIN | {dict, OrderedDict, list, tuple, set}  # an empty one holds nothing

_SKIPPED = (
    # code
    (type, types.ModuleType, types.CodeType, types.FrameType, types.TracebackType)
    + (types.BuiltinFunctionType, types.GenericAlias, types.UnionType)
    + (property, staticmethod, classmethod, inspect.Signature, inspect.Parameter)
    # plain values
    + (type(None), bool, int, float, complex, str, bytes, bytearray, memoryview)
    + (range, slice, type(Ellipsis), torch.dtype, torch.device, torch.layout)
    + (torch.memory_format, torch.Size, torch.Generator, torch.UntypedStorage)
    # what belongs to somebody else
    + (weakref.ReferenceType, weakref.ProxyType, weakref.CallableProxyType)
    + (logging.Logger, io.IOBase)
)


# CUDA's, and those of `torch.accelerator.Graph` (from 2.13) and XPU, where PyTorch has them.
_GRAPHS = (torch.cuda.CUDAGraph,) + tuple(
    getattr(torch._C, name)
    for name in ("_acceleratorGraph", "_XPUGraph")
    if hasattr(torch._C, name)
)


def _visitor_of(cls: type) -> Callable[..., None]:
    if issubclass(cls, torch.Tensor):
        return _Walker._tensor
    if issubclass(cls, nn.Module):
        return _Walker._module
    if issubclass(cls, _GRAPHS):
        return _Walker._fixed
    if issubclass(cls, (ctypes._SimpleCData, ctypes.Array, ctypes._Pointer)) or any(
        base.__module__ == "numpy" and base.__name__ in ("ndarray", "integer")
        for base in cls.__mro__
    ):
        return _Walker._numbers
    if issubclass(cls, _SKIPPED) or cls.__module__ in ("numpy", "threading", "_thread", "enum"):
        return _Walker._skip
    # Another mapping may load what it is asked for (accelerate's offloaded weights).
    if issubclass(cls, dict):
        return _Walker._mapping
    if issubclass(cls, (list, tuple, set, frozenset, deque)):
        return _Walker._sequence
    if cls is types.FunctionType:
        return _Walker._function
    if cls is types.MethodType:
        return _Walker._method
    if issubclass(cls, functools.partial):
        return _Walker._partial
    if issubclass(cls, torch.jit.ScriptFunction):
        return _Walker._script_function
    if cls is not functools._lru_cache_wrapper and (cls.__dictoffset__ or slots_of(cls)):
        return _Walker._object
    return _Walker._opaque


def _modules_below(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, which fails where one never called super().__init__()."""
    pending, seen = [(name, module)], set[int]()
    while pending:
        name, module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        children = [*(_read(module, "_modules") or {}).items()]
        prefix = f"{name}." if name else ""
        pending += [(prefix + key, child) for key, child in reversed(children) if child is not None]


def _is_module(obj: object) -> TypeGuard[nn.Module]:
    """Also for a proxy of a module; one that is not bound raises when its class is asked for."""
    try:
        return isinstance(obj, nn.Module)
    except Exception:
        return False


def _read(obj: object, attribute: str) -> Any:
    """The attribute; None for one that is not set, and where the author's own code raises."""
    try:
        return getattr(obj, attribute, None)
    except Exception:
        return None


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
