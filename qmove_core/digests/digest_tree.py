"""The arithmetic of digests: bytes times random numbers, in three levels, with matrix products that
every device has.

Bytes are taken as int8, in rows of 1024. Level 0 multiplies each row with a random int8 matrix of
1024 x 8, exactly, in int32: 32 bytes for 1024. Level 1 does the same with the 32 bytes each of 16
rows, and level 2 with those of 32 such groups, so that a piece of 512 KiB ends as 32 bytes. Each
level has its own matrix. A smaller piece counts as filled up with zeros. Their products are zeros:
beyond the last group, and in a piece of less than one, they are filled in, not computed.

Odds that a change of a piece goes unseen: where a row differs, one column of the product is the
same for at most one of the 256 values of one entry, so all 8 are with at most 256^-8 = 2^-64; the
same for the next two levels; 3 x 2^-64 in all. This holds for changes that do not depend on the
matrices, as a computer's and its user's do. The matrices are fixed and public: whoever wants to
deceive the digest can.

Why matrix products: PyTorch has no integer dot product on GPUs, and products and sums one by one
pass over the bytes four times, while `torch._int_mm` reads them once, on tensor cores. The price is
cuBLAS: it may lack a shape, run out of memory, and keeps a workspace. So any failure means that
there is no digest this time (`digest.py`), and its workspaces are freed after each move
(`devices.release_cached`). Where `_int_mm` is missing or fails float32 is as exact: 1024 x 128 x
128 = 2^24.
"""

from __future__ import annotations

import weakref
from itertools import groupby

import torch

from ..storages import empty

ROW = 1024  # bytes; the most of which float32 can hold the sum of products
COLUMNS = 8  # the fewest that `_int_mm` takes
PRODUCT = COLUMNS * 4  # bytes of a row's product
GROUP = 16  # rows; a piece that has more is gathered with zeros up to a whole group
GROUPS = 32
PIECE = GROUPS * GROUP * ROW  # bytes that end as one product
PIECE_ROWS = PIECE // ROW
# Rows at least: `_int_mm` takes no fewer than 17. What those not asked for give is overwritten.
SPARE = 32

_LEVELS = (ROW, GROUP * PRODUCT, GROUPS * PRODUCT)  # bytes that a row has
_NUMBERS = sum(_LEVELS) * COLUMNS


