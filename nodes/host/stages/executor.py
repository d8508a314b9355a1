"""Follows ComfyUI's executor: as it stages a node, the node's inputs are known before it runs.

ComfyUI has no hook for this, so two methods of `ExecutionList` are wrapped, which have had the same
signature since 0.3.64, and the one that the executor calls with a node's error. Where one is not as
expected, the log says so and that feature is off.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .. import comfy, graph, hooks, node_names, progress, settings
from ..contract import ExecutionList
from ..guard import is_interrupt, never_fails
from ..models import dynamic, entries, finding, node_models, page_locks, residency
from ..models.adopted import adopted_models
from ..panel import events, failures, history
from ..pool.keeping import pool
from . import auto_parking, idle, job_queue, last_run, needs, second_try
from .needs import Measurement

log = logging.getLogger("qmove")


@dataclass
class _Run:
    """What is known of one prompt while it runs.

    Attributes:
        unfinished: nodes that were staged and put back: they wait for a task, for nodes they
            expanded into, or for a lazy input.
        node: the one that runs, with its class.
        tried: nodes that ran out of memory and had their second try.
        measurement: of that node.
    """

    unfinished: set[str] = field(default_factory=set)
    node: tuple[str, str] | None = None
    tried: set[str] = field(default_factory=set)
    measurement: Measurement | None = None


_runs: weakref.WeakKeyDictionary[Any, _Run] = weakref.WeakKeyDictionary()
_latest: weakref.ReferenceType[Any] | None = None


def install() -> bool:
    """Wraps ComfyUI's methods, once. Returns whether qmove follows the stages now."""
    cls = comfy.execution_list_class()
    if not hooks.fits(cls, "stage_node_execution", 1, is_async=True) or not hooks.fits(
        cls, "complete_node_execution", 1
    ):
        log.warning(
            "This ComfyUI runs its nodes in another way than qmove knows: nothing is parked or "
            "brought home between nodes. The nodes of qmove work, and parked models still wake "
            "when they are used."
        )
        return False
    _wrap(cls, "stage_node_execution", _wrap_stage)
    _wrap(cls, "complete_node_execution", _wrap_complete)
    second_try.install(_Room())
    executor = comfy.prompt_executor_class()
    if hooks.fits(executor, "handle_execution_error", 7):
        _wrap(executor, "handle_execution_error", _wrap_error)
    else:
        log.warning(
            "qmove cannot see the errors of nodes in this ComfyUI: after an out-of-memory error "
            "only ComfyUI itself makes room."
        )
    return True


