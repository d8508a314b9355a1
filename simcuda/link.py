"""What the link between host and devices costs: every constant of the virtual clock, with its
source.

The figures under ``PRESETS`` are others' measurements as the project collected them ("Figures to
beat"). Those of pageable memory differ ten times from case to case, so there is a preset for each
end. A constant nobody measured is marked as assumed. Change one with
``use(dataclasses.replace(link.PCIE5, launch=0.0))``.
"""

from __future__ import annotations

import ctypes
from dataclasses import astuple, dataclass, replace

from simcuda.library import is_loaded, sim

GIB = 1 << 30


@dataclass(frozen=True)
class Link:
    """Rates in bytes a second and delays in seconds.

    The order of the fields is that of ``Link`` in csrc/sim.h.
    """

    h2d_pinned: float
    """Host to device, pinned."""
    d2h_pinned: float
    """Device to host, pinned."""
    h2d_pageable: float
    """Host to device from pageable memory, the driver's staging included."""
    d2h_pageable: float
    """Device to host into pageable memory, the driver's staging included."""
    d2d: float
    """Device to device, over the same bus."""
    copy_latency: float
    """Added to every copy."""
    pin_untouched: float
    """Locking pages that have to be made first: cudaHostAlloc, or cudaHostRegister on untouched memory."""
    pin_touched: float
    """Locking pages that were touched before: cudaHostRegister."""
    unpin: float
    """Unlocking: cudaHostUnregister."""
    host_copy: float
    """A memcpy in host memory (``simcuda.clock.host_copy``)."""
    launch: float
    """Host time to queue any operation on a stream."""
    segment_free: float
    """Giving one segment of the allocator back to the driver (cudaFree), beside the wait for the
    device that comes before it."""


PCIE5 = Link(
    h2d_pinned=55e9,  # thaw, H100: 16 GB in 0.29 s = 55 GB/s
    d2h_pinned=50e9,  # gen 5 x16, pinned, "about 50-55 GB/s": the lower end
    h2d_pageable=17e9,  # H200: 10 to 17 GB/s (DeepSpeed#8283); the fast end, which flatters others
    d2h_pageable=17e9,  # the same, into pages that were touched before
    d2d=50e9,  # assumed: the bus, without NVLink
    copy_latency=10e-6,  # assumed
    pin_untouched=16 * GIB / 7.9,  # cudaHostAlloc of 16 GiB: 7.9 s
    pin_touched=16 * GIB / 1.6,  # 16 GiB touched by threads, then cudaHostRegister: 1.6 s
    unpin=4.5e9,  # 0.22 s for each GB (kekzl/imp#1653)
    host_copy=10e9,  # assumed: one thread
    launch=5e-6,  # assumed
    segment_free=0.3e-3,  # "0.1 to 1 ms each": between the two
)

PCIE4 = Link(
    h2d_pinned=25e9,  # gen 4 x16, pinned: about 25 GB/s
    d2h_pinned=25e9,  # gen 4 x16, pinned: about 25 GB/s (12.6 GB/s were measured on an A100 host)
    h2d_pageable=12e9,  # 6 to 12 GB/s: gen 3, 6.8 (cupy#3450); the fast end, which flatters others
    d2h_pageable=10e9,  # 6 to 10 GB/s into pages that were touched before; the fast end
    d2d=25e9,  # assumed: the bus, without NVLink
    copy_latency=10e-6,  # assumed
    pin_untouched=16 * GIB / 7.9,  # as above: the host's work, not the link's
    pin_touched=16 * GIB / 1.6,  # as above
    unpin=4.5e9,  # as above
    host_copy=10e9,  # assumed: one thread
    launch=5e-6,  # assumed
    segment_free=0.3e-3,  # "0.1 to 1 ms each": between the two
)

# The slow end of what was measured of pageable copies: device to host, into memory that was just
# allocated, whose pages are made meanwhile (pytorch#138018, A100: 1.4 GB/s).
FRESH_PAGES = 1.4e9
PCIE4_SLOW = replace(PCIE4, h2d_pageable=6e9, d2h_pageable=FRESH_PAGES)
PCIE5_SLOW = replace(PCIE5, h2d_pageable=10e9, d2h_pageable=FRESH_PAGES)

PRESETS: dict[str, Link] = {
    "pcie4": PCIE4,
    "pcie5": PCIE5,
    "pcie4, slow pageable": PCIE4_SLOW,
    "pcie5, slow pageable": PCIE5_SLOW,
}

_current: Link = PCIE4


def use(link: str | Link) -> None:
    """Takes "pcie4" (what activation starts with), "pcie5" or a ``Link`` of one's own from now on."""
    global _current
    if isinstance(link, str):
        if link not in PRESETS:
            raise ValueError(
                f"no link named {link!r}: use one of {', '.join(PRESETS)} or a simcuda.link.Link"
            )
        link = PRESETS[link]
    _current = link
    if is_loaded():
        values = astuple(link)
        sim().sim_set_link((ctypes.c_double * len(values))(*values))


def current() -> Link:
    """The constants in use."""
    return _current
