"""A file that becomes shorter while a model is read from it: an error that names it, and no crash."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.simulated

ROOT = Path(__file__).parents[2]
SCRIPT = """
    import ctypes
    import os
    import sys
    import tests.builders.device
    import torch
    from pathlib import Path
    from safetensors.torch import save_file
    from qmove_core.errors import QMoveError
    from qmove_core.integrations import weights_map
    from qmove_core.materialize import reading
    from qmove_core.memory import pages

    class Plan:
        def __init__(self, source, device):
            self.source, self.opened, self.name = source, source.open(), "w"
            place, _, cast = device.partition(", ")
            dtype = torch.float16 if cast else torch.float32
            self.data = None
            if place != "mapped":
                self.data = torch.empty(source.shape, dtype=dtype, device=place)
            self.checksum = None

    kind, device, file = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    count = 2 << 20  # 8 MiB
    if kind == "safetensors":
        save_file({"w": torch.ones(count)}, file)
        entry = {"safetensors_file": str(file), "weight_name": "w"}
    else:
        file = file.with_name("w.dat")
        file.write_bytes(b"\\1" * 4 * count)
        entry = {"dtype": "float32", "shape": [count]}
    loader = type("Loader", (), dict(state_dict={}, index={"w": entry}, save_folder=str(file.parent)))
    plan = Plan(weights_map.Sources().find(loader, "w"), device)

    def cut(done, total):
        with file.open("r+b") as content:
            content.truncate(100)

    if sys.argv[4] != "meanwhile":
        cut(0, 0)
    if sys.argv[4] == "after the look at its size":
        reading._require_size = lambda item, end: None
        call, here = pages._process_vm_readv(), (ctypes.c_char * 8)()
        parts = (ctypes.c_size_t * 2)(ctypes.addressof(here), 8)
        if call is None or call(os.getpid(), parts, 1, parts, 1, 0) != 8:
            print("the kernel does not read for us here")
            sys.exit()
    try:
        reading.read([plan], cut, chunk=1 << 20, workers=1)
    except QMoveError as error:
        assert str(file) in str(error) and "shorter" in str(error), error
    else:
        raise AssertionError("nobody has seen it")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows cuts no file that is mapped")
@pytest.mark.parametrize("kind", ["safetensors", "dat"])
@pytest.mark.parametrize(
    ("device", "when"),
    # Host memory is read by other threads than the one that is told of the progress.
    [
        ("mapped", "before"),
        ("cpu", "before"),
        ("cuda", "before"),
        ("cuda", "meanwhile"),
        ("cpu", "after the look at its size"),
        ("cuda", "after the look at its size"),
        ("cuda, cast", "after the look at its size"),
    ],
)
def test_a_file_that_is_cut_is_an_error(tmp_path: Path, kind: str, device: str, when: str) -> None:
    ended = subprocess.run(
        [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT),
            kind,
            device,
            str(tmp_path / "m.safetensors"),
            when,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, (ended.returncode, ended.stderr[-2000:])
    if ended.stdout.strip():
        pytest.skip(ended.stdout)
