"""VRAM over time in the last run, with its stages, for the chart in the browser.

Memory is measured where a stage begins and ends, as far as that takes only a small share of the
time: many quick nodes cost next to nothing. In between a thread reads PyTorch's own counters, which
needs no call of the driver, so that a long stage shows what it takes. What the run has gained is
said at its end (`summary.py`).
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from qmove_core import for_hosts

from .. import browser, comfy, meter, node_names, progress
from ..guard import never_fails
from .summary import Gains

SECONDS_BETWEEN_SAMPLES = 0.2
SECONDS_BETWEEN_EVENTS = 0.5
STILL_TRUE = 0.002  # seconds: a stage begins with what the one before it has left
SHARE_OF_TIME = 0.05  # that measuring may take
MOST_POINTS = 2000  # then every other one is dropped, and from there on half as many are taken

_numbers = itertools.count(1)
_lock = threading.RLock()
_last: _Run | None = None


@dataclass
class _Run:
    """One prompt: points in time (seconds since its start) and what was in use then (bytes).

    Attributes:
        revision: changes when points that were sent already have changed.
        stages: as the browser gets them, with times in seconds since the start of the run.
        open: those that have not ended, by node.
        others: bytes in use on each device without PyTorch's tensors, at the last measurement.
        sent: how many points the browsers have.
        ended: set when the run has ended, for the thread that samples.
        next_measurement_at: on the clock of `time.perf_counter`.
        latest: the newest reading by device, also where it is no point of its own.
        counts_peak: whether the allocator's peak counters are those of the stage that runs.
        gains: what parking has gained so far.
        summary: the same in figures when the run has ended well; None where it gained nothing.
    """

    nodes: weakref.ReferenceType[Any]
    number: int = field(default_factory=lambda: next(_numbers))
    started: float = field(default_factory=time.time)
    began: float = field(default_factory=time.monotonic)
    running: bool = True
    revision: int = 0
    devices: list[torch.device] = field(default_factory=list)
    totals: dict[str, int] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)
    used: dict[str, list[int]] = field(default_factory=dict)
    parked: list[int] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    open: dict[str, dict[str, Any]] = field(default_factory=dict)
    others: dict[torch.device, int] = field(default_factory=dict)
    interval: float = field(default_factory=lambda: SECONDS_BETWEEN_SAMPLES)
    sent: int = 0
    sent_at: float = 0.0
    ended: threading.Event = field(default_factory=threading.Event)
    next_measurement_at: float = 0.0
    latest: dict[torch.device, int] = field(default_factory=dict)
    counts_peak: bool = False
    gains: Gains = field(default_factory=Gains)
    summary: dict[str, Any] | None = None


def last_run() -> dict[str, Any] | None:
    """The run that runs now, or the last one; None before the first."""
    with _lock:
        return None if _last is None else _to_dict(_last, 0)


def run_number() -> int:
    """The id of the run that runs now, or of the last one; 0 before the first."""
    return 0 if _last is None else _last.number


def is_running() -> bool:
    """Whether a prompt runs."""
    return _last is not None and _last.running


@never_fails("record a stage", None)
def stage_begins(nodes: Any, node_id: str, class_name: str) -> None:
    """A node is about to run; the first one of a prompt starts a new run."""
    global _last
    with _lock:
        run = _last
        if run is None or run.nodes() is not nodes:
            _end(run)
            run = _last = _begin(nodes)
        elif not run.running:  # all nodes had run, and one of them has made more
            run.running, run.ended = True, threading.Event()
            _watch(run)
        if node_id not in run.open:
            name = node_names.of(node_id)
            if name is None or name.class_name != class_name:
                title = comfy.title_of_node_class(class_name)
                name = node_names.NodeName(node_id, class_name, title)
            stage = name.to_dict() | {"name": name.title, "peak": {}}
            run.open[node_id] = stage | {"begin": _now(run), "end": None}
            run.stages.append(run.open[node_id])
        run.counts_peak = False
        if not run.times or _now(run) > run.times[-1] + STILL_TRUE:
            _measure(run)
        _send(run)


@never_fails("record a stage", None)
def stage_goes_on(nodes: Any, *, counts_peak: bool = False) -> None:
    """What the stage needed is parked or home, and its node runs now.

    With `counts_peak` the allocator's peak counters have begun anew for it.
    """
    with _lock:
        if _last is not None and _last.nodes() is nodes and _last.running:
            _measure(_last)
            _last.counts_peak = counts_peak


@never_fails("record a stage", False)
def stage_ends(nodes: Any, node_id: str) -> bool:
    """A node has run. Returns whether it did: one whose outputs were cached never began."""
    with _lock:
        run = _last
        if run is None or run.nodes() is not nodes:
            return False
        stage = run.open.pop(node_id, None)
        if stage is None:
            return False
        _measure(run)
        _count_peak(run, stage)
        stage["end"] = _now(run)
        _send(run)
        return True


@never_fails("record a move", None)
def note_move(move: progress.Move) -> None:
    """A move begins or has ended: it is counted where it was for the run that goes on."""
    with _lock:
        run = _last
        if run is not None and run.running and move.node_id is not None:
            _count_peak(run, *run.open.values())  # later on it may be that of bytes under way
            if move.state == "done" and move.verb in ("park", "restore"):
                run.gains.note_move(move.verb, move.model, move.name, move.began, move.seconds)


@never_fails("record that a run has failed", None)
def run_fails(nodes: Any) -> None:
    """Nothing is said of what the run has gained."""
    with _lock:
        if _last is not None and nodes is not None and _last.nodes() is nodes:
            _last.gains.fail()


@never_fails("record the end of a run", None)
def run_ends(nodes: Any) -> None:
    with _lock:
        if _last is not None and _last.nodes() is nodes:
            if _last.open:  # else the end of the last stage was measured
                _measure(_last)
            _end(_last)


def _begin(nodes: Any) -> _Run:
    run = _Run(weakref.ref(nodes))
    for device in meter.devices():
        total = for_hosts.total_memory(device)
        if total is not None and meter.has_counters(device):
            run.devices.append(device)
            run.totals[str(device)] = total
            run.used[str(device)] = []
    _watch(run)
    return run


def _watch(run: _Run) -> None:
    arguments = (run, run.ended)
    threading.Thread(target=_sample, args=arguments, name="qmove history", daemon=True).start()


def _end(run: _Run | None) -> None:
    if run is None or not run.running:
        return
    run.running = False
    run.ended.set()
    for stage in run.open.values():
        stage["end"] = _now(run)
    run.open.clear()
    run.summary = run.gains.summary()
    _send(run, at_once=True)


def _sample(run: _Run, ended: threading.Event) -> None:
    while not ended.wait(min(run.interval, SECONDS_BETWEEN_EVENTS)):
        with _lock:
            if ended.is_set():
                return
            if run.nodes() is None:  # ComfyUI has dropped the prompt without completing it
                _end(run)
                return
            used, before = {}, _parked_at_rest()
            for device in run.devices:
                allocated = meter.bytes_of(meter.stats_of(device), "allocated", "current")
                used[device] = run.others.get(device, 0) + allocated
            _note(run, used, before)
            if not run.times or _now(run) >= run.times[-1] + run.interval * 0.99:
                _add(run, used)
            _send(run)


def _measure(run: _Run) -> None:
    started = time.perf_counter()
    if started < run.next_measurement_at:
        return
    used, before = {}, _parked_at_rest()
    for device in run.devices:
        reading = meter.read(device)
        if reading is not None:
            run.others[device] = reading.used - reading.allocated
        # Without a reading the card is not in use here: asking for one would take some of it.
        used[device] = 0 if reading is None else reading.used
    _note(run, used, before)
    _add(run, used)
    done = time.perf_counter()
    run.next_measurement_at = done + (done - started) / SHARE_OF_TIME


def _parked_at_rest() -> dict[str, int] | None:
    """What is parked, by device; None while something moves, and is counted in two places."""
    return None if progress.running() else for_hosts.parked_bytes()


def _note(run: _Run, used: dict[torch.device, int], before: dict[str, int] | None) -> None:
    """Takes a reading: it is the newest one, and may be the highest of the stages that run.

    Args:
        before: what `_parked_at_rest` was before the reading.
    """
    run.latest = used
    is_quiet = before is not None and before == _parked_at_rest()
    for device, nbytes in used.items():
        for stage in run.open.values():
            peak = stage["peak"]
            peak[str(device)] = max(peak.get(str(device), 0), nbytes)
        run.gains.note_use(device, nbytes, run.totals[str(device)], is_quiet=is_quiet)


def _count_peak(run: _Run, *stages: dict[str, Any]) -> None:
    """Takes what the allocator has counted: a node's highest moment is often a short one."""
    if not run.counts_peak:
        return
    run.counts_peak = False
    for device in run.devices:
        highest = meter.bytes_of(meter.stats_of(device), "allocated", "peak")
        nbytes = run.others.get(device, 0) + highest
        name, total = str(device), run.totals[str(device)]
        for stage in stages:
            stage["peak"][name] = min(total, max(stage["peak"].get(name, 0), nbytes))
        run.gains.note_use(device, nbytes, total, is_quiet=not progress.running())


