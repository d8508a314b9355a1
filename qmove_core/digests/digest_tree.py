"""The arithmetic of digests: bytes times random numbers, in three levels, with matrix products that
every device has.

Bytes are taken as int8, in rows of 1024. Level 0 multiplies each row with a random int8 matrix of
1024 x 8, exactly, in int32: 32 bytes for 1024. Level 1 does the same with the 32 bytes each of up
to 32 rows, and level 2 with those of up to 16 such groups, so that a piece of up to 512 KiB ends as
32 bytes. Each level has its own matrix.

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

import torch

from ..storages import empty

ROW = 1024  # bytes; the most of which float32 can hold the sum of products
COLUMNS = 8  # the fewest that `_int_mm` takes
PRODUCT = COLUMNS * 4  # bytes of a row's product
GROUP = ROW // PRODUCT  # rows whose products fill one row of the next level
GROUPS = 16
PIECE = GROUPS * GROUP * ROW  # bytes that end as one product
# Rows at least: `_int_mm` takes no fewer than 17. What those not asked for give is overwritten.
SPARE = 32

_LEVELS = (ROW, ROW, GROUPS * PRODUCT)  # bytes that a row has at most
_NUMBERS = sum(_LEVELS) * COLUMNS

_FEW_ROWS = (*range(1, 9), 10, 12, 14, 16, 20, 24, 28, 32)
_FEW_GROUPS = (*range(2, 9), 10, 12, 14, 16)
# (groups, rows in each): few, since each shape that occurs is a product of its own; fine, since
# they are padded with zeros.
SHAPES = [(1, rows) for rows in _FEW_ROWS] + [
    (n, rows) for n in _FEW_GROUPS for rows in _FEW_ROWS if rows >= 20
]
_SHAPE_OF_ROWS = [
    min(
        (shape for shape in SHAPES if shape[0] * shape[1] >= rows),
        key=lambda shape: (shape[0] * shape[1], shape),
    )
    for rows in range(PIECE // ROW + 1)
]
MOST_PADDING = ROW * max(
    groups * of - rows + 1 for rows, (groups, of) in enumerate(_SHAPE_OF_ROWS) if rows
)

Shape = tuple[int, int]


def shape_of(nbytes: int) -> Shape:
    """How a piece of this many bytes, 1 to PIECE, is taken: depends on nothing else, so that equal
    bytes have equal digests."""
    return _SHAPE_OF_ROWS[-(-nbytes // ROW)]


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
        width = rows.shape[1]
        matrix = _matrix(self._numbers, level, width)
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
        rows: of level 0 that it holds (`capacity`) before it goes on to the next level.
        pieces: that will come in all.
    """

    def __init__(self, products: Products, rows: int, pieces: int, device: torch.device) -> None:
        self._products = products
        self.capacity, self._filled, self._done = rows, 0, 0
        self._runs: list[tuple[Shape, int]] = []
        self._level1 = empty(rows + SPARE * GROUP, COLUMNS, dtype=torch.int32, device=device)
        self._level2 = empty(
            rows // GROUPS + SPARE * GROUPS, COLUMNS, dtype=torch.int32, device=device
        )
        self.out = empty(pieces + SPARE, COLUMNS, dtype=torch.int32, device=device)

    def add(self, rows: torch.Tensor, runs: list[tuple[Shape, int]]) -> None:
        """Takes `rows` (int8, n x 1024, n > 16) in, of which `runs` says (shape, pieces) in order;
        more rows do not count."""
        count = sum(groups * of_rows * pieces for (groups, of_rows), pieces in runs)
        if self._filled + count > self.capacity:
            self.finish()
        self._products.multiply(0, rows, self._level1[self._filled : self._filled + len(rows)])
        self._filled += count
        for shape, pieces in runs:
            if self._runs and self._runs[-1][0] == shape:
                pieces += self._runs.pop()[1]
            self._runs.append((shape, pieces))

    def finish(self) -> torch.Tensor:
        """Brings all rows up to the last level; returns what came out so far, and 32 rows that do
        not count."""
        taken, between = (
            self._level1.view(-1).view(torch.int8),
            self._level2.view(-1).view(torch.int8),
        )
        for (groups, rows), pieces in self._runs:
            first = self.out[self._done :] if groups == 1 else self._level2
            self._reduce(1, taken, pieces * groups, rows * PRODUCT, first)
            if groups > 1:
                self._reduce(2, between, pieces, groups * PRODUCT, self.out[self._done :])
            taken = taken[pieces * groups * rows * PRODUCT :]
            self._done += pieces
        self._runs, self._filled = [], 0
        return self.out

    def _reduce(
        self, level: int, content: torch.Tensor, count: int, width: int, out: torch.Tensor
    ) -> None:
        # Rows beyond `count` are there only because `_int_mm` takes no fewer than 17.
        count = max(count, SPARE)
        self._products.multiply(level, content[: count * width].view(count, width), out[:count])
