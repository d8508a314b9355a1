"""Compiles the C++ half (csrc/) against the installed PyTorch, once, into a cache folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-O1", "-std=c++20", "-shared", "-fPIC", "-fno-plt", "-w")


class SimulationError(RuntimeError):
    """The simulated devices cannot be brought up here; the message says why, and what to do."""


def torch_folder() -> Path:
    """The installed torch's folder, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        raise SimulationError(
            "simcuda needs PyTorch, and none is installed: install a CPU build of torch"
        )
    return Path(spec.origin).parent


def check_platform(torch: Path) -> None:
    """Raises SimulationError unless this is Linux with a CPU build of PyTorch."""
    if not sys.platform.startswith("linux"):
        raise SimulationError(
            f"simcuda runs on Linux only (this is {sys.platform}): use WSL or a container"
        )
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise SimulationError(
            "simcuda needs a CPU build of PyTorch, and this one is built for CUDA: its own kernels own the `cuda` "
            "device. Use an environment with the CPU build, or run without simcuda on the real device"
        )
    if not (torch / "lib" / "libtorch_cpu.so").exists():
        raise SimulationError(
            f"no libtorch_cpu.so beside the torch package in {torch}: is the installation whole?"
        )


def find_compiler() -> str:
    """The C++ compiler: $CXX if it is set, else g++, c++ or clang++."""
    wanted = os.environ.get("CXX")
    for name in [wanted] if wanted else ["g++", "c++", "clang++"]:
        if found := shutil.which(name):
            return found
    looked = f"$CXX = {wanted}" if wanted else "g++, c++, clang++"
    raise SimulationError(
        f"simcuda compiles its device library once and found no C++ compiler ({looked}): "
        "install one, e.g. `apt install g++` (Debian, Ubuntu) or `dnf install gcc-c++` (Fedora)"
    )


def cache_folder() -> Path:
    """$SIMCUDA_CACHE, else simcuda/ under $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("SIMCUDA_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simcuda"


def _key(compiler: str) -> str:
    """Changes whenever the library would: its sources, its flags, torch and the compiler."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    version = subprocess.run(
        [compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    for part in (version, *FLAGS, importlib.metadata.version("torch"), str(torch_folder())):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


def build() -> Path:
    """The compiled library, from the cache or freshly built (10 to 30 seconds).

    Several processes may build at once: each writes a file of its own and renames it into place.
    Where a library is already there no compiler is needed beyond its ``--version``, which is part
    of the key.

    Raises:
        SimulationError: no compiler, or it failed; its last lines are in the message.
    """
    torch, compiler = torch_folder(), find_compiler()
    library = cache_folder() / f"libsimcuda-{_key(compiler)}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    print(
        "simcuda: compiling the simulated device (once, 10 to 30 seconds) ...",
        file=sys.stderr,
        flush=True,
    )
    handle, fresh = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    lib = torch / "lib"
    command = [compiler, *FLAGS, str(SOURCES / "unity.cpp"), "-o", fresh]
    command += [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
    command += [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            tail = "\n".join(done.stderr.splitlines()[-20:])
            raise SimulationError(
                f"the C++ compiler failed ({compiler}, exit status {done.returncode}):\n{tail}"
            )
        os.replace(fresh, library)
    finally:
        Path(fresh).unlink(missing_ok=True)
    return library
