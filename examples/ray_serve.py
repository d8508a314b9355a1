"""Six models behind HTTP on two replicas, each with room in VRAM for one of them.

On a laptop, over the simulated GPU (a CPU build of PyTorch):

    pip install '.[ray]' && serve run examples.ray_serve:app

then, from another shell:

    curl -X POST http://127.0.0.1:8000/models/model-3 --json '{"values": [1, 2, 3]}'
    curl http://127.0.0.1:8000/models          # who is where, hits, loads
    curl -X POST http://127.0.0.1:8000/sleep   # all VRAM is free; /wake_up ends it

On a cluster the same file runs with QMOVE_REPLICAS=16: each replica takes a GPU of its own where
there are any, and Ray sends a request to a replica that has its model.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qmove_core.serving import ray_serve

ROOT = Path(__file__).resolve().parents[1]

MODELS = [f"model-{number}" for number in range(6)]
WIDTH, LAYERS = 256, 4
FOLDER = Path(os.environ.get("QMOVE_EXAMPLE_FOLDER") or Path(tempfile.gettempdir(), "qmove-ray"))
REPLICAS = int(os.environ.get("QMOVE_REPLICAS", "2"))


def replica_options() -> dict[str, Any]:
    """What each replica is given: a GPU, or a simulated one where PyTorch is a CPU build."""
    import torch

    import simcuda

    if torch.cuda.is_available() and not simcuda.is_active():
        return {"num_gpus": 1}
    variables = {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "TORCHDYNAMO_DISABLE": "1",  # bitsandbytes' kernels as they are
        "QMOVE_EXAMPLE_FOLDER": str(FOLDER),
    }
    simulated = f"{sys.executable} -m simcuda --memory 1GiB"
    return {"runtime_env": {"py_executable": simulated, "env_vars": variables}}


def checkpoint(name: str) -> Path:
    """A checkpoint of fp16 weights for each model; made when there is none."""
    import torch
    from safetensors.torch import save_file

    path = FOLDER / f"{name}.safetensors"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(sum(name.encode()))
        weights = {
            f"{layer}.weight": (torch.randn(WIDTH, WIDTH, generator=generator) / WIDTH**0.5).half()
            for layer in range(LAYERS)
        }
        part = path.with_suffix(f".{os.getpid()}")
        save_file(weights, part)
        part.replace(path)
    return path


def load(name: str) -> Any:
    """A model in int8: read from its checkpoint, and quantized by bitsandbytes on the GPU."""
    import bitsandbytes
    import torch
    from safetensors.torch import load_file

    weights = load_file(checkpoint(name))
    note_read(name)
    layers = []
    for layer in range(LAYERS):
        linear = bitsandbytes.nn.Linear8bitLt(WIDTH, WIDTH, bias=False, has_fp16_weights=False)
        linear.weight = bitsandbytes.nn.Int8Params(
            weights[f"{layer}.weight"], requires_grad=False, has_fp16_weights=False
        )
        layers.append(linear)
    return torch.nn.Sequential(*layers).to("cuda:0")


def note_read(name: str) -> None:
    """One line for each checkpoint that is read, for who counts them."""
    with open(FOLDER / "reads.txt", "a") as file:
        file.write(f"{os.getpid()} {name}\n")


def loaders() -> dict[str, Callable[[], Any]]:
    """Called in each replica."""

    def loader(name: str) -> Callable[[], Any]:
        return lambda: load(name)

    return {name: loader(name) for name in MODELS}


def answer(model: Any, request: Any) -> list[float]:
    """What a model gives for `{"values": [...]}`, as numbers."""
    import torch

    values = torch.zeros(1, WIDTH, dtype=torch.float16)
    given = torch.tensor(request["values"], dtype=torch.float16)
    values[0, : given.numel()] = given
    with torch.no_grad():
        return [float(value) for value in model(values.to("cuda:0"))[0, :8].cpu()]


SIZE = LAYERS * (WIDTH * WIDTH + WIDTH * 4)  # bytes of int8 weights and their scales


app = ray_serve.application(
    loaders,
    answer,
    vram=SIZE * 3 // 2,
    ram=SIZE * 16,
    models_in_vram=1,
    replicas=REPLICAS,
    ray_actor_options=replica_options(),
)
