"""The pool: outputs that stay loaded, and are given back to ComfyUI.

The budget of RAM, who goes first, the disk and the figures are those of every pool of qmove:
`qmove_core.pool.keeping`. What ComfyUI evicts while it goes through its list is parked also where
another, which the running prompt uses, was let go of for it and has not gone: RAM is beyond the
budget until that one goes, unless there is a disk to park on. A model goes by being let go of:
where something else still holds it (ComfyUI's own cache), it stays with that.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from qmove_core import for_hosts

from .. import graph, settings
from ..contract import ExecutionList, HostEntry
from ..models.adopted import Adopted
from . import rules
from .kept import Kept

log = logging.getLogger("qmove")


@dataclass(frozen=True)
class _Fresh:
    """What ComfyUI has just put into its cache, until its node completes."""

    key: str
    outputs: list[Any]


class Pool(for_hosts.Keeping[Kept]):
    """The clock of the pool counts prompts; a hit is an output that was given, and handed to a node
    that ran."""

    def __init__(self) -> None:
        super().__init__(lambda: {None: settings.most_kept_loaded()})
        self._notes = threading.RLock()
        self._given: dict[str, Kept] = {}  # in this prompt, by node
        self._fresh: dict[str, _Fresh] = {}
        self._began: dict[str, float] = {}  # when nodes began to run, by `time.perf_counter`

    # What ComfyUI asks ----------------------------------------------------------------------------

    def begin_prompt(self) -> None:
        self.clock += 1
        self.end_prompt()

    def end_prompt(self) -> None:
        for noted in (self._given, self._fresh, self._began):
            noted.clear()
        self.keep_to_settings()

    def may_have(self, key: str) -> bool:
        return self.get(key) is not None

    def give(self, node_id: str, key: str) -> list[Any] | None:
        """The outputs that were kept for equal inputs; None where the loader must run."""
        kept = self.get(key)
        if kept is None or not settings.keeps_loaded():
            return None
        reason = kept.outdated()
        if reason is not None:
            self.let_go([kept], reason)
            return None
        with self._notes:  # another thread may let go of it
            if self.get(key) is not kept:
                return None
            kept.used_in = self.clock
            self._given[node_id] = kept
            return kept.outputs

    def note_output(self, node_id: str, class_name: str, key: str, outputs: list[Any]) -> None:
        """ComfyUI has put outputs into its cache. Whether they are kept is seen when the node is
        complete."""
        if settings.keeps_loaded() and rules.is_repeatable(rules.class_named(class_name)):
            self._fresh[node_id] = _Fresh(key, outputs)

    # What happens around each node ----------------------------------------------------------------

    def node_begins(
        self,
        nodes: ExecutionList,
        node_id: str,
        models: Iterable[Adopted],
        own: Iterable[HostEntry],
    ) -> None:
        """A node runs next, with these models."""
        for source, _index in graph.links_of(nodes, node_id) if self._given else ():
            kept = self._given.pop(source, None)
            if kept is not None:
                self.hits += 1
                self.seconds_saved += kept.seconds
        used = {*models, *(id(patcher.model) for patcher in own)}
        for kept in self.all() if used else ():
            if not used.isdisjoint(kept.identities()):
                kept.used_in = self.clock
        self._began.setdefault(node_id, time.perf_counter())

    def node_ends(self, nodes: ExecutionList, node_id: str) -> None:
        """A node has run: what it gave is kept, if it may be."""
        fresh, began = self._fresh.pop(node_id, None), self._began.pop(node_id, None)
        if fresh is None or began is None:
            return
        seconds = time.perf_counter() - began
        found = rules.models_to_keep(nodes, node_id, fresh.outputs)
        behind = rules.nodes_behind(nodes, node_id) if found is not None else []
        if found is None or not all(
            rules.is_repeatable(graph.class_of(nodes, one)) for one in behind
        ):
            return
        kept = Kept(
            fresh.key,
            graph.class_name_of(nodes, node_id),
            fresh.outputs,
            *found,
            seconds,
            list(rules.written_inputs(nodes, behind)),
            self.clock,
            self._forget,
        )
        self.add(kept)
        self.misses += 1
        log.debug("%s stays loaded; loading it took %.1f s", kept.name, seconds)
        self.keep_within()

    # The budget -----------------------------------------------------------------------------------

    def keep_to_settings(self) -> None:
        """Lets go of what the settings do not allow, or RAM has no room for."""
        if not len(self):
            return
        own = [] if settings.keeps_loaded_own() else [k for k in self.all() if k.patchers]
        self.let_go(own if settings.keeps_loaded() else self.all(), "the settings say so")
        self.keep_within()
        for_hosts.trim_under_pressure()

    def make_room_for(self, leaving: Adopted, nbytes: int, *, may_go: bool) -> bool:
        """`nbytes` of a model are about to be parked: makes room within the budget, if it is kept.

        Where it is less useful than what is there it is to go to disk, if there is one; else, where
        it `may_go`, it is let go of.

        Returns:
            Whether it is to go to disk.
        """
        holder = next((kept for kept in self.all() if leaving in kept.adopted), None)
        if holder is None:
            return False
        place = self.keep_within(nbytes, holder, leaving, mirrored=leaving.mirrored, may_go=may_go)
        return place is for_hosts.KeepingPlace.DISK

    def has_no_disk_for(self, leaving: Adopted, nbytes: int, *, may_go: bool) -> None:
        """The disk did not take it: the same without."""
        holder = next((kept for kept in self.all() if leaving in kept.adopted), None)
        if holder is not None:
            self.keep_within(
                nbytes,
                holder,
                leaving,
                mirrored=leaving.mirrored,
                may_go=may_go,
                may_be_on_disk=False,
            )

    def let_go_of(self, adopted: Adopted) -> bool:
        """Lets go of a model for which RAM has no room. Returns whether it is gone."""
        holders = [kept for kept in self.all() if adopted in kept.adopted and not kept.stays]
        self.let_go(holders, "RAM has no room for it")
        return bool(holders) and adopted.model is None

    def forget_all(self) -> None:
        """Lets go of everything, and counts from 0."""
        self.let_go(self.all(), "all of it goes")
        self.hits = self.misses = self.spills = self.clock = 0
        self.seconds_saved = 0.0
        self.end_prompt()

    def figures(self, limit: int | None = None) -> dict[str, Any]:
        """For people, as plain data; sizes in bytes."""
        if limit is None:
            limit = settings.most_kept_loaded() if settings.keeps_loaded() else 0
        return super().figures(limit)

    @property
    def count(self) -> int:
        """How many outputs are kept."""
        return len(self)

    def _forget(self, kept: Kept) -> None:
        self.remove(kept)
        with self._notes:
            for node_id in [n for n, given in self._given.items() if given is kept]:
                del self._given[node_id]


pool = Pool()
