"""The `qmove` command: what it prints, and how it fails."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from qmove_core import devices
from qmove_core.cli import app

ROOT = Path(__file__).parents[2]


def qmove(*arguments: str) -> Result:
    return CliRunner().invoke(app.app, list(arguments))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_file(
        {"a.weight": torch.zeros(8, dtype=torch.int8), "a.SCB": torch.zeros(2)},
        tmp_path / "model.safetensors",
    )
    return tmp_path


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "known", lambda: ["cpu"])


def test_help_names_the_commands() -> None:
    result = qmove("--help")
    assert result.exit_code == 0
    assert all(command in result.output for command in ("doctor", "inspect", "demo"))


def test_doctor_shows_devices_versions_and_what_they_mean() -> None:
    result = qmove("doctor")
    assert result.exit_code == 0
    for word in ("cuda:0", "torch", str(torch.__version__), "RAM", "memlock", "pageable"):
        assert word in result.output


def test_doctor_for_programs() -> None:
    result = qmove("doctor", "--json")
    assert result.exit_code == 0
    assert json.loads(result.output)["devices"][0]["name"] == "cuda:0"


def test_inspect_shows_sizes_and_the_quantization(saved: Path) -> None:
    result = qmove("inspect", str(saved))
    assert result.exit_code == 0
    assert "16 B in 2 tensors" in result.output
    assert "quantization: bitsandbytes int8" in result.output
    assert "it fits in the" in result.output


def test_inspect_for_programs(saved: Path) -> None:
    data = json.loads(qmove("inspect", str(saved), "--json").output)
    assert data["nbytes"] == 16
    assert {tensor["name"] for tensor in data["tensors"]} == {"a.weight", "a.SCB"}
    assert data["quantization"] == {"": "bitsandbytes int8"}


@pytest.mark.parametrize(
    "name",
    ["[bold]x[/]", "[/nothing]", "[link=https://a.example]x", "\x1b]0;title\x07", "\x1b[2J",
     "a\r\nb", "\x9b31m", "\u202eabc", "[red]" * 500],
    ids=["bold", "no such tag", "link", "title", "clear", "new line", "CSI", "right to left",
         "long"],
)  # fmt: skip
def test_markup_and_terminal_escapes_of_a_hostile_header_are_plain_text(
    tmp_path: Path, name: str
) -> None:
    """As a tensor's name, as a file's, in its quantization and in an error."""
    folder = tmp_path / name[:60].replace("/", "-")
    folder.mkdir()
    save_file({name: torch.zeros(8, dtype=torch.int8)}, folder / "model.safetensors")
    config = {"quantization_config": {"quant_method": name, "bits": name}}
    (folder / "config.json").write_text(json.dumps(config))
    for arguments in (["inspect", str(folder)], ["inspect", str(folder / name[:20])]):
        result = qmove(*arguments)
        shown = result.output + result.stderr
        assert ("Traceback" not in shown and result.exception is None) or result.exit_code == 1
        assert not (set("\x1b\x07\x9b\r\u202e") & set(shown))
        assert result.exit_code == (0 if arguments[-1] == str(folder) else 1)


def test_inspect_of_nothing_is_one_clear_line_and_a_failure() -> None:
    result = qmove("inspect", "no-such-model")
    assert result.exit_code == 1
    assert "'no-such-model' is no file or folder here" in result.stderr
    assert "Traceback" not in result.output


def test_demo_without_gpu_and_without_simulator_says_what_to_do(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "simcuda" else find_spec(name)
    )
    result = qmove("demo")
    assert result.exit_code == 1
    assert (
        "needs a GPU" in result.stderr
        and "qmove doctor" in result.stderr
        and "make demo" in result.stderr
    )


def test_demo_without_gpu_starts_over_on_the_simulated_one(
    without_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    started = []
    monkeypatch.setattr(subprocess, "call", lambda command, env: started.append(command) or 3)
    picture = tmp_path / "picture.png"
    result = qmove("demo", "--picture", str(picture))
    assert result.exit_code == 3  # that of the process it started
    assert started == [
        [
            sys.executable,
            "-m",
            "simcuda",
            "--devices",
            "2",
            "-m",
            "qmove_core.cli",
            "demo",
            "--picture",
            str(picture),
        ],
    ]


def test_demo_names_the_package_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "bitsandbytes" else find_spec(name),
    )
    result = qmove("demo")
    assert result.exit_code == 1
    assert "needs bitsandbytes: pip install 'qmove[demo]'" in result.stderr


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A Python that finds `folder` first, and then qmove."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("torch_package", "said"),
    [
        (
            "raise ModuleNotFoundError('No module named torch', name='torch')",
            "PyTorch is not installed.",
        ),
        (
            "class V(str):\n    def __lt__(self, other): return True\n__version__ = V('2.5.1')",
            "PyTorch 2.5.1 is installed.",
        ),
    ],
    ids=["missing", "too old"],
)
def test_without_a_fitting_pytorch_the_import_says_so(
    tmp_path: Path, torch_package: str, said: str
) -> None:
    (tmp_path / "torch.py").write_text(torch_package)
    done = run_python("import qmove_core.requirements", tmp_path)
    assert done.returncode == 1
    assert (
        f"MissingDependency: {said} qmove needs PyTorch 2.6 or newer"
        in done.stderr.splitlines()[-1]
    )


def test_help_loads_none_of_the_heavy_packages(tmp_path: Path) -> None:
    """`qmove --help` takes the time of `import torch` and no more."""
    code = (
        "import sys, torch\nbefore = set(sys.modules)\nimport qmove_core.cli\n"
        "heavy = {'transformers', 'bitsandbytes', 'accelerate', 'matplotlib', 'diffusers'}\n"
        "print(heavy & (set(sys.modules) - before))"
    )
    done = run_python(code, tmp_path)
    assert done.stdout.strip() == "set()", done.stderr
