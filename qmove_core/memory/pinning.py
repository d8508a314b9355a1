"""Page-locked host memory: how much of it there may be, and the calls that lock and unlock it.

Memory is touched first and then registered (`cudaHostRegister`), which is several times as fast as
letting the driver allocate it and is exact to the page, where PyTorch's pinned allocator rounds up
to powers of two. Only CUDA and ROCm are asked; on other devices host memory stays pageable.

The memlock limit (`ulimit -l`) does not decide: the drivers of NVIDIA and AMD lock pages themselves
and do not charge it, and its usual 8 MiB would forbid pinning to most people. If a driver refuses,
it is named in the message.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from .. import devices, hosting
from ..errors import readable_bytes
from ..settings import settings
from . import unlocking

log = logging.getLogger("qmove")

# Of RAM. WDDM lets all processes lock half of it together, and that counts against the GPU.
WINDOWS_SHARE = 0.4
WSL_BYTES = (
    768 << 20
)  # drivers refuse from 0.75 to 1 GiB on (microsoft/WSL#8447, NVIDIA/nvidia-docker#1725)
SYSTEM_SHARE = 0.9  # of RAM: locked pages cannot be swapped out, and the system needs some that can
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device, not only for the current one
_IS_REGISTERED, _IS_NOT_REGISTERED = 712, 713  # cudaErrorHostMemoryAlreadyRegistered, ...Not...


@dataclass(frozen=True)
class PinLimit:
    """Bytes that may be page-locked in all, what that limit is called, and what a user can do about
    it.

    Attributes:
        others: bytes that others in this process have locked, which are taken off already.
    """

    nbytes: int
    name: str
    advice: str
    others: int = 0


def pin_limit(
    chosen: int | None = None,
    *,
    windows: bool | None = None,
    wsl: bool | None = None,
    ram: int | None = None,
    others: int | None = None,
) -> PinLimit:
    """The limit that holds for what qmove page-locks: what the system allows less what others in
    this process have locked, and what the user has set.

    Args:
        chosen: bytes (`qmove.configure(pin_limit=...)`); it takes the place of what is known of
            Windows and WSL. None: as set.
        windows, wsl, ram: the system, and its RAM in bytes; None: as found here.
        others: bytes that others in this process have page-locked; None: as found here.
    """
    chosen = settings.pin_limit if chosen is None else chosen
    windows = sys.platform == "win32" if windows is None else windows
    wsl = is_wsl() if wsl is None else wsl
    ram = psutil.virtual_memory().total if ram is None else ram
    others = locked_by_others() if others is None else others
    limits = [
        _less(
            others,
            int(ram * SYSTEM_SHARE),
            f"{SYSTEM_SHARE:.0%} of RAM, so that the system can go on",
            "Park fewer models at a time, or add RAM.",
        )
    ]
    if chosen is not None:
        limits.append(
            PinLimit(
                chosen,
                "pin_limit of qmove.configure",
                "Raise it: qmove.configure(pin_limit=bytes).",
            )
        )
    elif windows:
        share = f"{WINDOWS_SHARE:.0%} of RAM, about what Windows allows"
        limits.append(_less(others, int(ram * WINDOWS_SHARE), share, _TRY_MORE))
    elif wsl:
        limits.append(
            _less(
                others,
                WSL_BYTES,
                "about what WSL allows",
                f"Linux or Windows without WSL allow far more. {_TRY_MORE}",
            )
        )
    return min(limits, key=lambda limit: limit.nbytes)


def _less(others: int, nbytes: int, name: str, advice: str) -> PinLimit:
    """A limit of the system, which holds for all that this process locks."""
    if others <= 0:
        return PinLimit(nbytes, name, advice)
    name += ", less what PyTorch and the program around qmove have locked"
    return PinLimit(max(0, nbytes - others), name, f"{_LOCK_LESS} {advice}", others)


def locked_by_others() -> int:
    """Bytes that others in this process have page-locked: PyTorch's allocator of pinned memory,
    with what it only keeps, where it says so (from 2.7 on), and the host of this program."""
    return _locked_by_pytorch() + max(0, hosting.page_locked_bytes())


def _locked_by_pytorch() -> int:
    statistics = getattr(torch.cuda, "host_memory_stats", None)  # empty without a context
    if statistics is None:
        return 0
    try:
        found = statistics()
    except RuntimeError as error:  # an allocator of the user's own may not count
        log.debug("PyTorch does not say what it has page-locked: %s", str(error))
        return 0
    # The names of 2.7, and of later ones, for what it has from the driver.
    return max(int(found.get(f"{name}.current", 0)) for name in _FROM_THE_DRIVER)


_FROM_THE_DRIVER = ("reserved_bytes", "allocated_bytes")
_LOCK_LESS = (
    "Let others lock less (pin_memory=True of data loaders; ComfyUI: --disable-pinned-memory)."
)
_TRY_MORE = "If this machine allows more: qmove.configure(pin_limit=bytes)."


def is_wsl() -> bool:
    """Whether this is Linux under Windows."""
    return sys.platform.startswith("linux") and "microsoft" in platform.release().lower()


def memlock_limit() -> int | None:
    """Bytes this process may lock by itself (`ulimit -l`); None for no limit or no such notion."""
    if os.name != "posix":
        return None
    import resource  # Unix only

    soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def is_possible() -> bool:
    """Whether host memory can be page-locked for the devices of this process at all, and may be."""
    if settings.pin_limit == 0:
        return False
    if torch.cuda._is_in_bad_fork():  # CUDA works in the parent only
        return False
    accelerator = devices.accelerator()
    if accelerator is None or accelerator.type != "cuda" or not torch.cuda.is_available():
        say_once(
            logging.INFO,
            "no CUDA",
            "Parked bytes lie in pageable memory: only CUDA and ROCm can page-lock it.",
        )
        return False
    return True


_lock = threading.Lock()  # of what is counted; never taken by a finalizer
_counted: dict[int, int] = {}  # address: bytes, from before the driver is asked
_registered: dict[int, int] = {}  # address: index of the device whose context knows it
_said: set[str] = set()


def registered_bytes() -> int:
    """Bytes of host memory that qmove has page-locked now."""
    return sum(list(_counted.values()))


def register(address: int, nbytes: int) -> bool:
    """Page-locks memory, which begins and ends at a page. False, with a line in the log, where that
    is refused.

    Call it where no SIGINT can come between it and the note of its result (`interrupts_deferred`).
    After an exception of another thread it may be called again, and so may `unregister`.
    """
    if address in _registered:
        return True
    limit = pin_limit()
    is_counted = _count(address, nbytes, limit.nbytes)
    while not is_counted and unlocking.wait_for_some():
        is_counted = _count(address, nbytes, limit.nbytes)
    if not is_counted:
        others = f", and {readable_bytes(limit.others)} by others" if limit.others else ""
        if settings.pin_limit != 0:
            say_once(
                logging.WARNING,
                limit.name,
                f"{readable_bytes(registered_bytes())} of host memory are page-locked{others}, and "
                f"no more may be: the limit is {readable_bytes(limit.nbytes)} ({limit.name}). "
                f"{_COST} {limit.advice}",
            )
        return False
    accepted = False
    try:
        index = _device_in_use()
        with torch.cuda.device(index):
            runtime = torch.cuda.cudart()
            again = _begin(address)
            code = runtime.cudaHostRegister(address, nbytes, PORTABLE)
            while int(code) not in (0, _IS_REGISTERED) and unlocking.wait_for_some():
                _clear_error(index)  # and again, now that there is more room
                code = runtime.cudaHostRegister(address, nbytes, PORTABLE)
            accepted = int(code) == 0 or (again and int(code) == _IS_REGISTERED)
            if accepted:
                _registered[address] = index
            else:
                _say_refused(nbytes, runtime.cudaGetErrorString(code))
            if int(code) != 0:
                _clear_error(index)
            _begun.discard(address)
    finally:
        if not accepted:
            _counted.pop(address, None)
    return accepted


def unregister(address: int) -> bool:
    """Unlocks what was registered at `address`. False if the driver refused: then the memory must
    stay mapped.

    No copy to or from it may be under way.
    """
    if address not in _registered:
        _counted.pop(address, None)  # an exception of another thread may have left it
        return True
    index = _registered[address]
    with torch.cuda.device(index):
        runtime = torch.cuda.cudart()
        again = _begin(address)
        code = runtime.cudaHostUnregister(address)
        is_unlocked = int(code) == 0 or (again and int(code) == _IS_NOT_REGISTERED)
        del _registered[address]
        _counted.pop(address, None)
        if int(code) != 0:
            _clear_error(index)
        if not is_unlocked:
            log.warning(
                "Page-locked memory could not be unlocked: %s. It stays taken.",
                runtime.cudaGetErrorString(code),
            )
        _begun.discard(address)
    return is_unlocked


_begun: set[int] = set()  # what the driver was asked to lock or unlock, and may have


def _begin(address: int) -> bool:
    """Notes that the driver is asked; says whether it was, and an exception came before the note of
    its answer."""
    again = address in _begun
    _begun.add(address)
    return again


def forget_in_child() -> None:
    """After a fork: what is registered belongs to the parent, and no lock of the parent's threads
    holds here."""
    global _lock
    _lock = threading.Lock()
    _counted.clear()
    _registered.clear()
    _begun.clear()


def _count(address: int, nbytes: int, limit: int) -> bool:
    """Counts what begins at `address` as locked, unless that would pass the limit."""
    with _lock:
        others = sum(size for start, size in list(_counted.items()) if start != address)
        if others + nbytes > limit:
            return False
        _counted[address] = nbytes
        return True


def _device_in_use() -> int:
    """The current device, or one that this process uses already: a first call on another would make
    a context there.

    A context costs hundreds of MB of VRAM. All devices see what is registered on one.
    """
    current = torch.cuda.current_device()
    candidates = [current, *range(torch.cuda.device_count())]
    return next((i for i in candidates if devices.has_context(torch.device("cuda", i))), current)


def _clear_error(index: int) -> None:
    """Takes away the errors that a refused call leaves behind, for somebody who has nothing to do
    with it: that of this thread, and the one that a driver may queue on the device besides
    (Comfy-Org/ComfyUI#10738).

    No memory may be freed before: with cudaMallocAsync a free finds the error too, and ends the
    process.
    """
    for get_last_error in _get_last_error():
        get_last_error()
    # The first step needs no memory, of which there may be none: the launch of any kernel raises
    # the error of this thread and so clears it. On a stream where nothing else is queued, whose
    # error would be taken for that of the refused call.
    device = torch.device("cuda", index)
    stream = devices.own_stream(device, "errors")
    for step in (lambda: torch.cuda._sleep(0), stream.synchronize):
        try:
            with devices.on_stream(stream, device):
                step()
        except RuntimeError as error:
            log.debug("cleared the error of a refused call: %s", str(error))


@functools.cache
def _get_last_error() -> list[Callable[[], int]]:
    """`cudaGetLastError` (`hipGetLastError`) of the runtimes that are loaded, which PyTorch has no
    binding for. Nothing where they are linked statically."""
    functions = []
    for path in _loaded_libraries():
        name = re.split(r"[/\\]", path)[-1].lower()
        found = re.match(r"(lib)?(cudart|amdhip64)", name)
        if found is None:
            continue
        function = "hipGetLastError" if found[2] == "amdhip64" else "cudaGetLastError"
        try:
            functions.append(getattr(ctypes.CDLL(path), function))
        except (OSError, AttributeError) as error:
            log.debug("%s of %s cannot be called: %s", function, path, str(error))
    return functions


def _loaded_libraries() -> set[str]:
    """Paths of the files that this process has mapped. Loading such a one again gives the same."""
    if sys.platform.startswith("linux"):
        lines = Path("/proc/self/maps").read_text().splitlines()
        return {line[line.index("/") :] for line in lines if "/" in line}
    if sys.platform == "win32":
        return {mapped.path for mapped in psutil.Process().memory_maps()}
    return set()


_COST = (
    "What is parked beyond it lies in pageable memory: that works, but its bytes pass through a "
    "small locked buffer, or unlocked where there is no room for that either: then copying takes "
    "several times as long and does not overlap with computing."
)


def _say_refused(nbytes: int, reason: str) -> None:
    memlock = memlock_limit()
    hint = (
        f" `ulimit -l` is {readable_bytes(memlock)}: raise it if your driver counts it."
        if memlock is not None
        else ""
    )
    say_once(
        logging.WARNING,
        f"refused: {reason}",
        f"The driver would not page-lock another {readable_bytes(nbytes)} of host memory "
        f"({reason}); "
        f"{readable_bytes(registered_bytes() - nbytes)} are locked. {_COST} Close other programs "
        "that lock memory, or set a limit that "
        f"holds: qmove.configure(pin_limit=bytes).{hint}",
    )


def say_once(level: int, reason: str, message: str) -> None:
    """Logs what is the case for one reason, the first time."""
    if reason not in _said:
        _said.add(reason)
        log.log(level, message)
