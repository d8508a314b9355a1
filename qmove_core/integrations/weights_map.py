"""Where the data of a tensor on the meta device lies: in a state dict in RAM, in a safetensors file, in a `.dat` file.

accelerate's hooks look their weights up in maps, and these maps differ. A `Source` is one entry of such a map, seen the same way
whatever its kind: does it have what the model needs, is it the same bytes as another entry, and the tensor itself.
Files are mapped into memory privately, so whoever writes to such a tensor changes a copy and never the file.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..saved_tensors import HeaderEntry, NotSafetensors, open_safetensors
from ..storages import tensor_over


class Unusable(Exception):
    """What stands in the way of using an entry of a weights map."""


@dataclass
class Source:
    """The entry of a weights map for one tensor.

    Attributes:
        where: for messages: "RAM", or the file.
        key: equal for entries that are the same bytes.
        dtype, shape: of the data as it lies there.
        through: a dtype that the map casts to on the way; the model's own dtype comes after that.
        file, offset: place of the bytes on the disk; None and 0 in RAM.
        shareable: the model's tensor may look into the source's own memory.
    """

    where: str
    key: Hashable
    dtype: torch.dtype
    shape: tuple[int, ...]
    through: torch.dtype | None = None
    file: Path | None = None
    offset: int = 0
    shareable: bool = False
    _in_memory: torch.Tensor | None = field(default=None, repr=False)
    _reader: Any = field(default=None, repr=False)
    _weight_name: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the data as it lies there."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def address(self) -> int:
        """Where the data lies in RAM; 0 for data in a file."""
        return 0 if self._in_memory is None else self._in_memory.data_ptr()

    def mismatch(self, tensor: torch.Tensor) -> str:
        """Why the model's `tensor` cannot have its data from here; empty if it can.

        Between floating dtypes accelerate casts in each forward, so the outputs of the dispatched model are those of the cast.
        """
        if self.shape != tuple(tensor.shape):
            return f"its shape is {list(self.shape)} in {self.where} and {list(tensor.shape)} in the model"
        casts = [self.dtype, *([self.through] if self.through else []), tensor.dtype]
        if len(set(casts)) > 1 and not all(dtype.is_floating_point for dtype in casts):
            return f"its dtype is {_names(self.dtype)} in {self.where} and {_names(tensor.dtype)} in the model"
        return ""

    def is_shared_as(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a tensor of `dtype` on `device` can look into the source's own memory, without a copy."""
        lies_on = self._in_memory.device if self._in_memory is not None else torch.device("cpu")
        return (
            self.shareable
            and self.dtype == dtype
            and self.through in (None, dtype)
            and lies_on == device
        )

    def open(self) -> torch.Tensor:
        """The tensor as it lies in the source, sharing its memory. Reads nothing from the disk yet: pages come when touched."""
        if self._in_memory is not None:
            return self._in_memory
        if self._reader is not None:
            tensor: torch.Tensor = self._reader.get_tensor(self._weight_name)
            return tensor
        mapped: Any = torch.UntypedStorage.from_file(str(self.file), False, self.nbytes)
        return tensor_over(mapped, self.dtype, self.shape)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the weights map itself would hand out for `tensor`, which `open` returned."""
        return tensor if self.through is None else tensor.to(self.through)


class Sources:
    """Finds the entries of weights maps. Keeps files open, and their headers at hand, for as long as it lives."""

    def __init__(self) -> None:
        self._opened: dict[str, tuple[Any, dict[str, HeaderEntry]]] = {}

    def find(self, weights_map: Mapping[str, Any], name: str) -> Source:
        """The entry of `name`.

        Raises:
            KeyError: the map has no such entry.
            Unusable: the entry points to a file that is missing, too short, or without that tensor.
        """
        name, loader = _without_prefix(weights_map, name)
        if not _is_loader(loader):  # a plain dict, or somebody's own map
            return _in_ram(loader[name])
        if name in loader.state_dict:
            return _in_ram(loader.state_dict[name])
        entry = loader.index[name]
        if entry.get("safetensors_file") is not None:
            return self.in_safetensors(
                Path(entry["safetensors_file"]), entry.get("weight_name", name), entry.get("dtype")
            )
        return _in_dat(Path(loader.save_folder) / f"{name}.dat", name, entry)

    def in_safetensors(self, file: Path, weight_name: str, through: str | None = None) -> Source:
        """A tensor of a safetensors file, which the map casts to the dtype `through`.

        Raises:
            Unusable: as `find`.
        """
        reader, header = self._open(file)
        saved = header.get(weight_name)
        if saved is None:
            raise Unusable(f"the file {file} has no tensor {weight_name!r}")
        if saved.dtype is None:
            raise Unusable(
                f"{weight_name!r} in {file} has the dtype {saved.saved_dtype}, which torch does not have"
            )
        return Source(
            where=str(file), key=(os.path.realpath(file), weight_name, through), dtype=saved.dtype, shape=saved.shape,
            through=_dtype(through, file) if through else None, file=file, offset=saved.start, shareable=True,
            _reader=reader, _weight_name=weight_name,
        )  # fmt: skip

    def _open(self, file: Path) -> tuple[Any, dict[str, HeaderEntry]]:
        """A reader of a safetensors file, and its header."""
        key = os.path.realpath(file)
        if key not in self._opened:
            _require_file(file)
            try:
                self._opened[key] = open_safetensors(file)
            except NotSafetensors as error:
                raise Unusable(
                    f"the file {file} is truncated or no safetensors file ({error})"
                ) from error
        return self._opened[key]


def has_entry(weights_map: Mapping[str, Any], name: str) -> bool:
    """Whether a weights map has `name`; asking the map itself would load the tensor."""
    name, entries = _without_prefix(weights_map, name)
    return (
        name in entries.state_dict or name in entries.index
        if _is_loader(entries)
        else name in entries
    )


def keep_instead(weights_map: Mapping[str, Any], name: str, tensor: torch.Tensor) -> bool:
    """Lets a weights map hand out `tensor` (on the host) for `name` from now on; False if the map takes no new entries.

    A file that has another value stays as it is: the state dict in RAM goes before the index.
    """
    name, entries = _without_prefix(weights_map, name)
    entries = getattr(entries, "state_dict", entries)
    if not isinstance(entries, MutableMapping):
        return False
    entries[name] = tensor
    return True


def loader_of(weights_map: Mapping[str, Any] | None) -> Any:
    """accelerate's `OffloadedWeightsLoader` below a weights map; None if there is none."""
    entries = _without_prefix(weights_map, "")[1]
    return entries if _is_loader(entries) else None


