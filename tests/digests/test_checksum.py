"""The host's checksum of a tensor's bytes: the same for the same bytes, another one for any change."""

from __future__ import annotations

import pytest
import torch

from qmove_core.digests.checksum import _CHUNK, checksum_of
from tests.builders.device import GPU


def random_bytes(nbytes: int) -> torch.Tensor:
    """The same ones each time."""
    return torch.randint(
        0, 256, (nbytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_it_is_of_the_bytes_that_show_wherever_they_lie(gpu: GPU) -> None:
    base = torch.arange(200_000, dtype=torch.float32).view(400, 500)
    for shown in (
        base,
        base[3:7],
        base.t(),
        base[:, 3::7],
        base.to(torch.bfloat16),
        base.view(torch.uint8)[:, 1:],
    ):
        assert (
            checksum_of(shown)
            == checksum_of(shown.to(gpu.device))
            == checksum_of(shown.contiguous().clone())
        )


@pytest.mark.parametrize("nbytes", [1, 7, 8, 9, 1 << 20, (1 << 20) + 1, _CHUNK + 3])
def test_one_changed_bit_anywhere_shows(nbytes: int) -> None:
    content = random_bytes(nbytes)
    found = [checksum_of(content)]
    for place in sorted({0, nbytes // 2, nbytes - 1}):
        for bit in (1, 128):
            content[place] ^= bit
            found.append(checksum_of(content))
            content[place] ^= bit
    assert len(set(found)) == len(found)
    assert checksum_of(content) == found[0]


@pytest.mark.parametrize("distance", [1, 2, 4, 8, 800])
def test_two_changed_signs_do_not_cancel(distance: int) -> None:
    content = random_bytes(4096)
    before = checksum_of(content)
    content[[7, 7 + distance]] ^= 128
    assert checksum_of(content) != before


def test_exchanged_words_show() -> None:
    words = random_bytes(8 << 17).view(torch.int64)
    before = checksum_of(words)
    for first, second in ((0, 1), (0, 1 << 16), ((1 << 16) - 1, 1 << 16)):
        words[[first, second]] = words[[second, first]]
        assert checksum_of(words) != before
        words[[first, second]] = words[[second, first]]
    assert checksum_of(words) == before


def test_zeros_of_different_lengths_differ() -> None:
    lengths = (0, 1, 8, 9, 1 << 20, 1 << 21)
    assert len({checksum_of(torch.zeros(n, dtype=torch.uint8)) for n in lengths}) == len(lengths)


def test_inference_mode_and_default_device_change_nothing() -> None:
    tensor = torch.arange(1000)
    expected = checksum_of(tensor)
    with torch.inference_mode(), torch.device("meta"):
        assert checksum_of(tensor) == expected