def rows_of(nbytes: int) -> int:
    """How many rows of a piece of this many bytes, 1 to PIECE, are multiplied: whole groups, or
    fewer than one."""
    rows = -(-nbytes // ROW)
    return rows if rows < GROUP else -(-rows // GROUP) * GROUP


def random_bytes(count: int, device: torch.device) -> torch.Tensor:
    """`count` int8 numbers, a multiple of 8, the same on every device: splitmix64, queued there
    rather than copied there."""
    numbers = torch.arange(1, count // 8 + 1, dtype=torch.int64, device=device).mul_(
        _signed(0x9E3779B97F4A7C15)
    )
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        numbers.bitwise_xor_(numbers >> shift).mul_(_signed(factor))
    return numbers.bitwise_xor_(numbers >> 31).view(torch.int8)


def _signed(number: int) -> int:
    return number - (1 << 64)


def matrices(device: torch.device) -> torch.Tensor:
    """The numbers of all levels, int8: 20 KiB.

    Made once for all who use them at a time, on the same stream.
    """
    key = device, getattr(current_stream(device), "stream_id", 0)
    numbers = _in_use.get(key)
    if numbers is None:
        numbers = _in_use[key] = random_bytes(_NUMBERS, device)
    return numbers


_in_use: weakref.WeakValueDictionary[tuple[torch.device, int], torch.Tensor] = (
    weakref.WeakValueDictionary()
)


def current_stream(device: torch.device) -> torch.Stream | None:
    """The stream that this thread queues its work for `device` on; None where there are none."""
    module = torch.get_device_module(device)
    return (
        module.current_stream(device)
        if device.type != "cpu" and hasattr(module, "current_stream")
        else None
    )


class IntProducts:
    """Products by `torch._int_mm`: CUDA of compute capability 7.5 or later."""

    def __init__(self, device: torch.device, rows: int) -> None:
        self._numbers = matrices(device)

    @staticmethod
    def workspace(staging: int) -> int:
        """Rows of workspace that may be taken of `staging` bytes."""
        return 0

    def multiply(self, level: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """`out` (int32, n x 8) = `rows` (int8, n x at most 1024; n > 16) times the matrix of the
        level."""
        torch._int_mm(rows, _matrix(self._numbers, level, rows.shape[1]), out=out)


class FloatProducts:
    """The same products in float32, for all other devices, in steps of `rows` rows.

    Exact also where float32 products run as TF32 or bfloat16, which hold all int8; `out=` keeps
    autocast away.
    """

    def __init__(self, device: torch.device, rows: int) -> None:
        self._numbers = matrices(device).float()
        self._rows = empty(rows * ROW, dtype=torch.float32, device=device)
        self._out = empty(rows, COLUMNS, dtype=torch.float32, device=device)

    @staticmethod
    def workspace(staging: int) -> int:
        """Rows of workspace that may be taken of `staging` bytes."""
        return staging // 8 // (ROW * 4)

    def multiply(self, level: int, rows: torch.Tensor, out: torch.Tensor) -> None:
        """As `IntProducts.multiply`."""
        matrix = _matrix(self._numbers, level, rows.shape[1])
        step = len(self._out)
        for part, target in zip(rows.split(step), out.split(step), strict=True):
            floats = self._rows[: part.numel()].view(part.shape).copy_(part)
            target.copy_(torch.mm(floats, matrix, out=self._out[: len(part)]))


Products = IntProducts | FloatProducts


def _matrix(numbers: torch.Tensor, level: int, width: int) -> torch.Tensor:
    """width x 8, stored by columns: the layout that int8 products have on every GPU."""
    start = sum(_LEVELS[:level]) * COLUMNS
    return numbers[start : start + width * COLUMNS].view(COLUMNS, width).t()


class Tree:
    """Takes rows in, and writes 32 bytes for each piece they make up, one piece after the other.

    Args:
        products: how to multiply.
        rows: of level 0 that it holds the products of (`capacity`) before it goes on to the next
            levels; those of a piece at least.
        most_pieces: that it holds, likewise.
        at_a_time: rows of pieces of less than a group that are added at a time, at most.
        pieces: that will come in all.
    """

    def __init__(
        self,
        products: Products,
        rows: int,
        most_pieces: int,
        at_a_time: int,
        pieces: int,
        device: torch.device,
    ) -> None:
        self._products = products
        self.capacity, self.most_pieces = rows, most_pieces
        self._filled, self._done = 0, 0
        self._groups: list[int] = []  # of each piece that is held

        def numbers(count: int) -> torch.Tensor:
            return empty(count, COLUMNS, dtype=torch.int32, device=device)

        self._level1 = numbers(rows + SPARE * GROUP)
        self._level2 = numbers((most_pieces + SPARE) * GROUPS)
        self._unfilled = numbers(max(rows // GROUP, at_a_time) + SPARE)
        self.out = numbers(pieces + SPARE)

    def add(self, rows: torch.Tensor, pieces: list[int]) -> None:
        """Takes `rows` (int8, n x 1024, n > 16) in, of which so many (`rows_of`) make up each
        piece; more rows do not count."""
        groups = [-(-count // GROUP) for count in pieces]
        count = sum(groups) * GROUP
        if (
            self._filled + count > self.capacity
            or len(self._groups) + len(pieces) > self.most_pieces
        ):
            self.finish()
        place = self._level1[self._filled :]
        if sum(pieces) == count:
            self._products.multiply(0, rows, place[: len(rows)])
        else:
            products = self._unfilled[: len(rows)]
            self._products.multiply(0, rows, products)
            _fill_up(products, pieces, GROUP, place[:count])
        self._filled += count
        self._groups += groups

    def finish(self) -> torch.Tensor:
        """Brings all rows up to the last level; returns what came out so far, and 32 rows that do
        not count."""
        pieces = len(self._groups)
        if pieces:
            whole = min(self._groups) == GROUPS
            products = self._reduce(
                1, self._level1, sum(self._groups), self._level2 if whole else self._unfilled
            )
            if not whole:
                _fill_up(products, self._groups, GROUPS, self._level2[: pieces * GROUPS])
            self._reduce(2, self._level2, pieces, self.out[self._done :])
            self._done += pieces
        self._groups, self._filled = [], 0
        return self.out

    def _reduce(
        self, level: int, products: torch.Tensor, count: int, out: torch.Tensor
    ) -> torch.Tensor:
        """Multiplies `count` rows, made of the products of the level below, into `out`."""
        rows = products.view(-1).view(torch.int8).view(-1, _LEVELS[level])
        # Rows beyond `count` are there only because `_int_mm` takes no fewer than 17.
        some = max(count, SPARE)
        self._products.multiply(level, rows[:some], out[:some])
        return out[:count]


def _fill_up(products: torch.Tensor, counts: list[int], each: int, out: torch.Tensor) -> None:
    """Puts the products of each piece, so many of them, into `out`, where every piece has `each`:
    zeros follow. One copy for pieces side by side that have equally many."""
    out.zero_()
    start = place = 0
    for count, alike in groupby(counts):
        pieces = len(list(alike))
        some = products[start : start + pieces * count].view(pieces, count, COLUMNS)
        out[place : place + pieces * each].view(pieces, each, COLUMNS)[:, :count].copy_(some)
        start, place = start + pieces * count, place + pieces * each
