"""Digests of the bytes of storages, computed where the bytes lie, to tell whether they changed or
arrived whole.

Versions of tensors cannot tell: writes through `.data` do not count. Two storages have equal
digests if their bytes are equal, on whichever device each lies, and unequal ones otherwise, but for
odds of 3 x 2^-64 (see `digest_tree.py`, which states for which changes) and 2^-128 of the hash that
combines the pieces.

What it costs in memory and kernels: `gathering.py`; 32 bytes a piece (512 KiB or a smaller storage)
are copied to the host.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence

import torch

from ..interrupts import interrupts_deferred
from ..storages import as_bytes
from .choosing import Inexact, note_failure, products_on
from .digest_tree import PRODUCT, current_stream, matrices
from .gathering import LEAST_STAGING, STAGING, is_shortage, queue

Digest = int


def digest_storages(storages: Sequence[torch.UntypedStorage]) -> list[Digest | None]:
    """The digests of `storages`, which lie on one device. Queued on its current stream, for which
    it then waits. As for failures: `queue_digests`."""
    return queue_digests(storages).values()


@interrupts_deferred()  # their handlers raise what is no failure of a digest
def queue_digests(storages: Sequence[torch.UntypedStorage], *, at_most: int = STAGING) -> Pending:
    """As `digest_storages`, but only queued. Keep the storages, and what they hold, until
    `values()` has returned.

    A digest only makes moves cheaper, so none fails for it: whatever goes wrong, for lack of memory
    or in a library, means None in place of each digest, said once in the log. It is tried again the
    next time.

    Args:
        at_most: bytes of memory it may take for staging there, if less than STAGING.

    Raises:
        torch.AcceleratorError: what the device reports of work that was queued before: a copy that
            failed must not go unseen.
    """
    found = {storage.device for storage in storages}
    if len(found) > 1:
        raise ValueError(
            "digests are computed on one device at a time, not on "
            f"{', '.join(sorted(map(str, found)))}"
        )
    try:
        with torch.no_grad(), torch.inference_mode(False):
            return _queue([as_bytes(storage) for storage in storages], at_most)
    except Exception as error:
        note_failure(storages[0].device, error)
        return Pending.of_none(len(storages))


class Pending:
    """Digests that were queued on a device.

    Until they are read it keeps 32 bytes for each piece there, and 20 KiB.
    """

    def __init__(
        self,
        out: torch.Tensor | None,
        places: list[tuple[int, list[int]]],
        numbers: torch.Tensor | None = None,
    ) -> None:
        self._out, self._places = out, places  # (bytes, rows of `out` that belong to them)
        self._stream = None if out is None else current_stream(out.device)
        self._numbers = numbers  # for those that are queued next
        self._values: list[Digest | None] | None = None

    @classmethod
    def of_none(cls, count: int) -> Pending:
        """In place of digests that could not be computed."""
        pending = cls(None, [])
        pending._values = [None] * count
        return pending

    def values(self) -> list[Digest | None]:
        """Waits until they are computed, and reads them. The order is that of the storages.

        As for failures: `queue_digests`.
        """
        return self._wait() if self._values is None else self._values

    @interrupts_deferred()  # their handlers raise what is no failure of a digest
    def _wait(self) -> list[Digest | None]:
        out, count = self._out, len(self._places)
        try:
            return self.read()
        except Exception as error:
            self._take_values([None] * count)
            assert out is not None
            note_failure(out.device, error)
        assert self._values is not None
        return self._values

    def read(self) -> list[Digest | None]:
        """`values`, but raises whatever goes wrong."""
        self._take(memoryview(b"") if self._out is None else _read(self._out, self._stream))
        assert self._values is not None
        return self._values

    def _take(self, content: memoryview) -> None:
        self._take_values([_combined(nbytes, content, rows) for nbytes, rows in self._places])

    def _take_values(self, values: list[Digest | None]) -> None:
        self._values = values
        self._out = self._stream = self._numbers = None


@interrupts_deferred()  # their handlers raise what is no failure of a digest
def read_together(pendings: Sequence[Pending]) -> None:
    """Reads what was queued on one stream of one device in one copy, where there is room to put it
    together. As for failures: `queue_digests`."""
    unread = [(pending, pending._out) for pending in pendings if pending._out is not None]
    if not unread:
        return
    stream = unread[0][0]._stream
    try:
        with torch.inference_mode(False), _on(stream):
            together = torch.cat([out for _pending, out in unread])
        content = _read(together, stream)
    except Exception as error:
        if not is_shortage(error):
            note_failure(unread[0][1].device, error)
        for pending, _out in unread:
            pending.values()
        return
    start = 0
    for pending, out in unread:
        end = start + out.shape[0] * PRODUCT
        pending._take(content[start:end])
        start = end


def _read(out: torch.Tensor, stream: torch.Stream | None) -> memoryview:
    # On the stream they were queued on: another one may be busy for long with what has nothing to
    # do with them.
    with torch.inference_mode(False), _on(stream):
        return memoryview(out.cpu().numpy().tobytes())


def _combined(nbytes: int, content: memoryview, rows: list[int]) -> Digest:
    digest = hashlib.blake2b(nbytes.to_bytes(8, "little"), digest_size=16)
    for row in rows:
        digest.update(content[row * PRODUCT : (row + 1) * PRODUCT])
    return int.from_bytes(digest.digest(), "little")


def _on(stream: torch.Stream | None) -> contextlib.AbstractContextManager[object]:
    return (
        contextlib.nullcontext()
        if stream is None
        else torch.get_device_module(stream.device).stream(stream)
    )


def _queue(contents: list[torch.Tensor], at_most: int) -> Pending:
    """Queues the digests of flat uint8 tensors."""
    if not any(content.numel() for content in contents):
        return Pending(None, [(0, []) for _content in contents])
    device = contents[0].device
    if at_most < LEAST_STAGING:  # nothing is wrong: the caller has no more room than the model's
        return Pending.of_none(len(contents))
    products = products_on(device)
    if products is None:
        raise Inexact("it multiplies 8-bit numbers inexactly")
    numbers = matrices(device)
    out, places = queue(products, contents, device, at_most)
    sizes = [content.numel() for content in contents]
    return Pending(out, list(zip(sizes, places, strict=True)), numbers)
