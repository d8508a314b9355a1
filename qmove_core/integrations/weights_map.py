"""Where the data of a meta tensor lies: in RAM, in a safetensors file, in a `.dat` file.

accelerate's hooks look their weights up in maps, and these maps differ. A `Source` is one entry of
such a map, whatever its kind. Files are mapped into memory privately: writing to such a tensor
changes a copy and never the file.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..saved_tensors import HeaderEntry, NotSafetensors, open_safetensors
from ..storages import tensor_over


class Unusable(Exception):
    """Why an entry of a weights map cannot be used."""


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
    _in_file: Callable[[], torch.Tensor] | None = field(default=None, repr=False)

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

        Between floating dtypes accelerate casts in each forward, so the dispatched model computes
        with the cast too.
        """
        if self.shape != tuple(tensor.shape):
            shapes = list(self.shape), list(tensor.shape)
            return f"its shape is {shapes[0]} in {self.where} and {shapes[1]} in the model"
        casts = {self.dtype, self.through or self.dtype, tensor.dtype}
        if len(casts) > 1 and not all(dtype.is_floating_point for dtype in casts):
            here, there = (
                str(dtype).removeprefix("torch.") for dtype in (self.dtype, tensor.dtype)
            )
            return f"its dtype is {here} in {self.where} and {there} in the model"
        return ""

    def is_shared_as(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a tensor of `dtype` on `device` can look into the source's own memory."""
        lies_on = self._in_memory.device if self._in_memory is not None else torch.device("cpu")
        return (
            self.shareable
            and self.dtype == dtype
            and self.through in (None, dtype)
            and lies_on == device
        )

    def open(self) -> torch.Tensor:
        """The tensor as it lies there, in shared memory. The disk is read as pages are touched."""
        if self._in_memory is not None:
            return self._in_memory
        if self._in_file is not None:
            return self._in_file()
        mapped: Any = torch.UntypedStorage.from_file(str(self.file), False, self.nbytes)
        return tensor_over(mapped, self.dtype, self.shape)

    def cast(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the weights map itself returns for `tensor`, which `open` returned."""
        return tensor if self.through is None else tensor.to(self.through)


class Sources:
    """Finds the entries of weights maps. Keeps files open for as long as it lives."""

    def __init__(self) -> None:
        self._opened: dict[str, tuple[Any, dict[str, HeaderEntry]]] = {}

    def find(self, weights_map: Mapping[str, Any], name: str) -> Source:
        """The entry of `name`.

        Raises:
            KeyError: the map has no such entry.
            Unusable: the entry points to a file that is missing, too short, or without that tensor.
        """
        name, loader = _without_prefix(weights_map, name)
        if not _is_loader(loader):  # a plain dict, or a map of the user's own
            return _in_ram(loader[name])
        if name in loader.state_dict:
            return _in_ram(loader.state_dict[name])
        entry = loader.index[name]
        try:
            return self._in_index(loader, name, entry)
        except (
            AttributeError, KeyError, TypeError, ValueError, OverflowError, RuntimeError
        ) as error:  # fmt: skip
            raise Unusable(
                f"its entry in the offload index is malformed ({type(error).__name__}: {error})"
            ) from error

    def _in_index(self, loader: Any, name: str, entry: Any) -> Source:
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
                f"{weight_name!r} in {file} has the dtype {saved.saved_dtype}, "
                "which torch does not have"
            )
        return Source(
            where=str(file),
            key=(os.path.realpath(file), weight_name, through),
            dtype=saved.dtype,
            shape=saved.shape,
            through=_dtype(through, file) if through else None,
            file=file,
            offset=saved.start,
            shareable=True,
            _in_file=functools.partial(reader.get_tensor, weight_name),
        )

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
    """Makes a weights map return `tensor` (on the host) for `name`; False if it takes no entries.

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
    """Whether it is an `OffloadedWeightsLoader`, which reads its state dict before its index."""
    return hasattr(weights_map, "state_dict") and hasattr(weights_map, "index")


def _in_ram(tensor: Any) -> Source:
    if not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta":
        raise Unusable("its entry in the weights map in RAM has no data either")
    key: Hashable = id(tensor)
    # Empty tensors are all at address 0.
    if tensor.numel() and not hasattr(type(tensor), "__tensor_flatten__"):
        storage = tensor.untyped_storage()
        place = storage.data_ptr(), storage.device, tensor.storage_offset()
        key = (*place, tensor.shape, tensor.stride(), tensor.dtype)
    shape = tuple(tensor.shape)
    return Source("RAM", key, tensor.dtype, shape, shareable=True, _in_memory=tensor.detach())


def _in_dat(file: Path, name: str, entry: Mapping[str, Any]) -> Source:
    """accelerate may rewrite `.dat` files in place, so a model must not go on looking into one."""
    if file.name != f"{name}.dat":
        raise Unusable(f"{name!r} names no file in the offload folder {file.parent}")
    _require_file(file)
    dtype, shape = _dtype(entry["dtype"], file), tuple(entry["shape"])
    source = Source(str(file), (os.path.realpath(file), name), dtype, shape, file=file)
    on_disk = file.stat().st_size
    if on_disk != source.nbytes:
        wanted = f"{source.nbytes} bytes for {list(shape)} of {entry['dtype']}"
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
