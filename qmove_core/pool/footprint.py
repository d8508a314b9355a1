"""Where the bytes of a model are now. It is cheap to ask, as often as anybody decides something."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import torch
from torch.utils.weak import TensorWeakRef

from .. import homes
from ..memory import mirrors
from ..memory.blocks import place_of, ram_bytes
from ..model.holdings import Inventory


class Footprint:
    """The storages of a model, by the tensors that look into them; it keeps none of them alive.

    Args:
        held: the inventory of the model; None for one that is gone. What comes into the model later
            is not seen.
        elsewhere: the `_cdata` of storages that are counted with another model.
    """

    def __init__(self, held: Inventory | None = None, elsewhere: Collection[int] = ()) -> None:
        self._holdings = [
            [TensorWeakRef(tensor) for tensor in holding.tensors]
            for holding in (held.holdings if held is not None else ())
            if holding.storage._cdata not in elsewhere
        ]

    def storages(self) -> Iterator[tuple[torch.Tensor, torch.UntypedStorage]]:
        """One living tensor of each holding, and its storage."""
        with torch._C.DisableTorchFunctionSubclass():
            for references in self._holdings:
                for reference in references:
                    tensor = reference()
                    if tensor is not None:
                        yield tensor, tensor.untyped_storage()
                        break

    @property
    def resident(self) -> dict[torch.device, int]:
        """Bytes on each accelerator now."""
        found: Counter[torch.device] = Counter()
        for _tensor, storage in self.storages():
            if storage.device.type != "cpu":
                found[storage.device] += storage.nbytes()
        return dict(found)

    @property
    def parked(self) -> dict[torch.device, int]:
        """Bytes parked now, by the accelerator that is their home."""
        found: Counter[torch.device] = Counter()
        for tensor, storage in self.storages():
            if storage.device.type == "cpu" and (home := homes.parked_home(tensor)) is not None:
                found[home] += storage.nbytes()
        return dict(found)

    @property
    def in_ram(self) -> int:
        """Bytes of RAM that it takes, parked or not. Host copies of what is on a device are none
        of them, nor is what looks into a file."""
        return sum(ram_bytes(storage) for _tensor, storage in self.storages())

    @property
    def on_disk(self) -> int:
        """Bytes that are parked in files."""
        places = [place_of(s) for _tensor, s in self.storages() if s.device.type == "cpu"]
        sizes = [s.nbytes() for _tensor, s in self.storages() if s.device.type == "cpu"]
        return sum(
            nbytes
            for place, nbytes in zip(places, sizes, strict=True)
            if place is not None and place[0].is_file
        )

    @property
    def mirrored(self) -> int:
        """Bytes on accelerators of which there is a host copy already."""
        away = [s for _tensor, s in self.storages() if s.device.type != "cpu"]
        return sum(s.nbytes() for s in away if mirrors.known_digest(s) is not None)
