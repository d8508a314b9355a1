"""The pool: outputs that stay loaded, within a budget of RAM, the least useful going first.

A model on a device takes no RAM for it: it does when it is parked, so room is made before that.
What ComfyUI evicts while it goes through its list is parked also where another, which the running
prompt uses, was let go of for it and has not gone: RAM is beyond the budget until that one goes. A
model goes by being let go of: where something else still holds it (ComfyUI's own cache), it stays
with that.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import qmove_core as qmove
from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

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


class Pool:
    """Attributes:
    hits: outputs that were given, and handed to a node that ran.
    misses: loaders that ran, and whose models are kept since.
    seconds_saved: what the loaders of the hits took when they ran.
    """

    def __init__(self) -> None:
        self.hits = self.misses = 0
        self.seconds_saved = 0.0
        self._lock = threading.RLock()  # nothing is let go of, and nothing moves, inside
        self._kept: dict[str, Kept] = {}
        self._prompt = 0
        self._given: dict[str, Kept] = {}  # in this prompt, by node
        self._fresh: dict[str, _Fresh] = {}
        self._began: dict[str, float] = {}  # when nodes began to run, by `time.perf_counter`

    # What ComfyUI asks ----------------------------------------------------------------------------

    def begin_prompt(self) -> None:
        self._prompt += 1
        self.end_prompt()

    def end_prompt(self) -> None:
        for noted in (self._given, self._fresh, self._began):
            noted.clear()
        self.keep_to_settings()

    def may_have(self, key: str) -> bool:
        return key in self._kept

    def give(self, node_id: str, key: str) -> list[Any] | None:
        """The outputs that were kept for equal inputs; None where the loader must run."""
        kept = self._kept.get(key)
        if kept is None or not settings.keeps_loaded():
            return None
        reason = kept.outdated()
        if reason is not None:
            self._let_go([kept], reason)
            return None
        with self._lock:  # another thread may let go of it
            if self._kept.get(key) is not kept:
                return None
            kept.used_in = self._prompt
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
        for kept in self._all() if used and self._kept else ():
            if not used.isdisjoint(kept.identities()):
                kept.used_in = self._prompt
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
            self._prompt,
        )
        with self._lock:
            self._kept[fresh.key] = kept
            self.misses += 1
        log.debug("%s stays loaded; loading it took %.1f s", kept.name, seconds)
        self._keep_within()

    # The budget -----------------------------------------------------------------------------------

    def keep_to_settings(self) -> None:
        """Lets go of what the settings do not allow, or RAM has no room for."""
        if not self._kept:
            return
        own = [] if settings.keeps_loaded_own() else [k for k in self._all() if k.patchers]
        self._let_go(own if settings.keeps_loaded() else self._all(), "the settings say so")
        self._keep_within()
        for_hosts.trim_under_pressure()

    def make_room_for(self, leaving: Adopted, nbytes: int, *, may_go: bool) -> None:
        """`nbytes` of a model are about to be parked: makes room within the budget, if it is kept.

        Where it is less useful than what is there, and `may_go`, it is let go of instead.
        """
        if any(leaving in kept.adopted for kept in self._all()):
            self._keep_within(nbytes, leaving, may_go=may_go)

    def let_go(self, adopted: Adopted) -> bool:
        """Lets go of a model for which RAM has no room. Returns whether it is gone."""
        holders = [kept for kept in self._all() if adopted in kept.adopted and not kept.stays]
        self._let_go(holders, "RAM has no room for it")
        return bool(holders) and adopted.model is None

    def give_up(self, nbytes: int) -> None:
        """RAM is short: lets go of models that take `nbytes` of it."""
        self._let_go(self._least_useful(nbytes), "RAM is short")

    def forget_all(self) -> None:
        """Lets go of everything, and counts from 0."""
        self._let_go(self._all(), "all of it goes")
        self.hits = self.misses = self._prompt = 0
        self.seconds_saved = 0.0
        self.end_prompt()

    def figures(self) -> dict[str, Any]:
        """For people, as plain data; sizes in bytes."""
        everything: dict[Any, int] = {}
        for kept in self._all():
            everything |= kept.bytes_in_all()
        return {
            "limit": settings.most_kept_loaded() if settings.keeps_loaded() else 0,
            "models": len(everything),
            "nbytes": sum(everything.values()),
            "in_ram": self._in_ram(),
            "hits": self.hits,
            "misses": self.misses,
            "seconds_saved": round(self.seconds_saved, 1),
        }

    @property
    def count(self) -> int:
        """How many outputs are kept."""
        return len(self._kept)

    def _all(self) -> list[Kept]:
        with self._lock:
            return list(self._kept.values())

    def _in_ram(self) -> int:
        sizes: dict[Any, int] = {}
        for kept in self._all():
            sizes |= kept.bytes_in_ram()
        return sum(sizes.values())

    def _keep_within(
        self, coming: int = 0, leaving: Adopted | None = None, *, may_go: bool = False
    ) -> None:
        """Keeps to the budget, with `coming` bytes of a model that is about to be parked.

        Host copies that only make the next park quicker count as well; they are given back first to
        last as the core does.
        """
        budget = settings.most_kept_loaded()
        over = self._in_ram() + coming - budget
        if over > 0:
            arriving = {leaving: coming} if leaving is not None else {}
            victims = self._least_useful(over, arriving, may_go=may_go)
            self._let_go(victims, f"{readable_bytes(budget)} of RAM are full")
        stats = qmove.stats()
        own = leaving.mirrored if leaving is not None and leaving.model is not None else 0
        spare = stats.mirror_bytes + stats.spare_bytes - own
        over = self._in_ram() + coming + spare - budget
        if over > 0 and spare > 0:
            qmove.trim(min(over, spare))

    def _least_useful(
        self, over: int, arriving: dict[Adopted, int] | None = None, *, may_go: bool = False
    ) -> list[Kept]:
        """Outputs without which `over` bytes of RAM less are taken, the least useful first; pinned
        ones never, nor those that take none.

        Args:
            arriving: a model that is about to be parked, and its bytes.
            may_go: whether that one may be among them.
        """
        everything = self._all()
        victims: list[Kept] = []
        prompt = self._prompt
        for kept in sorted(everything, key=lambda k: (-k.uselessness(prompt), k.used_in)):
            if over <= 0:
                break
            sizes = kept.bytes_in_ram()
            own = arriving.keys() & sizes.keys() if arriving else set()
            if kept in victims or kept.stays or (own and not may_go):
                continue
            freed = sum(sizes.values()) + sum((arriving or {})[one] for one in own)
            if not freed:
                continue
            # What has the same models goes with it: else nothing would be freed.
            same = [k for k in everything if not kept.identities().isdisjoint(k.identities())]
            if not any(other.stays for other in same):
                victims += same
                over -= freed
        return victims

    def _let_go(self, victims: Sequence[Kept], reason: str) -> None:
        with self._lock:
            going = [kept for kept in victims if self._kept.get(kept.key) is kept]
        if not going:
            return
        for kept in going:
            log.info("%s does not stay loaded: %s", kept.name, reason)
        models = [weakref.ref(adopted.model) for kept in going for adopted in kept.adopted]
        with self._lock:
            for kept in going:
                self._kept.pop(kept.key, None)
            for node_id in [n for n, kept in self._given.items() if kept in going]:
                del self._given[node_id]
        for kept in going:
            # Lists of callers may still hold it; ComfyUI has the same objects in its own lists.
            kept.outputs, kept.models, kept.patchers = [], [], []
        if any(model() is not None for model in models):
            gc.collect()


pool = Pool()
