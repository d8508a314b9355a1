"""Mirrors that are the model's own files: `park` then copies nothing and takes no RAM, and a
restore reads the mapped file."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .. import homes
from ..errors import QMoveError, readable_bytes
from ..memory import mirrors
from ..memory.mapped_files import MappedFile
from ..model.holdings import Holding
from ..model.inventory import inventory
from ..model.kinds import bitsandbytes_layout
from ..moving import moving
from ..saved_tensors import NotSafetensors, read_header
from ..settings import settings
from . import streaming

log = logging.getLogger("qmove")


class CannotMirror(QMoveError):
    """These files cannot be used as mirrors. Nothing was changed."""


@moving()
def mirror_files(
    model: object,
    files: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    prefix: str = "",
) -> int:
    """Lets the safetensors files that a model was loaded from be its host copy.

    For each storage on an accelerator whose bytes are, digest for digest, those of the tensor of
    its name in a file, parking copies 0 bytes and takes no RAM: the parked tensors look into the
    mapped file, of which the system keeps in its page cache what it has room for. Everything else
    is parked as always, and so is what was changed since. The files are never written. `ram_limit`
    does not count them; `qmove.stats().file_bytes` does.

    A parked model can still be changed (pages that are written to become private RAM) and comes
    home with the changes; what was changed is parked as always from then on. While a model is
    parked its files must not be overwritten in place: the weights are lost then, and a restore
    raises MappedFileChanged (`mapped_files.py`: how it knows, and what that costs). Replacing or
    deleting them does no harm. On Windows mapped files cannot be replaced, and count against the
    commit limit in full.

    Args:
        model: as for `qmove.park`; what of it is on an accelerator now.
        files: one or several safetensors files. What matches is read once, through the page cache,
            tensor by tensor: RAM for the largest one is taken meanwhile.
        prefix: what names in the files have before the model's own ("model.diffusion_model." for
            example).

    Returns:
        Bytes of the model that the files now mirror; 0 if nothing matched, with a line in the log.

    Raises:
        CannotMirror: a file is missing or no whole safetensors file, or `keep_mirrors` is off.
        MappedFileChanged: a file became shorter meanwhile.
    """
    if not settings.keep_mirrors:
        raise CannotMirror(
            "Mirrors are off, and qmove.mirror_files needs them. "
            "Turn them on first: qmove.configure(keep_mirrors=True)."
        )
    paths = (
        [Path(files)] if isinstance(files, (str, os.PathLike)) else [Path(file) for file in files]
    )
    saved = [_Saved(path) for path in paths]
    held = inventory(model)
    streaming.wait_for(holding.storage for holding in held.holdings)
    left = [holding for holding in held.holdings if holding.device.type != "cpu" and holding.nbytes]
    wanted, mirrored = sum(holding.nbytes for holding in left), 0
    in_ram = _blocks_of_mirrors(left)
    no_longer = set()
    for file in saved:
        done = file.mirror(left, prefix)
        left = [holding for holding in left if id(holding) not in done]
        mirrored += sum(done.values())
        no_longer |= {in_ram[key] for key in done if key in in_ram}
    # A block is given back only as a whole: what little else lies in it is copied once more.
    mirrors.take([holding.storage for holding in left if in_ram.get(id(holding)) in no_longer])
    log.info(
        "%s of the %s that %s has on accelerators are mirrored by %s%s",
        readable_bytes(mirrored),
        readable_bytes(wanted),
        type(model).__name__,
        ", ".join(path.name for path in paths),
        "" if mirrored else _NOTHING_MATCHED,
    )
    return mirrored


_NOTHING_MATCHED = (
    ": no tensor there has such a name, size and content (see `prefix`; a cast changes the content)"
)


def _blocks_of_mirrors(holdings: Iterable[Holding]) -> dict[int, int]:
    """For the holdings that have a host copy in RAM, by their ids, the id of the block that it lies
    in."""
    return {
        id(holding): id(mirror.block)
        for holding in holdings
        if (mirror := mirrors.of(holding.storage)) and mirror.block.is_ram
    }


@dataclass(frozen=True)
class _Saved:
    """One file of saved tensors."""

    path: Path

    def __post_init__(self) -> None:
        if not self.path.is_file():
            raise CannotMirror(
                f"There is no file {self.path}. Give the safetensors files that the model was "
                "loaded from."
            )

    def mirror(self, holdings: Iterable[Holding], prefix: str) -> dict[int, int]:
        """Keeps mirrors for what of `holdings` lies in it. Gives the bytes of each, by its id."""
        tensors = self._tensors()
        found = [
            (holding, name) for holding in holdings if (name := _name_in(tensors, holding, prefix))
        ]
        if not found:
            return {}
        file = self._map()
        here = mirrors.current_digests([holding.storage for holding, _name in found])
        done = {}
        for (holding, name), on_device in zip(found, here, strict=True):
            host, in_file = file.storage_of(name, *tensors[name], homes.forget)
            if on_device is not None and on_device == in_file:
                mirrors.keep(holding.storage, host, in_file)
                done[id(holding)] = holding.nbytes
        return done

    def _map(self) -> MappedFile:
        try:
            return MappedFile(self.path)
        except (OSError, ValueError) as error:
            raise CannotMirror(f"{self.path} cannot be mapped into memory: {error}.") from error

    def _tensors(self) -> dict[str, tuple[int, int]]:
        """Where each tensor begins and ends in the file."""
        try:
            header = read_header(self.path)
        except NotSafetensors as error:
            raise CannotMirror(
                f"{error} Only the files that the model was loaded from, as safetensors, can "
                "mirror it."
            ) from error
        return {name: (saved.start, saved.end) for name, saved in header.items()}


def _name_in(tensors: dict[str, tuple[int, int]], holding: Holding, prefix: str) -> str | None:
    """Under which name a file may have the bytes of a holding, of that many bytes, where its dtypes
    can be read from."""
    alignment = max(tensor.dtype.itemsize for tensor in holding.tensors)
    for name in _saved_names(holding):
        start, end = tensors.get(prefix + name, (0, 0))
        if end - start == holding.nbytes and start % alignment == 0:
            return prefix + name
    return None


def _saved_names(holding: Holding) -> Iterator[str]:
    for name in holding.names:
        yield name
        in_file = bitsandbytes_layout.saved_name(name)
        if in_file is not None:
            yield in_file
