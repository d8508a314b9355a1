"""Second act of `qmove demo`: a model spread over GPUs, RAM and disk becomes one that moves."""

from __future__ import annotations

import gc
import tempfile
import time
from typing import Any

import torch
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from ... import devices
from ...errors import readable_bytes
from ...materialize.materialize import materialize_meta_tensors
from ...materialize.undo import materialized
from ...model.inventory import inventory
from ...parking.requests import move, park
from .setting import Setting


def materialize_dispatched(setting: Setting) -> bool:
    """Materializes, moves, parks and wakes a dispatched model. Returns whether all was right."""
    console, device = setting.console, setting.device
    with tempfile.TemporaryDirectory(prefix="qmove-demo-") as offload_folder:
        model = _dispatched(setting, offload_folder)
        console.print(
            "\n[bold]all-MiniLM-L6-v2 as accelerate dispatches it[/bold]", _places(model), sep="\n"
        )
        expected = setting.embed(model, device)
        checks: dict[str, bool] = {}

        def embeds_the_same(model: Any) -> bool:
            return torch.equal(setting.embed(model, device), expected)

        before = _identities(model)
        with materialized(model):
            inside = not inventory(model).meta
        checks["with qmove.materialized(model): whole inside, the very same dispatch after it"] = (
            inside and _identities(model) == before
        )
        checks["its outputs are the same"] = embeds_the_same(model)
        console.print(f"  model.to('cpu')   [red]{_refusal(model)}[/red]")

        peak = _reset_peak(device)
        seconds = _materialize(setting, model)
        checks["no byte more in VRAM on the way to RAM"] = _peak(device) == peak
        checks["no meta tensor left"] = not inventory(model).meta
        console.print(
            f"  after qmove.materialize_meta_tensors(model), {seconds:.2f} s",
            _places(model),
            sep="\n",
        )

        move(model, device)
        checks[f"moved to {device}: the outputs are those of the dispatched model"] = (
            embeds_the_same(model)
        )
        park(model)
        checks["parked: 0 bytes of it in VRAM"] = inventory(model).by_device.keys() == {"cpu"}
        checks["woken: the same outputs"] = embeds_the_same(model)
        for what, is_so in checks.items():
            console.print(f"  {'[green]yes[/]' if is_so else '[red]NO [/]'}  {what}")
        del model
        gc.collect()
    return all(checks.values())


def _dispatched(setting: Setting, offload_folder: str) -> Any:
    first, second = str(setting.device), devices.known()[-1]
    places = {"embeddings": first, "pooler": "disk"}
    layers = (first, second, "cpu", "cpu", "disk", "disk")
    places |= {f"encoder.layer.{index}": place for index, place in enumerate(layers)}
    return setting.load(places, offload_folder=offload_folder)


def _materialize(setting: Setting, model: Any) -> float:
    columns = (TextColumn("  materializing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=setting.console) as bar:
        task = bar.add_task("")
        started = time.perf_counter()
        materialize_meta_tensors(
            model, progress=lambda done, in_all: bar.update(task, completed=done, total=in_all)
        )
        return time.perf_counter() - started


def _places(model: Any) -> Table:
    """Bytes by place. Meta tensors count as RAM where hooks keep their data there, else as disk."""
    held = inventory(model)
    captured = [holding for holding in held.holdings if holding.kind == "captured"]
    in_ram = {name for holding in captured for name in holding.names}
    on_disk = [m for m in held.meta if not any(name.endswith(f".{m.name}") for name in in_ram)]
    sizes = dict(sorted(held.by_device.items())) | {"disk": sum(m.nbytes for m in on_disk)}
    table = Table()
    for place in sizes:
        table.add_column(place, justify="right")
    table.add_row(*map(readable_bytes, sizes.values()))
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
