"""Two kernels whose launches and conditions are CUDA's own: `_foreach_copy_` and `_int_mm`."""

from __future__ import annotations

import pytest
import torch

import simcuda

PAIRS = 110  # that CUDA packs into one launch


def launches(act) -> float:
    """How many operations the host queued."""
    before = simcuda.clock.now()
    act()
    return (simcuda.clock.now() - before) / simcuda.link.current().launch


def pairs(count: int, size: int = 10) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    sources = [torch.full((size,), float(number), device="cuda") for number in range(count)]
    return [torch.zeros(size, device="cuda") for _ in sources], sources


@pytest.mark.parametrize(
    ("count", "expected"), [(1, 1), (PAIRS, 1), (PAIRS + 1, 2), (3 * PAIRS, 3), (3 * PAIRS + 1, 4)]
)
def test_a_list_is_copied_in_one_launch_for_110_pairs(count, expected):
    targets, sources = pairs(count)
    assert launches(lambda: torch._foreach_copy_(targets, sources)) == pytest.approx(expected)
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


@pytest.mark.parametrize(
    "differ",
    [
        lambda targets, sources: targets.__setitem__(1, targets[1].half()),
        lambda targets, sources: sources.__setitem__(1, torch.full((1,), 1.0, device="cuda")),
        lambda targets, sources: sources.__setitem__(1, torch.ones(20, device="cuda")[::2]),
        lambda targets, sources: sources.__setitem__(1, torch.ones(10)),
        lambda targets, sources: targets.__setitem__(1, torch.zeros(10, device="cuda:1")),
    ],
    ids=["dtype", "shape", "strides", "from the host", "to another device"],
)
def test_a_list_that_is_not_all_alike_is_copied_one_by_one_and_right(differ):
    targets, sources = pairs(5)
    differ(targets, sources)
    assert launches(lambda: torch._foreach_copy_(targets, sources)) >= 5 - 1e-6
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target.cpu(), source.cpu().to(target.dtype).expand(target.shape))


def test_lists_of_two_lengths_are_refused():
    targets, sources = pairs(3)
    with pytest.raises(RuntimeError):
        torch._foreach_copy_(targets, sources[:2])


def test_a_list_copy_runs_behind_the_late_copies_that_it_reads():
    host = torch.full((10,), 7.0).pin_memory()
    staging, target = torch.zeros(10, device="cuda"), torch.zeros(10, device="cuda")
    staging.copy_(host, non_blocking=True)
    torch._foreach_copy_([target], [staging])
    assert target.tolist() == [7.0] * 10


def test_a_list_copy_that_does_not_wait_for_another_stream_shows_old_bytes():
    host = torch.full((10,), 7.0).pin_memory()
    staging, target = torch.zeros(10, device="cuda"), torch.ones(10, device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        staging.copy_(host, non_blocking=True)
    torch._foreach_copy_([target], [staging])
    assert target.tolist() == [0.0] * 10
    side.synchronize()


def test_no_copy_over_the_link_and_no_memory():
    targets, sources = pairs(PAIRS)
    before = simcuda.counters()
    torch._foreach_copy_(targets, sources)
    after = simcuda.counters()
    assert (after.allocations, after.h2d_copies, after.d2h_copies) == (
        before.allocations,
        before.h2d_copies,
        before.d2h_copies,
    )


def whole_numbers(rows: int, columns: int, seed: int, largest: bool = False) -> torch.Tensor:
    if largest:
        return torch.full((rows, columns), -128, dtype=torch.int8)
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(17, 8, 8), (100, 1024, 8), (600, 2056, 16), (17, 4096, 64)]
)
@pytest.mark.parametrize("largest", [False, True])
def test_int_products_are_exact(rows, depth, columns, largest):
    left, right = whole_numbers(rows, depth, 1, largest), whole_numbers(depth, columns, 2, largest)
    expected = torch.from_numpy(left.numpy().astype("int64") @ right.numpy().astype("int64"))
    out = torch.empty(rows, columns, dtype=torch.int32, device="cuda")
    assert torch._int_mm(left.cuda(), right.cuda(), out=out) is out
    assert torch.equal(out.cpu().long(), expected)
    with torch.autocast("cuda"):
        assert torch.equal(torch._int_mm(left.cuda(), right.cuda(), out=out).cpu().long(), expected)


@pytest.mark.parametrize(
    ("rows", "depth", "columns", "message"),
    [
        (16, 8, 8, r"self.size\(0\) needs to be greater than 16, but got 16"),
        (17, 12, 8, r"self.size\(1\) needs to be greater than 0 and a multiple of 8, but got 12"),
        (17, 8, 4, r"mat2.size\(1\) needs to be greater than 0 and a multiple of 8, but got 4"),
    ],
)
def test_int_products_have_cudas_conditions(rows, depth, columns, message):
    left, right = whole_numbers(rows, depth, 1).cuda(), whole_numbers(depth, columns, 2).cuda()
    out = torch.empty(rows, columns, dtype=torch.int32, device="cuda")
    with pytest.raises(RuntimeError, match=message):
        torch._int_mm(left, right, out=out)
