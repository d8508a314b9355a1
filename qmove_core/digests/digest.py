"""Digests of the bytes of storages, computed where the bytes lie, to tell whether they changed or
arrived whole.

Versions of tensors cannot tell: writes through `.data` do not count. Two storages have equal
digests if their bytes are equal, on whichever device each lies, and unequal ones otherwise, but for
odds of 3 x 2^-64 (see `digest_tree.py`, which states for which changes) and 2^-128 of the hash that
combines the pieces.

What it costs: memory of STAGING bytes at most, whatever the number and size of the storages, plus
32 bytes a piece (512 KiB or a smaller storage), which are also what is copied to the host. Storages
of IN_PLACE bytes or more are read once, where they lie, in one product each. Others are gathered
into the staging: read, written and read again, padded by 5 % on average, in 3 or 4 kernels for 48
MiB or FEW storages. Then two kernels for each shape of piece that occurs.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from ..errors import is_out_of_memory
from ..storages import as_bytes, empty
from .digest_tree import (
    MOST_PADDING,
    PIECE,
    PRODUCT,
    ROW,
    SHAPES,
    SPARE,
    FloatProducts,
    IntProducts,
    Products,
    Shape,
    Tree,
    current_stream,
    matrices,
    random_bytes,
    shape_of,
)

log = logging.getLogger("qmove")

Digest = int

STAGING = 64 << 20
LEAST_STAGING = 1 << 20
IN_PLACE = (
    8 << 20
)  # reading a smaller storage where it lies saves less than launching a kernel for it costs
FEW = 512  # storages gathered by one call, whose cost on the host grows faster than their number


def digest_storages(storages: Sequence[torch.UntypedStorage]) -> list[Digest | None]:
    """The digests of `storages`, which lie on one device. Queued on its current stream, for which
    it then waits. As for failures: `queue_digests`."""
    return queue_digests(storages).values()


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
        _note_failure(storages[0].device, error)
        return Pending.of_none(len(storages))


def available(device: torch.device) -> bool:
    """Whether digests can be computed on `device`.

    The first time it is tried out, on one piece of each shape.
    """
    try:
        return _products(device) is not None
    except Exception as error:
        _note_failure(device, error)
        return False


_chosen: dict[torch.device, type[Products] | None] = {}
_failed: set[tuple[torch.device, type[Products]]] = set()  # ways that no longer are to be used
_said: set[tuple[torch.device, str]] = set()


def _products(device: torch.device) -> type[Products] | None:
    """How exact products are computed on `device`: the fastest way that stands the test.

    Raises:
        RuntimeError: a shortage, or an error of work that was queued before. Nothing is concluded
            from those.
    """
    if device not in _chosen:
        _chosen[device] = _fastest_exact(device)
    return _chosen[device]


def _fastest_exact(device: torch.device) -> type[Products] | None:
    if device.type == "cpu":
        return FloatProducts
    ways: list[type[Products]] = (
        [IntProducts, FloatProducts] if hasattr(torch, "_int_mm") else [FloatProducts]
    )
    expected = _sample(FloatProducts, torch.device("cpu"))
    failure: RuntimeError | None = None
    for way in ways:
        if (device, way) in _failed:
            continue
        try:
            if _sample(way, device) == expected:
                return way
            reason = "wrong results"
        except RuntimeError as error:
            if _is_shortage(error) or _is_of_earlier_work(error):
                raise
            failure, reason = error, str(error).partition("\n")[0]
        log.info("digests on %s do not use %s: %s", device, way.__name__, reason)
    if failure is not None:
        raise failure
    return None


def _sample(way: type[Products], device: torch.device) -> list[Digest | None]:
    """The digests of pieces of each shape, of random bytes and of those whose products are the
    largest. Takes little memory, as it may run when the device is nearly full."""
    with torch.no_grad(), torch.inference_mode(False):
        content = random_bytes(PIECE, device)
        largest = torch.where(matrices(device) < 0, -128, 127).to(torch.int8)
        contents = [content[: groups * rows * ROW] for groups, rows in SHAPES] + [
            largest[: len(largest) // ROW * ROW]
        ]
        parts = [part.view(torch.uint8) for part in contents]
        return _queue_with(way, parts, device, LEAST_STAGING).read()


class _Inexact(Exception):
    """A device of which no way of multiplying stood the test."""


def _is_shortage(error: Exception) -> bool:
    """Whether there was no room: cuBLAS says so, too, when it cannot make its handle."""
    return is_out_of_memory(error) or "STATUS_NOT_INITIALIZED" in str(error)


def _is_of_earlier_work(error: Exception) -> bool:
    """Whether a device reports what was queued before.

    Since torch 2.8 this has a class of its own; until then only the words, which errors of cuBLAS
    share.
    """
    if not isinstance(error, RuntimeError) or _is_shortage(error):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", None)
    if accelerator_error is not None:
        return isinstance(error, accelerator_error)
    text = str(error)
    return text.startswith(("CUDA error", "HIP error")) and "BLAS_STATUS" not in text


def _note_failure(device: torch.device, error: Exception) -> None:
    """Says once why there is no digest. Raises what has nothing to do with digests."""
    if _is_of_earlier_work(error):
        raise error
    fails_for_good = not _is_shortage(error) and not isinstance(error, _Inexact)
    if fails_for_good and _chosen.get(device) is IntProducts:
        # A library that lacks a shape, for example: the same digests can be had in another way.
        _failed.add((device, IntProducts))
        del _chosen[device]
    error.__traceback__ = error.__context__ = None  # whoever keeps the error keeps no memory
    reason = str(error).partition("\n")[0]
    if (device, reason) not in _said:
        _said.add((device, reason))
        log.info("no digests on %s this time, so more is copied: %s", device, reason)


class Pending:
    """Digests that were queued on a device.

    Until they are read it keeps 32 bytes for each piece there, and 20 KiB.
    """

    def __init__(self, out: torch.Tensor | None, places: list[tuple[int, list[int]]]) -> None:
        self._out, self._places = out, places  # (bytes, rows of `out` that belong to them)
        self._stream = None if out is None else current_stream(out.device)
        self._numbers = (
            None if out is None else matrices(out.device)
        )  # for those that are queued next
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
        if self._values is None:
            out, count = self._out, len(self._places)
            try:
                return self.read()
            except Exception as error:
                self._take_values([None] * count)
                assert out is not None
                _note_failure(out.device, error)
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
        if not _is_shortage(error):
            _note_failure(unread[0][1].device, error)
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
    products = _products(device)
    if products is None:
        raise _Inexact("it multiplies 8-bit numbers inexactly")
    return _queue_with(products, contents, device, at_most)


def _queue_with(
    products: type[Products],
    contents: list[torch.Tensor],
    device: torch.device,
    at_most: int,
) -> Pending:
    plan = _plan(contents)
    staging = _staging(products, plan, device, min(STAGING, at_most))
    tree = staging.tree
    for rows in plan.in_place:
        for some in rows.split(tree.capacity):
            tree.add(some, [(SHAPES[-1], len(some) // _PIECE_ROWS)])
    for batch in plan.batches(staging.rows):
        staging.add(batch)
    return Pending(
        tree.finish(),
        list(zip([content.numel() for content in contents], plan.places, strict=True)),
    )


_PIECE_ROWS = PIECE // ROW


@dataclass(slots=True)
class _Piece:
    """Up to PIECE bytes that are gathered: as int64 where that is possible, which is how they are
    copied fastest."""

    content: torch.Tensor
    shape: Shape
    owner: int  # whose index, and
    index: int  # the how manieth of its pieces
    rows: int  # padded to this many
    missing: int  # bytes until then
    words: bool


@dataclass(frozen=True)
class _Plan:
    """What is read where it lies, what is gathered, and where the product of each piece comes out.

    Attributes:
        in_place: int8 rows of whole pieces.
        gathered: in the order in which they come out, after those.
        places: for each content, the rows of the result that belong to its pieces.
    """

    in_place: list[torch.Tensor]
    gathered: list[_Piece]
    places: list[list[int]]

    def rows(self) -> int:
        """Of all pieces, padded."""
        return sum(map(len, self.in_place)) + self.rows_gathered()

    def rows_gathered(self) -> int:
        return sum(piece.rows for piece in self.gathered)

    def batches(self, rows: int) -> Iterator[list[_Piece]]:
        """Pieces of one dtype that fit into `rows` rows."""
        batch: list[_Piece] = []
        free = rows
        for piece in self.gathered:
            if piece.rows > free or len(batch) == FEW or (batch and batch[0].words != piece.words):
                yield batch
                batch, free = [], rows
            batch.append(piece)
            free -= piece.rows
        if batch:
            yield batch


def _plan(contents: list[torch.Tensor]) -> _Plan:
    in_place, pieces = [], []
    places: list[list[int]] = []
    used = 0
    for owner, content in enumerate(contents):
        nbytes, whole = content.numel(), 0
        is_aligned = (content.data_ptr() | int(content.storage_offset())) % 16 == 0
        if is_aligned and nbytes >= IN_PLACE:
            whole = nbytes // PIECE
            in_place.append(content[: whole * PIECE].view(torch.int8).view(-1, ROW))
        places.append([*range(used, used + whole), *[0] * (-(-nbytes // PIECE) - whole)])
        used += whole
        for index in range(whole, -(-nbytes // PIECE)):
            size = min(PIECE, nbytes - index * PIECE)
            part = content if size == nbytes else content[index * PIECE : index * PIECE + size]
            words = is_aligned and size % 8 == 0
            shape = shape_of(size)
            rows = shape[0] * shape[1]
            pieces.append(
                _Piece(
                    part.view(torch.int64) if words else part,
                    shape,
                    owner,
                    index,
                    rows,
                    rows * ROW - size,
                    words,
                )
            )
    # Those alike lie side by side: one product for each shape, and one copy for each dtype.
    pieces.sort(key=lambda piece: (piece.words, piece.shape))
    for place, piece in enumerate(pieces, used):
        places[piece.owner][piece.index] = place
    return _Plan(in_place, pieces, places)


class _Staging:
    """The memory of one run: where pieces are gathered, and the tree."""

    def __init__(
        self, products: type[Products], plan: _Plan, nbytes: int, device: torch.device
    ) -> None:
        gathered, rows = plan.rows_gathered(), plan.rows()
        workspace = products.workspace(nbytes)
        self.rows = min((nbytes // 8 * 5 if workspace else nbytes // 4 * 3) // ROW, gathered)
        self._bytes = empty(
            max(self.rows, SPARE if gathered else 0) * ROW, dtype=torch.uint8, device=device
        )
        zeros = MOST_PADDING if gathered else 0
        self._zeros = empty(zeros, dtype=torch.uint8, device=device).zero_()
        held = min(nbytes // 8 // PRODUCT, -(-rows // _PIECE_ROWS) * _PIECE_ROWS)
        self.tree = Tree(
            products(device, min(workspace, max(rows, SPARE))),
            held,
            sum(map(len, plan.places)),
            device,
        )

    def add(self, batch: list[_Piece]) -> None:
        """Gathers the pieces, and gives them to the tree."""
        dtype = batch[0].content.dtype
        place, zeros = self._bytes.view(dtype), self._zeros.view(dtype)
        sources = []
        for piece in batch:
            sources.append(piece.content)
            if piece.missing:
                sources.append(zeros[: piece.missing // dtype.itemsize])
        count = sum(piece.rows for piece in batch)
        torch.cat(sources, out=place[: count * ROW // dtype.itemsize])
        runs = [
            (shape, len(list(alike))) for shape, alike in groupby(piece.shape for piece in batch)
        ]
        self.tree.add(self._bytes.view(torch.int8).view(-1, ROW)[: max(count, SPARE)], runs)


def _staging(products: type[Products], plan: _Plan, device: torch.device, nbytes: int) -> _Staging:
    reason = f"{nbytes} bytes were allowed"
    while nbytes >= LEAST_STAGING:
        try:
            return _Staging(products, plan, nbytes, device)
        except RuntimeError as error:
            if not _is_shortage(error):
                raise
            reason = str(error)
            error.__traceback__ = None  # its frames hold what was allocated
        nbytes //= 2
    # Raised out here, so that no traceback keeps what was allocated.
    raise torch.OutOfMemoryError(
        f"No room on {device} for the {LEAST_STAGING} bytes that digests take: {reason}"
    )
