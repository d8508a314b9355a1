"""Starting it: `python -m simcuda`, `simcuda.activate()`, and errors that say what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs this interpreter, with the repository importable."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=env, timeout=300
    )


def test_a_script_runs_with_its_own_arguments(tmp_path):
    script = tmp_path / "show.py"
    script.write_text(
        "import sys, torch\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv[1:], torch.cuda.device_count(), torch.cuda.mem_get_info(1)[1], sys.path[0])\n"
    )
    done = python(
        "-m", "simcuda", "--devices", "2", "--memory", "1GiB", str(script), "--memory", "x", "-m"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"['--memory', 'x', '-m'] 2 {1 << 30} {tmp_path}"


@pytest.mark.parametrize("allocator", ["native", "expandable", "async"])
def test_hostile_is_everything_at_once_to_the_end_of_the_program(tmp_path, allocator):
    script = tmp_path / "show.py"
    script.write_text(
        "import torch\n"
        "held = torch.ones((3 << 20) + 1, dtype=torch.uint8, device='cuda')\n"
        "print(torch.cuda.memory_reserved() > held.nbytes)\n"
        "print(torch.cuda.get_allocator_backend())\n"
        "torch.ones(8, 8, device='cuda') @ torch.ones(8, 8, device='cuda')\n"
        "print(torch.cuda.memory_allocated() >= 11 << 20)\n"
        "x = torch.ones(8192, 8, dtype=torch.int8, device='cuda')\n"
        "try:\n    torch._int_mm(x, x[:8])\n"
        "except RuntimeError as error:\n    print('CUBLAS_STATUS_NOT_SUPPORTED' in str(error))\n"
        "host = torch.ones(65 << 20, dtype=torch.uint8)\n"
        "print(int(torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)))\n"
        "import simcuda\nsimcuda.library.sim().sim_set_last_error(0)\n"
    )
    done = python("-m", "simcuda", "--hostile", allocator, str(script))
    assert done.returncode == 0, done.stderr
    backend = "cudaMallocAsync" if allocator == "async" else "native"
    assert done.stdout.split() == ["True", backend, "True", "True", "2"]


def test_a_module_runs_and_its_exit_status_is_passed_on(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys, torch\nsys.exit(torch.cuda.device_count() + len(sys.argv))\n"
    )
    done = python(
        "-m", "simcuda", "-m", "program", "a", "b", PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}"
    )
    assert done.returncode == 1 + 3, done.stderr


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "nothing to run"),
        (["--memory", "much", "x.py"], "not a size: 'much'"),
        (["--devices", "99", __file__], "devices must be 1 to 16"),
        (["missing.py"], "no such script: missing.py"),
    ],
)
def test_bad_options_are_told_in_one_line(arguments, message):
    done = python("-m", "simcuda", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_torch_imported_before_is_an_error():
    done = python("-c", "import torch, simcuda; simcuda.activate()")
    assert done.returncode == 1
    assert (
        "SimulationError: torch is imported already" in done.stderr
        and "python -m simcuda" in done.stderr
    )


def test_no_compiler_names_the_package_to_install(tmp_path):
    done = python(
        "-c",
        "import simcuda; simcuda.activate()",
        PATH=str(tmp_path),
        SIMCUDA_CACHE=str(tmp_path),
        CXX="",
    )
    assert (
        done.returncode == 1
        and "found no C++ compiler" in done.stderr
        and "apt install g++" in done.stderr
    )


def test_a_failing_compiler_shows_its_own_words(tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text(
        "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'cannot do this' >&2\nexit 3\n"
    )
    compiler.chmod(0o755)
    done = python(
        "-c",
        "import simcuda; simcuda.activate()",
        CXX=str(compiler),
        SIMCUDA_CACHE=str(tmp_path / "cache"),
    )
    assert "exit status 3" in done.stderr and "cannot do this" in done.stderr
    assert list((tmp_path / "cache").iterdir()) == [], "a failed build leaves nothing behind"


@pytest.mark.parametrize(
    "library, platform, message",
    [
        ("libtorch_cuda.so", "linux", "needs a CPU build"),
        ("libtorch_cpu.so", "darwin", "runs on Linux only"),
    ],
)
def test_the_wrong_torch_or_platform_is_refused(tmp_path, monkeypatch, library, platform, message):
    from simcuda import build

    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / library).touch()
    monkeypatch.setattr(sys, "platform", platform)
    with pytest.raises(build.SimulationError, match=message):
        build.check_platform(tmp_path)


def test_activating_twice_is_an_error():
    import simcuda

    assert simcuda.is_active()
    with pytest.raises(simcuda.SimulationError, match="active already"):
        simcuda.activate()
