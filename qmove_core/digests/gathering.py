"""Brings the bytes of storages to the products that digests are made of.

What is large is read where it lies, what is small is gathered first.

Memory: STAGING bytes at most, whatever the number and size of the storages, plus 32 bytes a piece
(512 KiB or a smaller storage). Storages of IN_PLACE bytes or more are read once. Others are written
once and read again, in 2 kernels for 48 MiB or FEW storages. Then 3
kernels for all of them, or for each 256 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ..errors import is_out_of_memory
from ..storages import empty
from .digest_tree import (
    GROUP,
    GROUPS,
    PIECE,
    PIECE_ROWS,
    PRODUCT,
    ROW,
    SPARE,
    Products,
    Tree,
    rows_of,
)

STAGING = 64 << 20
LEAST_STAGING = 1 << 20
# Reading a smaller storage where it lies saves less than launching a kernel for it costs; but where
# there is little room to gather, it would take several.
IN_PLACE = 8 << 20
FIXED = 128 << 10  # of it: numbers, zeros, and what is multiplied only since 17 rows are the fewest
FEW = 512  # storages gathered by one call, whose cost on the host grows faster than their number


def queue(
    products: type[Products], contents: list[torch.Tensor], device: torch.device, at_most: int
) -> tuple[torch.Tensor, list[list[int]]]:
    """Queues the products of flat uint8 tensors on the current stream of their device.

    Args:
        products: how to multiply.
        at_most: bytes of memory it may take for staging, LEAST_STAGING at least.

    Returns:
        A row of int32 (8) for each piece, and which rows belong to each content, in order.

    Raises:
        torch.OutOfMemoryError: there is no room for LEAST_STAGING bytes.
        RuntimeError: what the device or its library says.
    """
    plan = _plan(contents, min(IN_PLACE, at_most // 2))
    staging = _staging(products, plan, device, min(STAGING, at_most))
    for rows in plan.in_place:
        for some in rows.split(staging.tree.capacity):
            staging.tree.add(some, [PIECE_ROWS] * (len(some) // PIECE_ROWS))
    for batch in plan.batches(staging.rows, min(FEW, staging.tree.most_pieces)):
        staging.add(batch)
    return staging.tree.finish(), plan.places


def is_shortage(error: Exception) -> bool:
    """Whether there was no room: cuBLAS says so, too, when it cannot make its handle."""
    return is_out_of_memory(error) or "STATUS_NOT_INITIALIZED" in str(error)


@dataclass(slots=True)
class _Piece:
    """Up to PIECE bytes that are gathered: as int64 where that is possible, which is how they are
    copied fastest."""

    content: torch.Tensor
    owner: int  # whose, and
    index: int  # which of its pieces
    rows: int
    missing: int  # bytes up to the end of the last row, which are zeros
    words: bool

    def is_like(self, other: _Piece) -> bool:
        """Whether the two can be gathered together."""
        return self.words == other.words and (self.rows < GROUP) == (other.rows < GROUP)


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

    def rows_gathered(self) -> int:
        return sum(piece.rows for piece in self.gathered)

    def products(self) -> int:
        """Of all rows, with those that are filled in to whole groups."""
        gathered = sum(-(-piece.rows // GROUP) * GROUP for piece in self.gathered)
        return sum(map(len, self.in_place)) + gathered

    def batches(self, rows: int, most: int) -> Iterator[list[_Piece]]:
        """Up to `most` pieces that are alike and fit into `rows` rows."""
        batch: list[_Piece] = []
        free = rows
        for piece in self.gathered:
            if piece.rows > free or len(batch) == most or (batch and not batch[0].is_like(piece)):
                yield batch
                batch, free = [], rows
            batch.append(piece)
            free -= piece.rows
        if batch:
            yield batch


def _plan(contents: list[torch.Tensor], least: int) -> _Plan:
    """Args:
    least: bytes from which on it is read where it lies.
    """
    in_place, pieces = [], []
    places: list[list[int]] = []
    used = 0
    for owner, content in enumerate(contents):
        nbytes, whole = content.numel(), 0
        is_aligned = (content.data_ptr() | int(content.storage_offset())) % 16 == 0
        if is_aligned and nbytes >= max(least, PIECE):
            whole = nbytes // PIECE
            in_place.append(content[: whole * PIECE].view(torch.int8).view(-1, ROW))
        places.append([*range(used, used + whole), *[0] * (-(-nbytes // PIECE) - whole)])
        used += whole
        for index in range(whole, -(-nbytes // PIECE)):
            size = min(PIECE, nbytes - index * PIECE)
            part = content if size == nbytes else content[index * PIECE : index * PIECE + size]
            words = is_aligned and size % 8 == 0
            rows = rows_of(size)
            part = part.view(torch.int64) if words else part
            pieces.append(_Piece(part, owner, index, rows, rows * ROW - size, words))
    # Each dtype is gathered by itself. Those of one size lie side by side, since their products are
    # then put in place by one copy; what needs no zeros, whole pieces and groups, comes first.
    pieces.sort(key=lambda piece: (piece.words, -piece.rows))
    for place, piece in enumerate(pieces, used):
        places[piece.owner][piece.index] = place
    return _Plan(in_place, pieces, places)


class _Staging:
    """The memory of one run: where pieces are gathered, and the tree."""

    def __init__(
        self, products: type[Products], plan: _Plan, nbytes: int, device: torch.device
    ) -> None:
        gathered, workspace = plan.rows_gathered(), products.workspace(nbytes)
        # Of 16 parts of the memory 2 are for products of rows, 1 for those of groups, and 2 for
        # floats where they are needed.
        part = (nbytes - FIXED) // 16
        self.rows = min(part * (10 if workspace else 12) // ROW, gathered)
        self._bytes = empty(
            max(self.rows, SPARE if gathered else 0) * ROW, dtype=torch.uint8, device=device
        )
        zeros = GROUP * ROW if gathered else 0
        self._zeros = empty(zeros, dtype=torch.uint8, device=device).zero_()
        count, pieces = plan.products(), sum(map(len, plan.places))
        most = min(2 * part // (PIECE_ROWS * PRODUCT), -(-count // PIECE_ROWS))
        most_pieces = min(part // (GROUPS * PRODUCT), pieces)
        self.tree = Tree(
            products(device, min(workspace, max(count, SPARE))),
            most * PIECE_ROWS,
            most_pieces,
            min(self.rows, min(FEW, most_pieces) * GROUP),
            pieces,
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
        rows = self._bytes.view(torch.int8).view(-1, ROW)[: max(count, SPARE)]
        self.tree.add(rows, [piece.rows for piece in batch])


def _staging(products: type[Products], plan: _Plan, device: torch.device, nbytes: int) -> _Staging:
    reason = f"{nbytes} bytes were allowed"
    while nbytes >= LEAST_STAGING:
        try:
            return _Staging(products, plan, nbytes, device)
        except RuntimeError as error:
            if not is_shortage(error):
                raise
            reason = str(error)
            error.__traceback__ = None  # its frames hold what was allocated
        nbytes //= 2
    # Raised out here, so that no traceback keeps what was allocated.
    raise torch.OutOfMemoryError(
        f"No room on {device} for the {LEAST_STAGING} bytes that digests take: {reason}"
    )
