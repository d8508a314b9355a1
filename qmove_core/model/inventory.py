"""What a model holds: its storages, with every tensor that looks into them, and its meta tensors."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import readable_bytes
from . import kinds
from .walk import FoundTensor, Walk, walk


@dataclass(slots=True)
class Holding:
    """One storage of a model, and every tensor object of the model that looks into it.

    Attributes:
        nbytes: size of the storage, not of one view of it.
        device: where the storage was when the inventory was taken.
        kind: "parameter", "buffer", "gradient", "quantization state", "inner tensor", "base of a view"; "state" for plain
            attributes of modules, "captured" by hooks and functions, "attribute" of other objects, or "tensor".
        dtype: of the first tensor.
        names: all names the tensors are reached by, the first met first.
        tensors: the tensor objects. They stay the same objects wherever the bytes go.
    """

    nbytes: int
    device: torch.device
    kind: str
    dtype: torch.dtype
    names: list[str]
    tensors: list[torch.Tensor]

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def storage(self) -> torch.UntypedStorage:
        """The storage the tensors look into now."""
        return self.tensors[0].untyped_storage()


@dataclass(frozen=True, slots=True)
class MetaTensor:
    """A tensor without data; `nbytes` is what it would take."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    tensor: torch.Tensor = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Immovable:
    """A tensor (or an object that points into tensors) whose bytes qmove cannot move; `device` is None if it may be any."""

    name: str
    device: torch.device | None
    reason: str


