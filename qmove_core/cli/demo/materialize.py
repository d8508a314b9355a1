"""Second act of `qmove demo`: a model spread over GPUs, RAM and disk becomes one that moves."""

from __future__ import annotations

import gc
import tempfile
from typing import Any

import torch

from ... import devices
from ...errors import readable_bytes
from ...integrations.description import describe
from ...materialize.materialize import materialize_meta_tensors
from ...materialize.undo import materialized
from ...model.inventory import inventory
from ...parking.requests import move, park
from .setting import Setting


def materialize_dispatched(setting: Setting) -> bool:
    """Materializes, moves, parks and wakes a dispatched model. Returns whether all was right."""
    with tempfile.TemporaryDirectory(prefix="qmove-demo-") as offload_folder:
        checks = _checks(setting, offload_folder)
        for what, is_so in checks.items():
            setting.console.print(f"  {'[green]yes[/]' if is_so else '[red]NO [/]'}  {what}")
        gc.collect()
    return all(checks.values())


def _checks(setting: Setting, offload_folder: str) -> dict[str, bool]:
    device = setting.device
    first, second = str(device), devices.known()[-1]
    layers = (first, second, "cpu", "cpu", "disk", "disk")
    places = {f"encoder.layer.{index}": place for index, place in enumerate(layers)}
    places |= {"embeddings": first, "pooler": "disk"}
    model = setting.load(places, offload_folder=offload_folder)
    _say(setting, "\nall-MiniLM-L6-v2 as accelerate dispatches it", _places(model))
    expected = setting.embed(model, device)
    checks: dict[str, bool] = {}

    def embeds_the_same() -> bool:
        return torch.equal(setting.embed(model, device), expected)

    before = _identities(model)
    with materialized(model):
        inside = not inventory(model).meta
    checks["with qmove.materialized(model): whole inside, the very same dispatch after it"] = (
        inside and _identities(model) == before
    )
    checks["its outputs are the same"] = embeds_the_same()
    _say(setting, "model.to('cpu')", _refusal(model))

    peak = setting.peak(reset=True)
    seconds = setting.seconds(lambda: materialize_meta_tensors(model))
    checks["no byte more in VRAM on the way to RAM"] = setting.peak() == peak
    checks["no meta tensor left"] = not inventory(model).meta
    _say(setting, f"qmove.materialize_meta_tensors(model), {seconds:.2f} s", _places(model))

    move(model, device)
    checks[f"moved to {device}: the outputs are those of the dispatched model"] = embeds_the_same()
    park(model)
    checks["parked: 0 bytes of it in VRAM"] = inventory(model).by_device.keys() == {"cpu"}
    checks["woken: the same outputs"] = embeds_the_same()
    return checks


def _say(setting: Setting, what: str, follows: str) -> None:
    setting.console.print(f"{what}: {follows}", markup=False, highlight=False)


def _places(model: Any) -> str:
    """Bytes by place; what hooks keep in RAM counts there."""
    held = inventory(model)
    sizes = held.by_device | {"disk": describe(held).on_disk}
    return ", ".join(f"{readable_bytes(n)} on {place}" for place, n in sorted(sizes.items()))


def _refusal(model: Any) -> str:
    try:
        model.to("cpu")
    except (RuntimeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "did not raise"


def _identities(model: Any) -> list[int]:
    hooks = [id(module.__dict__.get("_hf_hook")) for module in model.modules()]
    return hooks + [id(parameter) for parameter in model.parameters()]
