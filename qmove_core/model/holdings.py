"""The storages, meta tensors and immovable tensors of a model, as `inventory` reports them."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import homes
from ..errors import readable_bytes


@dataclass(slots=True)
class Holding:
    """One storage of a model, and every tensor object of the model that looks into it.

    Attributes:
        nbytes: size of the storage, not of one view of it.
        device: where the storage was when the inventory was taken, or was on its way to.
        kind: of the first tensor: "parameter", "buffer", "gradient", "quantization state", "inner
            tensor", "base of a view"; "state" for plain attributes of modules, "captured" by hooks
            and functions, "attribute" of other objects, or "tensor".
        dtype: of the first tensor.
        names: all names by which the tensors are reached, the first met first.
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
    def lacks_bytes(self) -> bool:
        """Whether the storage is smaller than its tensors need: its owner has resized it."""
        return any(_span(tensor, self.nbytes) > self.nbytes for tensor in self.tensors)

    @property
    def storage(self) -> torch.UntypedStorage:
        """The storage the tensors look into now. One that is under way is waited for."""
        tensor = self.tensors[0]
        with torch._C.DisableTorchFunctionSubclass():
            storage = tensor.untyped_storage()
            origin = homes.origin_of(storage)
            if origin is None or origin.arrival is None:
                return storage
        del storage  # it becomes a mirror only if nobody holds it
        origin.arrival()
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.untyped_storage()


def _span(tensor: torch.Tensor, enough: int) -> int:
    """Bytes that a storage needs for a tensor; exact only where `enough` are too few.

    PyTorch's own methods are asked: some quantized classes answer with a logical shape.
    """
    with torch._C.DisableTorchFunctionSubclass():
        count, size = torch.Tensor.numel(tensor), torch.Tensor.element_size(tensor)
        first = torch.Tensor.storage_offset(tensor) * size
        if count == 0:
            return 0
        if torch.Tensor.is_contiguous(tensor) and first + count * size <= enough:
            return int(first + count * size)
        steps = zip(torch.Tensor.size(tensor), torch.Tensor.stride(tensor), strict=True)
        return int(first + size * (1 + sum((n - 1) * step for n, step in steps)))


@dataclass(frozen=True, slots=True)
class MetaTensor:
    """A tensor without data, on the meta device.

    Attributes:
        name: by which the model reaches it.
        shape: as it would have.
        dtype: as it would have.
        nbytes: bytes that its data would take.
        tensor: the meta tensor.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    tensor: torch.Tensor = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Immovable:
    """A tensor, or an object that points into tensors, whose bytes qmove cannot move.

    `device` is None where it may be any; `nbytes` is 0 where they cannot be counted.
    """

    name: str
    device: torch.device | None
    reason: str
    nbytes: int = 0


@dataclass
class Inventory:
    """All holdings of a model. `str()` is a table, `to_dict()` plain data.

    Attributes:
        holdings: one for each storage, in the order in which the walk met them.
        meta: tensors on the meta device.
        immovable: what qmove cannot move, and why.
        addressed: the storages (`_cdata`) that a raw address points to; each is among `immovable`.
        foreign: names of modules that are reached but are not the model's own. Pass them as roots
            to take them along.
        wrappers: (name, tensor) of wrapper subclasses; their inner tensors are among the holdings.
        modules: the model's own modules by name.
    """

    holdings: list[Holding]
    meta: list[MetaTensor] = field(default_factory=list)
    immovable: list[Immovable] = field(default_factory=list)
    addressed: set[int] = field(default_factory=set)
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
            "holdings": _plain(self.holdings, "names", "kind", "dtype", "device", "nbytes"),
            "meta": _plain(self.meta, "name", "shape", "dtype", "nbytes"),
            "immovable": _plain(self.immovable, "name", "device", "reason"),
            "foreign": list(self.foreign),
        }

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        groups: dict[tuple[str, str, str], list[Holding]] = defaultdict(list)
        for holding in self.holdings:
            device, dtype = str(holding.device), _plain_value(holding.dtype)
            groups[device, holding.kind, dtype].append(holding)
        nbytes = {key: sum(holding.nbytes for holding in groups[key]) for key in groups}
        title = f"{readable_bytes(self.nbytes)} in {len(self.holdings)} storages"
        table = Table("device", "kind", "dtype", title=title, title_justify="left")
        table.add_column("storages", justify="right")
        table.add_column("bytes", justify="right")
        table.add_column("largest", overflow="ellipsis", no_wrap=True)
        for key in sorted(groups, key=lambda key: -nbytes[key]):
            largest = max(groups[key], key=lambda holding: holding.nbytes)
            count = str(len(groups[key]))
            table.add_row(*key, count, readable_bytes(nbytes[key]), largest.name)
        for device, total in sorted(self.by_device.items()):
            count = str(sum(str(holding.device) == device for holding in self.holdings))
            table.add_row(device, "all", "", count, readable_bytes(total), style="bold")
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


def _plain(items: Sequence[object], *attributes: str) -> list[dict[str, Any]]:
    return [{name: _plain_value(getattr(item, name)) for name in attributes} for item in items]


def _plain_value(value: Any) -> Any:
    if isinstance(value, (int, str)):
        return value
    if isinstance(value, (list, tuple)):
        return list(value)
    return str(value).removeprefix("torch.")