@dataclass
class Inventory:
    """All holdings of a model. `str()` is a table, `to_dict()` plain data.

    Attributes:
        holdings: one for each storage, in the order in which the walk met them.
        meta: tensors on the meta device.
        immovable: what qmove cannot move, and why.
        foreign: names of modules that are reached but are not the model's own; pass them as roots to take them along.
        wrappers: (name, tensor) of wrapper subclasses; their bytes are in the holdings of their inner tensors.
        modules: the model's own modules by name.
    """

    holdings: list[Holding]
    meta: list[MetaTensor] = field(default_factory=list)
    immovable: list[Immovable] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    wrappers: list[tuple[str, torch.Tensor]] = field(default_factory=list)
    modules: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes of all storages, each counted once, on all devices; meta tensors have none."""
        return sum(holding.nbytes for holding in self.holdings)

    @property
    def by_device(self) -> dict[str, int]:
        """Bytes on each device, by its name."""
        totals: dict[str, int] = defaultdict(int)
        for holding in self.holdings:
            totals[str(holding.device)] += holding.nbytes
        return dict(totals)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for programs and JSON."""
        return {
            "nbytes": self.nbytes,
            "by_device": self.by_device,
            "holdings": [
                {
                    "names": list(holding.names),
                    "kind": holding.kind,
                    "dtype": _dtype_name(holding.dtype),
                    "device": str(holding.device),
                    "nbytes": holding.nbytes,
                }
                for holding in self.holdings
            ],
            "meta": [
                {
                    "name": m.name,
                    "shape": list(m.shape),
                    "dtype": _dtype_name(m.dtype),
                    "nbytes": m.nbytes,
                }
                for m in self.meta
            ],
            "immovable": [
                {"name": i.name, "device": str(i.device), "reason": i.reason}
                for i in self.immovable
            ],
            "foreign": list(self.foreign),
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        groups: dict[tuple[str, str, str], list[Holding]] = defaultdict(list)
        for holding in self.holdings:
            groups[str(holding.device), holding.kind, _dtype_name(holding.dtype)].append(holding)
        table = Table(
            title=f"{readable_bytes(self.nbytes)} in {len(self.holdings)} storages",
            title_justify="left",
        )
        for heading in ("device", "kind", "dtype"):
            table.add_column(heading)
        table.add_column("storages", justify="right")
        table.add_column("bytes", justify="right")
        table.add_column("largest", overflow="ellipsis", no_wrap=True)
        for (device, kind, dtype), members in sorted(
            groups.items(), key=lambda item: -_total(item[1])
        ):
            largest = max(members, key=lambda holding: holding.nbytes)
            table.add_row(
                device,
                kind,
                dtype,
                str(len(members)),
                readable_bytes(_total(members)),
                largest.name,
            )
        for device, nbytes in sorted(self.by_device.items()):
            count = sum(str(holding.device) == device for holding in self.holdings)
            table.add_row(device, "all", "", str(count), readable_bytes(nbytes), style="bold")
        if self.meta:
            wanted = readable_bytes(sum(m.nbytes for m in self.meta))
            table.add_row("meta", "no data", "", str(len(self.meta)), wanted, self.meta[0].name)
        text = io.StringIO()
        console = Console(file=text, width=110, color_system=None)
        console.print(table)
        for item in self.immovable:
            console.print(f"cannot move: {item.name}: {item.reason}", markup=False)
        for name in self.foreign:
            console.print(f"not the model's own, left alone: {name}", markup=False)
        return text.getvalue().rstrip()


def inventory(model: object, *, extra: Iterable[object] = ()) -> Inventory:
    """Lists every tensor `model` holds, grouped by storage; moves and copies nothing.

    Args:
        model: anything that holds tensors: an `nn.Module`, a pipeline, a dict or list of them, a wrapper object.
        extra: further objects that go with the model, such as an optimizer or a cache.

    Returns:
        An `Inventory`. It refers to the model's tensors, and so keeps them alive.
    """
    roots = [("", model), *((f"<extra {index}>", root) for index, root in enumerate(extra))]
    return _from_walk(walk(roots, leave_out=kinds.process_wide_tensors()))


def _from_walk(walked: Walk) -> Inventory:
    result = Inventory(holdings=[])
    by_storage: dict[int, Holding] = {}
    with torch._C.DisableTorchFunctionSubclass():
        for found in walked.tensors.values():
            _sort_in(found, result, by_storage)
    result.holdings = list(by_storage.values())
    result.immovable += [
        Immovable(
            name,
            None,
            f"a {type(obj).__name__} replays kernels with the raw addresses of the weights; delete it first",
        )
        for name, obj in walked.fixed
    ]
    result.foreign = [name for name, _module in walked.foreign]
    for name, module in walked.modules.values():
        while name in result.modules:  # reached in two ways that read the same
            name += "'"
        result.modules[name] = module
    return result


def _sort_in(found: FoundTensor, result: Inventory, by_storage: dict[int, Holding]) -> None:
    tensor, name = found.tensor, found.names[0]
    if isinstance(tensor, nn.parameter.UninitializedTensorMixin):  # type: ignore[attr-defined]
        return  # a lazy module before its first forward: no bytes yet
    if hasattr(type(tensor), "__tensor_flatten__"):
        result.wrappers.append((name, tensor))
        return
    if tensor.device.type == "meta":
        result.meta.append(
            MetaTensor(name, tuple(tensor.shape), tensor.dtype, tensor.nbytes, tensor)
        )
        return
    obstacle = _obstacle(tensor)
    if obstacle:
        result.immovable.append(Immovable(name, tensor.device, obstacle))
        return
    storage = tensor.untyped_storage()
    holding = by_storage.get(storage._cdata)
    if holding is None:
        by_storage[storage._cdata] = Holding(
            storage.nbytes(), storage.device, found.kind, tensor.dtype, list(found.names), [tensor]
        )
    else:
        holding.names += found.names
        holding.tensors.append(tensor)


def _obstacle(tensor: torch.Tensor) -> str:
    """Why the bytes of this tensor cannot be moved; empty if they can."""
    if tensor.is_nested:
        return "a strided nested tensor has no single storage geometry; build it with layout=torch.jagged"
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}, which has no single storage; call .to_dense()"
    if tensor.is_quantized:
        return "torch's own quantized tensors (qint8, ...) keep scales outside the storage; use torchao instead"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "it belongs to a running functorch transform"
    if not _has_bytes(tensor.untyped_storage()):
        return f"{type(tensor).__name__} is a wrapper subclass without __tensor_flatten__: its bytes cannot be reached"
    return ""


def _has_bytes(storage: torch.UntypedStorage) -> bool:
    try:
        return storage.data_ptr() != 0 or storage.nbytes() == 0
    except RuntimeError:  # the storage of a wrapper subclass has no data pointer to ask for
        return False


def _total(holdings: Iterable[Holding]) -> int:
    return sum(holding.nbytes for holding in holdings)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