def _wrap(cls: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    method = getattr(cls, name)
    hooks.wrap(cls, name, functools.wraps(method)(wrapper(method)))


def running_graph() -> ExecutionList | None:
    """The graph of the prompt that runs now, None between prompts."""
    nodes = _latest() if _latest is not None else None
    return nodes if nodes is not None and nodes in _runs else None


def _wrap_stage(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    async def stage_node_execution(self: ExecutionList) -> Any:
        staged = await original(self)
        if isinstance(staged, tuple) and staged and staged[0] is not None:
            _stage(self, staged[0])
        return staged

    return stage_node_execution


def _wrap_complete(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def complete_node_execution(self: Any) -> Any:
        _complete(self, self.staged_node_id)
        try:
            return original(self)
        finally:
            if not self.pendingNodes:
                _end(self)

    return complete_node_execution


def _wrap_error(original: Callable[..., Any]) -> Callable[..., Any]:
    def handle_execution_error(self: Any, *args: Any, **kwargs: Any) -> Any:
        details = kwargs.get("error", args[4] if len(args) > 4 else None)
        _name_lost(details)
        _fail(kwargs.get("ex", args[-1] if args else None), _node_of(details))
        return original(self, *args, **kwargs)

    return handle_execution_error


def _stage(nodes: ExecutionList, node_id: str) -> None:
    with job_queue.lock:
        job_queue.node_ended()  # the last one, where it did not complete
        _begin(nodes, node_id)
        job_queue.node_begins()
    idle.watch.note_use()
    events.send_if_due()


@never_fails("prepare for a node", None)
def _begin(nodes: ExecutionList, node_id: str) -> None:
    global _latest
    if nodes.is_cached(node_id):
        return
    _latest = weakref.ref(nodes)
    entries.unload_only(None)
    dynamic.keep_headroom(settings.vram_to_keep_free() if settings.auto_park() else 0)
    page_locks.book()
    node_names.note(nodes, node_id)
    history.stage_begins(nodes, node_id, graph.class_name_of(nodes, node_id))
    events.watch()
    if auto_parking.has_nothing_to_do():
        return
    run = _runs.setdefault(nodes, _Run())
    run.node, run.measurement = (node_id, graph.class_name_of(nodes, node_id)), None
    # A node that was put back has run, and only collects its results now. One with lazy inputs
    # runs when they are there.
    is_lazy = hasattr(graph.class_of(nodes, node_id), "check_lazy_status")
    if is_lazy or node_id not in run.unfinished:
        run.measurement = _prepare(nodes, node_id)
        last_run.note(nodes, auto_parking.in_use)
    # A loop takes nodes away that were put back: `inhibit_nodes`.
    run.unfinished.intersection_update(nodes.pendingNodes)
    run.unfinished.add(node_id)
    _tell_pool(nodes, node_id)
    history.stage_goes_on(nodes, counts_peak=run.measurement is not None)


@never_fails("tell what stays loaded that a node runs", None)
def _tell_pool(nodes: ExecutionList, node_id: str) -> None:
    pool.node_begins(nodes, node_id, auto_parking.in_use.models, auto_parking.in_use.patchers)


def _prepare(nodes: ExecutionList, node_id: str) -> Measurement | None:
    try:
        with progress.for_node(node_id):
            return auto_parking.prepare(nodes, node_id)
    except BaseException as error:
        host = comfy.model_management()
        if host is None or not is_interrupt(error):
            raise
        # Raised here it would end ComfyUI's worker; asked for again, it is raised in the node.
        host.interrupt_current_processing(True)
        return None


@never_fails("look at what a node gave", None)
def _complete(nodes: ExecutionList, node_id: str) -> None:
    run = _runs.get(nodes)
    if run is not None and run.node is not None and run.node[0] == node_id:
        auto_parking.finish(nodes, node_id, run.measurement)
        run.unfinished.discard(node_id)
        run.node = run.measurement = None
        pool.node_ends(nodes, node_id)
    if history.stage_ends(nodes, node_id):  # it ran, it was not cached
        if run is None and not settings.auto_park():
            auto_parking.show(nodes, node_id)
        node_models.remember(nodes, node_id)
    job_queue.node_ended()


@never_fails("say whose bytes are gone", None)
def _name_lost(details: Any) -> None:
    """Adds to what ComfyUI shows of a node's error which weights somebody has emptied."""
    lost = auto_parking.lost_by(auto_parking.in_use)
    lines = auto_parking.lost_in_words(lost)
    if lines:
        log.error("%s", "\n".join(lines))
        failures.tell_lost(_node_of(details), lost)
    if lines and isinstance(details, dict):
        said = str(details.get("exception_message", "")).strip()
        details["exception_message"] = "\n".join([said, *lines]).strip() + "\n"


def _node_of(details: Any) -> node_names.NodeName | None:
    """The node that an error is of."""
    node_id = details.get("node_id") if isinstance(details, dict) else None
    return node_names.of(node_id) if isinstance(node_id, str) else None


@never_fails("make room after an error", None)
def _fail(error: BaseException | None, node: node_names.NodeName | None = None) -> None:
    nodes = _latest() if _latest is not None else None
    run = _runs.get(nodes) if nodes is not None else None
    try:
        is_full = second_try.is_out_of_memory(error)
        if is_full and error is not None and nodes is not None:
            failures.tell_shortage(node, error, second_try.full_devices(error))
        if run is not None and run.node is not None and error is not None and is_full:
            auto_parking.note_shortage(*run.node, run.measurement, error)
            auto_parking.make_room_again(second_try.full_devices(error))
    finally:
        entries.unload_only(None)
        residency.register_again(adopted_models())
        history.run_fails(nodes)
        _end(nodes)


class _Room:
    """Room for a node that ran out of memory, once in a prompt: what is idle there is parked."""

    def __init__(self) -> None:
        self._full: list[torch.device] = []

    @never_fails("see whether there is room for a second try", False)
    def can_be_made(self, node_id: str, error: BaseException) -> bool:
        run = _run_of(node_id)
        if run is None or run.node is None:
            return False
        self._full = second_try.full_devices(error)
        if node_id in run.tried or not auto_parking.idle_on(self._full):
            auto_parking.say_who_holds(self._full)
            return False
        run.tried.add(node_id)
        auto_parking.note_shortage(*run.node, run.measurement, error)
        return True

    @never_fails("make room for a second try", None)
    def make(self, node_id: str) -> None:
        with progress.for_node(node_id):
            auto_parking.make_room_again(self._full)
        residency.register_woken()  # what moves from here on is the node's doing
        run = _run_of(node_id)
        if run is not None and run.measurement is not None:
            run.measurement = needs.begin(run.measurement.signature)

    @never_fails("keep to the device that is full", None)
    def is_lacking(self, error: BaseException) -> None:
        entries.unload_only(second_try.full_devices(error))


def _run_of(node_id: str) -> _Run | None:
    nodes = running_graph()
    run = _runs.get(nodes) if nodes is not None else None
    return run if run is not None and run.node is not None and run.node[0] == node_id else None


@never_fails("end a prompt", None)
def _end(nodes: Any) -> None:
    if nodes is not None:
        if not settings.auto_park() and comfy.has_browsers():
            finding.look()  # what no wire carries is shown too
        needs.save()
        _runs.pop(nodes, None)
        history.run_ends(nodes)
    auto_parking.in_use = auto_parking.NodeInputs()
    job_queue.node_ended()
    idle.watch.note_use()
    events.send_if_changed()
