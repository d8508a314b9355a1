"""Second act of `qmove demo`: a model that accelerate spread over GPUs, RAM and disk becomes one that moves."""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ... import devices
from ...errors import readable_bytes
from ...materialize.materialize import materialize_meta_tensors
from ...materialize.undo import materialized
from ...model.inventory import inventory
from ...parking.requests import move, park

if TYPE_CHECKING:
    from .park_and_restore import Setting

LAYERS = 6  # of all-MiniLM-L6-v2
SENTENCES = ("Spread over two GPUs, RAM and disk.", "Whole again, it moves as any model does.")


def materialize_dispatched(setting: Setting) -> bool:
    """Second act: MiniLM, dispatched, is materialized, moved, parked and woken. Returns whether qmove kept its promises."""
    console = setting.console
    with tempfile.TemporaryDirectory(prefix="qmove-demo-") as offload_folder:
        model, batch = _dispatched(setting, Path(offload_folder))
        console.print(
            "\n[bold]all-MiniLM-L6-v2 as accelerate dispatches it[/bold]", _places(model), sep="\n"
        )
        expected = _embed(model, batch, setting.device)
        checks: dict[str, bool] = {}

        before = _identities(model)
        with materialized(model):
            inside = not inventory(model).meta
        checks["with qmove.materialized(model): whole inside, the very same dispatch after it"] = (
            inside and _identities(model) == before
        )
        checks["its outputs are the same"] = torch.equal(
            _embed(model, batch, setting.device), expected
        )
        console.print(f"  model.to('cpu')   [red]{_refusal(model)}[/red]")

        peak = _reset_peak(setting.device)
        seconds = _materialize(setting, model)
        checks["no byte more in VRAM on the way to RAM"] = _peak(setting.device) == peak
        checks["no meta tensor left"] = not inventory(model).meta
        console.print(
            f"  after qmove.materialize_meta_tensors(model), {seconds:.2f} s",
            _places(model),
            sep="\n",
        )

        move(model, setting.device)
        checks[f"moved to {setting.device}: the outputs are those of the dispatched model"] = (
            torch.equal(_embed(model, batch, setting.device), expected)
        )
        park(model)
        checks["parked: 0 bytes of it in VRAM"] = inventory(model).by_device.keys() == {"cpu"}
        checks["woken: the same outputs"] = torch.equal(
            _embed(model, batch, setting.device), expected
        )
        for what, is_so in checks.items():
            console.print(
                f"  [{'green' if is_so else 'red'}]{'yes' if is_so else 'NO '}[/]  {what}"
            )
        del model
        gc.collect()
    return all(checks.values())


def _dispatched(setting: Setting, offload_folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    accelerators = [name for name in devices.known() if name != "cpu"]
    first, second = str(setting.device), accelerators[-1]
    places = {"embeddings": first, "pooler": "disk"}
    places |= {
        f"encoder.layer.{i}": (first, second, "cpu", "cpu", "disk", "disk")[i]
        for i in range(LAYERS)
    }
    model = AutoModel.from_pretrained(
        setting.weights, dtype=torch.float16, device_map=places, offload_folder=str(offload_folder)
    )
    tokenizer = AutoTokenizer.from_pretrained(setting.weights)
    return model.eval().requires_grad_(False), tokenizer(
        list(SENTENCES), padding=True, return_tensors="pt"
    )


def _embed(model: Any, batch: Any, device: torch.device) -> torch.Tensor:
    with torch.inference_mode():
        states: torch.Tensor = model(**batch.to(device)).last_hidden_state
    return states.float().mean(1).cpu()


def _materialize(setting: Setting, model: Any) -> float:
    columns = (TextColumn("  materializing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    started = time.perf_counter()
    with Progress(*columns, console=setting.console) as bar:
        task = bar.add_task("")
        materialize_meta_tensors(
            model, progress=lambda done, in_all: bar.update(task, completed=done, total=in_all)
        )
    return time.perf_counter() - started


def _places(model: Any) -> Table:
    """Bytes by place. What hooks keep in RAM is counted with the RAM, the rest of the meta tensors with the disk."""
    held = inventory(model)
    table = Table()
    for place in sorted(held.by_device):
        table.add_column(place, justify="right")
    in_ram = {
        name for holding in held.holdings if holding.kind == "captured" for name in holding.names
    }
    on_disk = [m for m in held.meta if not any(name.endswith(f".{m.name}") for name in in_ram)]
    table.add_column("disk", justify="right")
    sizes = [readable_bytes(nbytes) for _place, nbytes in sorted(held.by_device.items())]
    table.add_row(*sizes, readable_bytes(sum(m.nbytes for m in on_disk)))
    return table


def _refusal(model: Any) -> str:
    try:
        model.to("cpu")
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "did not raise"


def _identities(model: Any) -> list[int]:
    hooks = [id(module.__dict__.get("_hf_hook")) for module in model.modules()]
    return hooks + [id(parameter) for parameter in model.parameters()]


def _reset_peak(device: torch.device) -> int:
    gc.collect()
    backend = torch.get_device_module(device)
    backend.reset_peak_memory_stats(device)
    return int(backend.memory_allocated(device))


def _peak(device: torch.device) -> int:
    return int(torch.get_device_module(device).max_memory_allocated(device))
