"""VRAM over time in the last run, with its stages, for the chart in the browser.

Memory is measured where a stage begins and ends, as far as that takes only a small share of the
time: many quick nodes cost next to nothing. In between a thread reads PyTorch's own counters, which
needs no call of the driver, so that a long stage shows what it takes.
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

from .. import browser, comfy, meter
from ..guard import never_fails

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


def last_run() -> dict[str, Any] | None:
    """The run that runs now, or the last one; None before the first."""
    with _lock:
        return None if _last is None else _to_dict(_last, 0)


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
            names = getattr(comfy.module("nodes"), "NODE_DISPLAY_NAME_MAPPINGS", {})
            name = names.get(class_name) or class_name
            stage = {"node": node_id, "class": class_name, "name": name}
            run.open[node_id] = stage | {"begin": _now(run), "end": None}
            run.stages.append(run.open[node_id])
        if not run.times or _now(run) > run.times[-1] + STILL_TRUE:
            _measure(run)
        _send(run)


@never_fails("record a stage", None)
def stage_goes_on(nodes: Any) -> None:
    """What the stage needed is parked or home, and its node runs now."""
    with _lock:
        if _last is not None and _last.nodes() is nodes and _last.running:
            _measure(_last)


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
        stage["end"] = _now(run)
        _send(run)
        return True


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
    _send(run, at_once=True)


def _sample(run: _Run, ended: threading.Event) -> None:
    while not ended.wait(run.interval):
        with _lock:
            if ended.is_set():
                return
            if run.nodes() is None:  # ComfyUI has dropped the prompt without completing it
                _end(run)
                return
            used = {}
            for device in run.devices:
                allocated = meter.bytes_of(meter.stats_of(device), "allocated", "current")
                used[device] = run.others.get(device, 0) + allocated
            _add(run, used)
            _send(run)


def _measure(run: _Run) -> None:
    started = time.perf_counter()
    if started < run.next_measurement_at:
        return
    used = {}
    for device in run.devices:
        reading = meter.read(device)
        if reading is not None:
            run.others[device] = reading.used - reading.allocated
        # Without a reading the card is not in use here: asking for one would take some of it.
        used[device] = 0 if reading is None else reading.used
    _add(run, used)
    done = time.perf_counter()
    run.next_measurement_at = done + (done - started) / SHARE_OF_TIME


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
        "stages": [dict(stage) for stage in run.stages],
        "from": first,
        "times": run.times[first:],
        "used": {name: points[first:] for name, points in run.used.items()},
        "parked": run.parked[first:],
    }


def _now(run: _Run) -> float:
    return round(time.monotonic() - run.began, 4)
