"""What is shipped runs no code that it is given: nothing is unpickled or evaluated."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [
        *(ROOT / "qmove_core").rglob("*.py"),
        *(ROOT / "nodes").rglob("*.py"),
        ROOT / "__init__.py",
    ]
)
MODULES = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__"}


def _loads_foreign_code(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        for name in names:
            if name.partition(".")[0] in MODULES:
                yield f"line {node.lineno}: imports {name}"
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in CALLS:
            yield f"line {node.lineno}: calls {called}"
        options = {option.arg: ast.unparse(option.value) for option in node.keywords}
        loads = called.endswith(("torch.load", "Unpickler", "jit.load"))
        if loads and (called != "torch.load" or options.get("weights_only") != "True"):
            yield f"line {node.lineno}: {called} without weights_only=True"
        if (called.endswith("np.load") or called == "numpy.load") and "allow_pickle" in options:
            yield f"line {node.lineno}: {called} with allow_pickle"
        if options.get("shell") == "True" or called in ("os.system", "os.popen"):
            yield f"line {node.lineno}: a shell"
        if options.get("trust_remote_code", "False") != "False":
            yield f"line {node.lineno}: trust_remote_code"


@pytest.mark.parametrize("name", SHIPPED)
def test_nothing_shipped_runs_what_it_is_given(name: str) -> None:
    assert list(_loads_foreign_code((ROOT / name).read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "import cloudpickle.fast",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.jit.load(path)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(line, shell=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_check_sees_it(source: str) -> None:
    assert len(list(_loads_foreign_code(source))) == 1
