"""First act of `qmove demo`: models leave VRAM and come back, by plain `.to()` and by qmove."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from ...errors import MissingDependency, readable_bytes
from ...memory import arena
from ...model.inventory import inventory
from ...parking.requests import park, restore
from ...storages import as_bytes
from . import picture
from .picture import Timeline
from .setting import Setting

PRECISIONS = ("fp16", "int8", "nf4")


@dataclass
class Round:
    """One model out of VRAM and back. Bytes and seconds; None for what was not measured.

    Attributes:
        way: ".to()" or "qmove".
        away: bytes the model still has in VRAM while it is away.
        copied: bytes over the link, out and back; a real GPU does not count those of `.to()`.
        used: what came of using the model while it was away: "runs" (on the CPU), "wakes", "fails".
        same_after_use: whether the embeddings were equal once it was back after that.
        error: what was raised, empty if nothing.
    """

    precision: str
    way: str
    before: int
    away: int | None = None
    after: int | None = None
    ram: int | None = None
    copied: int | None = None
    seconds_out: float | None = None
    seconds_back: float | None = None
    same_bytes: bool | None = None
    same_embeddings: bool | None = None
    used: str | None = None
    same_after_use: bool | None = None
    error: str = ""

    @property
    def is_perfect(self) -> bool:
        """Nothing left in VRAM, everything equal after, as much VRAM as before."""
        equal = self.same_bytes and self.same_embeddings and self.same_after_use
        return bool(equal) and self.away == 0 and self.after == self.before


_ROWS = {
    "MiB VRAM before": "before",
    "         while away": "away",
    "         after": "after",
    "MiB RAM  while away": "ram",
    "MiB copied": "copied",
    "seconds  out": "seconds_out",
    "         back": "seconds_back",
    "equal    every byte": "same_bytes",
    "         embeddings": "same_embeddings",
    "used while away": "used",
    "         then equal": "same_after_use",
}


def park_and_restore(setting: Setting, picture_file: Path) -> bool:
    """Plays both ways in three precisions. Returns whether every round of qmove was perfect."""
    console, timelines, rounds = setting.console, dict[str, Timeline](), list[Round]()
    for precision in PRECISIONS:
        with console.status(f"{precision}: plain .to(), then qmove"):
            setting.embed(_load(setting, precision))
            setting.note_baseline()
            rounds.append(_by_to(setting, precision))
            timelines[precision] = Timeline(setting.vram, arena.bytes_in_use)
            rounds.append(_by_qmove(setting, precision, timelines[precision]))
    kind = "a simulated GPU" if setting.simulated else setting.device_name
    table = Table("", title=f"all-MiniLM-L6-v2 out of VRAM and back, on {kind}")
    for played in rounds:
        table.add_column(f"{played.precision}\n{played.way}", justify="right", no_wrap=True)
    for label, figure in _ROWS.items():
        table.add_row(label, *(_shown(getattr(played, figure)) for played in rounds))
    console.print(table)
    for line in _remarks(setting, rounds):
        console.print(line, highlight=False, markup=False)
    left_by_to = {played.precision: played.away for played in rounds if played.way == ".to()"}
    where = "simulated GPU" if setting.simulated else str(setting.device)
    try:
        picture.draw(picture_file, timelines, left_by_to, where)
        console.print(f"VRAM and RAM over time: {picture_file}", markup=False, highlight=False)
    except MissingDependency as error:
        console.print(f"No picture: {error}", markup=False)
    return all(played.is_perfect for played in rounds if played.way == "qmove")


def _by_to(setting: Setting, precision: str) -> Round:
    device, model = setting.device, _load(setting, precision)
    expected, content = setting.embed(model), _digests(model)
    played = Round(precision, ".to()", before=setting.vram())
    crossed = setting.link_bytes()
    try:
        played.seconds_out = setting.seconds(lambda: model.to("cpu"))
        played.away = setting.vram()
        played.ram = inventory(model).by_device.get("cpu", 0)
        played.seconds_back = setting.seconds(lambda: model.to(device))
        played.after = setting.vram()
        if crossed is not None:
            played.copied = (setting.link_bytes() or 0) - crossed
        played.same_bytes = _digests(model) == content
        played.same_embeddings = torch.equal(setting.embed(model), expected)
        model.to("cpu")
        try:
            setting.embed(model)
            played.used = "runs"
        except RuntimeError as error:
            played.used, played.error = "fails", f"used on the CPU: {_first_line(error)}"
        model.to(device)
        played.same_after_use = torch.equal(setting.embed(model), expected)
    except (RuntimeError, ValueError) as error:  # older releases refuse .to() of quantized models
        played.error = _first_line(error)
    return played


def _by_qmove(setting: Setting, precision: str, line: Timeline) -> Round:
    model = _load(setting, precision)
    expected, content = setting.embed(model), _digests(model)
    played = Round(precision, "qmove", before=setting.vram(), used="wakes")
    with line.stage("embed"):
        setting.embed(model)
    with line.stage("park"):
        out = park(model, progress=line.note)
    line.state("parked")
    played.away, played.ram = setting.vram(), arena.bytes_in_use()
    with line.stage("restore"):
        back = restore(model, progress=line.note)
    played.after = setting.vram()
    played.seconds_out, played.seconds_back = out.seconds, back.seconds
    played.copied = out.copied_bytes + back.copied_bytes
    played.same_bytes = _digests(model) == content
    with line.stage("embed"):
        played.same_embeddings = torch.equal(setting.embed(model), expected)
    with line.stage("park"):
        park(model, progress=line.note)
    line.state("parked")
    # A sample when the forward reaches the first part: a parked model has woken by then.
    hook = next(model.children()).register_forward_pre_hook(line.note)
    with line.stage("embed, wakes"):
        embeddings = setting.embed(model)
    hook.remove()
    played.same_after_use = torch.equal(embeddings, expected) and _digests(model) == content
    return played


def _load(setting: Setting, precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    quantization = {
        "fp16": None,
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16,
        ),
    }
    return setting.load(quantization_config=quantization[precision])


def _digests(model: Any) -> dict[str, tuple[str, str]]:
    """For each name of a tensor: its dtype, and a hash of the whole storage."""
    result: dict[str, tuple[str, str]] = {}
    for holding in inventory(model).holdings:
        digest = hashlib.sha256(as_bytes(holding.storage).cpu().numpy().data).hexdigest()
        # Not whether a tensor is a view of another one: `.to()` makes absmax a tensor of its own.
        names = [name for name in holding.names if not name.endswith("._base")]
        result |= dict.fromkeys(names, (str(holding.dtype), digest))
    return result


def _remarks(setting: Setting, rounds: list[Round]) -> Iterator[str]:
    """What the table means, from its own figures."""
    if setting.simulated:
        yield (
            "Simulated GPU: bytes and equality are measured, computed by the CPU's kernels; "
            "seconds are those of copies within host memory and say nothing about a real link."
        )
    for played in rounds:
        name = f"{played.precision} {played.way}"
        if played.away:
            left, whole = readable_bytes(played.away), readable_bytes(played.before)
            yield f"{name} left {left} of {whole} in VRAM ({played.away / played.before:.0%})."
        if played.error:
            yield f"{name}: {played.error}"
    if setting.baseline:
        yield (
            f"Not counted: {readable_bytes(setting.baseline)} that libraries keep in VRAM for all "
            "models, and that stay when the model is gone."
        )


def _shown(figure: str | bool | int | float | None) -> str:
    """A cell of the table: bytes in MiB, seconds, a verdict, a word."""
    if isinstance(figure, bool):
        return "[green]yes[/]" if figure else "[bold red]NO[/]"
    if isinstance(figure, int):
        return f"{figure / 2**20:.2f}" if figure > 5000 else f"{figure} B" if figure else "0"
    if isinstance(figure, float):
        return f"{figure:.3f}"
    return "-" if figure is None else "[bold red]fails[/]" if figure == "fails" else figure


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"