def _without_prefix(weights_map: Any, name: str) -> tuple[str, Any]:
    """The map inside accelerate's `PrefixedDataset`s, and what `name` is called there."""
    while hasattr(weights_map, "dataset") and hasattr(weights_map, "prefix"):
        name, weights_map = f"{weights_map.prefix}{name}", weights_map.dataset
    return name, weights_map


def _is_loader(weights_map: Any) -> bool:
    """Whether it is accelerate's `OffloadedWeightsLoader`, where the state dict goes before the index."""
    return hasattr(weights_map, "state_dict") and hasattr(weights_map, "index")


def _in_ram(tensor: Any) -> Source:
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
        raise Unusable("its entry in the weights map in RAM has no data either")
    key: Hashable = id(tensor)
    if tensor.numel() and not hasattr(
        type(tensor), "__tensor_flatten__"
    ):  # empty tensors are all at address 0
        storage = tensor.untyped_storage()
        key = (
            storage.data_ptr(),
            storage.device,
            tensor.storage_offset(),
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
        )
    return Source(
        where="RAM",
        key=key,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        shareable=True,
        _in_memory=tensor.detach(),
    )


def _in_dat(file: Path, name: str, entry: Mapping[str, Any]) -> Source:
    """accelerate rewrites `.dat` files in place when the folder is used again, so a model must not go on looking into one."""
    _require_file(file)
    source = Source(
        where=str(file), key=(os.path.realpath(file), name), dtype=_dtype(entry["dtype"], file),
        shape=tuple(entry["shape"]), file=file,
    )  # fmt: skip
    on_disk = file.stat().st_size
    if on_disk != source.nbytes:
        wanted = f"{source.nbytes} bytes for {list(source.shape)} of {entry['dtype']}"
        raise Unusable(f"the file {file} has {on_disk} bytes, and its index says {wanted}")
    return source


def _require_file(file: Path) -> None:
    if not file.is_file():
        raise Unusable(f"the file {file} is missing")


def _dtype(name: str, file: Path) -> torch.dtype:
    dtype = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise Unusable(f"the index names the dtype {name!r} for {file}, which torch does not have")
    return dtype


def _names(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