def _add(run: _Run, used: dict[torch.device, int]) -> None:
    run.times.append(_now(run))
    for device, nbytes in used.items():
        run.used[str(device)].append(nbytes)
    run.parked.append(sum(for_hosts.parked_bytes().values()))
    if len(run.times) > MOST_POINTS:
        for points in (run.times, run.parked, *run.used.values()):
            del points[1:-1:2]  # type: ignore[attr-defined]
        run.interval *= 2
        run.revision += 1
        run.sent = 0


def _send(run: _Run, *, at_once: bool = False) -> None:
    now = time.monotonic()
    if at_once or now >= run.sent_at + SECONDS_BETWEEN_EVENTS:
        browser.send(browser.HISTORY, _to_dict(run, run.sent))
        run.sent, run.sent_at = len(run.times), now


def _to_dict(run: _Run, first: int) -> dict[str, Any]:
    """The run as plain data, with the points from `first` on."""
    return {
        "id": run.number,
        "revision": run.revision,
        "started": run.started,
        "running": run.running,
        "devices": list(run.totals),
        "totals": dict(run.totals),
        "stages": [stage | {"peak": dict(stage["peak"])} for stage in run.stages],
        "from": first,
        "times": run.times[first:],
        "used": {name: points[first:] for name, points in run.used.items()},
        "parked": run.parked[first:],
        "now": {
            "time": _now(run),
            "used": {str(device): nbytes for device, nbytes in run.latest.items()},
            "parked": sum(for_hosts.parked_bytes().values()),
        }
        if run.running
        else None,
        "summary": run.summary,
    }


def _now(run: _Run) -> float:
    return round(time.monotonic() - run.began, 4)
