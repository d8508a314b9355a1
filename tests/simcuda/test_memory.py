"""Capacity, exact counters, and poison in freed memory."""

from __future__ import annotations

import pytest
import torch

import simcuda

MIB = 1 << 20


@pytest.fixture
def small_device():
    simcuda.set_memory(simcuda.counters(1).allocated + 8 * MIB, device=1)
    yield torch.device("cuda:1")
    simcuda.set_memory("4GiB", device=1)


def test_out_of_memory_says_what_was_asked_and_what_is_free(small_device):
    held = torch.empty(6 * MIB, dtype=torch.uint8, device=small_device)
    message = r"Tried to allocate 3\.00 MiB\. GPU 1 .* of which 2\.00 MiB is free"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        torch.empty(3 * MIB, dtype=torch.uint8, device=small_device)
    torch.empty(2 * MIB, dtype=torch.uint8, device=small_device)
    del held
    torch.empty(8 * MIB, dtype=torch.uint8, device=small_device)


def test_an_operators_output_counts_against_the_capacity(small_device):
    x = torch.ones(5 * MIB, dtype=torch.uint8, device=small_device)
    with pytest.raises(torch.OutOfMemoryError):
        x + x
    assert simcuda.counters(1).allocated - x.nbytes == torch.cuda.memory_allocated(1) - x.nbytes


def test_torch_cuda_reports_the_same_figures(small_device):
    torch.cuda.reset_peak_memory_stats(1)
    start = torch.cuda.memory_allocated(1)
    x = torch.empty(MIB, dtype=torch.uint8, device=small_device)
    del x
    assert torch.cuda.memory_allocated(1) == start == torch.cuda.memory_reserved(1)
    assert torch.cuda.max_memory_allocated(1) == start + MIB
    free, total = torch.cuda.mem_get_info(1)
    assert free == 8 * MIB and total == start + 8 * MIB
    assert torch.cuda.get_device_properties(1).total_memory == total
    assert torch.cuda.memory_stats(1)["active_bytes.all.current"] == start
    assert "CUDA memory summary" in torch.cuda.memory_summary(1)


def test_counters_are_exact_and_count_each_direction():
    host, simulated = torch.ones(1000), torch.empty(1000, device="cuda")
    simcuda.reset_counters()
    base = simcuda.counters()
    assert base.peak == base.allocated and base.allocations == 0
    simulated.copy_(host)
    simulated.cpu()
    other = simulated.to("cuda:1")
    simulated.add_(1)
    simulated.clone()
    c, c1 = simcuda.counters(0), simcuda.counters(1)
    assert (c.h2d_copies, c.d2h_copies, c.d2d_copies) == (1, 1, 1)
    assert (c.h2d_bytes, c.d2h_bytes, c.d2d_bytes) == (4000, 4000, 4000)
    assert (c1.h2d_copies, c1.d2h_copies, c1.d2d_copies, c1.d2d_bytes) == (0, 0, 1, 4000)
    assert c.allocations == 1 and c.peak - base.allocated == 4000 and c.allocated == base.allocated
    assert other.sum().item() == 1000 and simcuda.counters(1).d2h_bytes == 4, (
        "item() is a copy of one element"
    )


def test_converting_copies_move_the_narrow_bytes_once():
    host = torch.ones(1000, dtype=torch.float16)
    simcuda.reset_counters()
    host.to("cuda", dtype=torch.float32)
    assert simcuda.counters().h2d_copies == 1
    simcuda.reset_counters()
    torch.ones(10, 20, device="cuda").t().cpu()
    assert (simcuda.counters().d2h_copies, simcuda.counters().d2h_bytes) == (1, 800)


def test_fresh_memory_does_not_read_as_zeros():
    assert torch.empty(64, dtype=torch.uint8, device="cuda").unique().tolist() == [0xDB]


def read_bytes(address: int, count: int) -> bytes:
    import ctypes

    return ctypes.string_at(address, count)


def test_freed_memory_is_poisoned_and_kept_for_a_while():
    x = torch.ones(4096, dtype=torch.uint8, device="cuda")
    address = x.data_ptr()
    assert read_bytes(address, 4096) == b"\x01" * 4096
    del x
    assert read_bytes(address, 4096) == b"\xdb" * 4096


def test_zero_bytes_cost_nothing():
    before = simcuda.counters()
    x = torch.empty(0, 5, device="cuda")
    assert (x + 1).shape == (0, 5) and x.cpu().to("cuda").numel() == 0
    assert simcuda.counters() == before


def test_sizes_are_read_as_people_write_them():
    assert simcuda.parse_size("4GiB") == 4 << 30 == simcuda.parse_size("4 g")
    assert simcuda.parse_size("1.5MB") == 1_500_000 and simcuda.parse_size(7) == 7
    for wrong in ("", "four", "4QiB", -1):
        with pytest.raises(ValueError):
            simcuda.parse_size(wrong)
