"""Where an object is kept: from it upward through its referrers to the one that keeps all of them.

That is a node's instance, a class, a module's global, a function, a cache, a thread: the outermost
object that is no frame and no module of code. Each level is one pass of the garbage collector over
all objects, so the levels are bounded.
"""

from __future__ import annotations

import functools
import gc
import threading
import types
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from ..slots import slots_of
from .heap import Heap

MOST_LEVELS = 12
AT_ONCE = 8  # objects looked for in one climb
MOST_TARGETS = 24  # whose referrers one pass looks for; each costs a comparison per reference
MOST_VISITED = 5_000_000  # objects of one look, at about 50 ns

Known = Callable[[object], "str | None"]  # a name for an object at which the way up ends


@dataclass(frozen=True)
class Place:
    """Where something is kept.

    Attributes:
        kind: "known" (the caller has a name for the holder), "module" (an `nn.Module`), "class",
            "global", "function" (closure, cache, partial or generator), "thread", "attribute" (of
            an object that only frames or C hold), "C" (no Python object holds it, though code that
            runs now may), or "unknown" (the way up is too long).
        owner: in words: "Caption node", "module faces", "a Session".
        path: from the owner to it: "self.model", "_cache['a']".
        holders: from the thing itself outward, the owner last. Strong: do not keep them.
    """

    kind: str
    owner: str
    path: str
    holders: tuple[object, ...]

    def __str__(self) -> str:
        return f"{self.owner}, `{self.path}`" if self.path else self.owner

    @property
    def base(self) -> object:
        """What the owner itself refers to: the value of its attribute, global or variable."""
        for index in range(len(self.holders) - 2, 0, -1):
            if not _is_namespace(self.holders[index], self.holders[index + 1]):
                return self.holders[index]
        return self.holders[0]


def places(heap: Heap, objects: Sequence[object], known: Known) -> list[Place]:
    """The place of each object; "unknown" where too much would have to be looked at."""
    found: list[Place] = []
    for start in range(0, len(objects), AT_ONCE):
        found += _climb(heap, objects, range(len(objects))[start : start + AT_ONCE], known)
    return found


class _Way:
    """A step of the way up: an object, and the step below it. The search skips these as holders."""

    __slots__ = ("below", "index", "obj")

    def __init__(self, index: int, obj: object, below: _Way | None) -> None:
        self.index, self.obj, self.below = index, obj, below

    @property
    def holders(self) -> tuple[object, ...]:
        return tuple(reversed(list(self._downward())))

    def _downward(self) -> Iterator[object]:
        way: _Way | None = self
        while way is not None:
            yield way.obj
            way = way.below


def _climb(heap: Heap, objects: Sequence[object], which: range, known: Known) -> list[Place]:
    results: dict[int, Place] = {}
    ways = [_Way(index, objects[index], None) for index in which]
    longest = {way.index: way for way in ways}
    seen = {(way.index, id(way.obj)) for way in ways}
    own = {id(obj) for obj in (objects, *heap.own)}
    for _level in range(MOST_LEVELS):
        if heap.visited > MOST_VISITED:
            break
        further = _referrers(heap, ways, seen, own)
        ends = [(way, end) for way in further if (end := _end(way, known)) is not None]
        for way, (kind, owner) in sorted(ends, key=lambda item: _KINDS.index(item[1][0])):
            results.setdefault(way.index, _place(kind, owner, way))
        longest.update((way.index, way) for way in further)
        ways = [way for way in further if way.index not in results][:MOST_TARGETS]
        if not ways:
            break
    cut_off = {way.index for way in ways}
    for index in which:
        if index not in results:
            results[index] = _without_owner(longest[index], index in cut_off)
    return [results[index] for index in which]


def _referrers(
    heap: Heap, ways: list[_Way], seen: set[tuple[int, int]], own: set[int]
) -> list[_Way]:
    targets = tuple({id(way.obj): way.obj for way in ways}.values())
    own = {*own, id(targets), id(ways)}
    heap.visited += heap.size
    further: list[_Way] = []
    for referrer in gc.get_referrers(*targets):
        if id(referrer) in own or isinstance(referrer, _IGNORED):
            continue
        held = {id(value) for value in gc.get_referents(referrer)}
        heap.visited += len(held)
        for way in ways:
            key = (way.index, id(referrer))
            if id(way.obj) in held and key not in seen:
                seen.add(key)
                further.append(_Way(way.index, referrer, way))
    return further


# What runs, and our own steps: they hold nothing for long.
_RUNNING = (types.FrameType, types.CoroutineType, types.AsyncGeneratorType, types.TracebackType)
_IGNORED = (*_RUNNING, _Way)

_KINDS = ["known", "module", "class", "global", "function", "thread"]


def _end(way: _Way, known: Known) -> tuple[str, str] | None:
    """The kind and name of an object at which the way up ends; None where it goes on."""
    obj = way.obj
    cls = type(obj)
    name = known(obj)
    if name is not None:
        return "known", name
    if issubclass(cls, nn.Module):
        start = way.holders[0]
        is_inside = isinstance(start, nn.Module) and any(m is obj for m in start.modules())
        return None if is_inside else ("module", cls.__qualname__)
    if issubclass(cls, type):
        return "class", f"class {obj.__qualname__}"  # type: ignore[attr-defined]
    if cls is dict and "__builtins__" in obj and "__name__" in obj:  # type: ignore[operator]
        return "global", f"module {obj['__name__']}"  # type: ignore[index]
    if cls is types.FunctionType:
        return "function", f"function {_name(obj)}"
    if cls is functools._lru_cache_wrapper:
        return "function", f"lru_cache of {_name(obj)}"
    if issubclass(cls, functools.partial):
        return "function", f"a partial of {_name(obj.func)}"  # type: ignore[attr-defined]
    if cls is types.GeneratorType:
        return "function", f"generator {_name(obj)}"
    if issubclass(cls, threading.Thread):
        return "thread", f"thread {obj.name!r}"  # type: ignore[attr-defined]
    return None


def _name(function: object) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    module = getattr(function, "__module__", None)
    return f"{module}.{name}" if module else str(name)


def _place(kind: str, owner: str, way: _Way) -> Place:
    holders = way.holders
    return Place(kind, owner, _path(holders), holders)


def _without_owner(way: _Way, cut_off: bool) -> Place:
    holders = way.holders
    if cut_off:
        return Place("unknown", "an object that was not looked for", "", holders)
    outermost = holders[-1]
    if len(holders) > 1 and not isinstance(outermost, _CONTAINERS):
        return _place("attribute", f"a {type(outermost).__qualname__}", way)
    return Place("C", "no Python object but code that runs: a library in C++", "", holders)


_CONTAINERS = (dict, list, tuple, set, frozenset, deque, types.CellType, nn.Module)


# The path, in the words of Python -----------------------------------------------------------------


def _is_namespace(obj: object, owner: object) -> bool:
    """Whether a dict holds the attributes of `owner`."""
    if type(obj) is not dict:
        return False
    return isinstance(owner, type) or _attributes(owner) is obj


def _attributes(obj: object) -> object:
    try:
        return object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return None


def _path(holders: tuple[object, ...]) -> str:
    owner = holders[-1]
    text = owner.__qualname__ if isinstance(owner, type) else ""
    if not isinstance(owner, (type, dict, *_FUNCTIONS)):
        text = "self"
    for index in range(len(holders) - 1, 0, -1):
        text += _step(holders, index)
    return text.removeprefix(".")


_CACHES = (functools._lru_cache_wrapper, functools.partial)
_FUNCTIONS = (types.FunctionType, types.GeneratorType, *_CACHES)


def _step(holders: tuple[object, ...], index: int) -> str:
    """From `holders[index]` to the one below it."""
    parent, child = holders[index], holders[index - 1]
    above = holders[index + 1] if index + 1 < len(holders) else None
    if _is_namespace(child, parent) or isinstance(parent, types.CellType):
        return ""
    if isinstance(parent, dict):
        key = next((key for key, value in parent.items() if value is child), "?")
        is_named = above is None or _is_namespace(parent, above)
        return f".{key}" if is_named and isinstance(key, str) else f"[{_short(key)}]"
    if isinstance(above, types.FunctionType) and parent is above.__closure__:
        variables = zip(above.__code__.co_freevars, above.__closure__ or (), strict=True)
        return next((f".{name}" for name, cell in variables if cell is child), "")
    if isinstance(parent, (list, tuple, deque)):
        return f"[{next((i for i, value in enumerate(parent) if value is child), '?')}]"
    named = dict(_attributes(parent) or {})  # type: ignore[call-overload]
    for slot in slots_of(type(parent)):
        named[slot] = getattr(parent, slot, None)
    attribute = next((name for name, value in named.items() if value is child), None)
    return f".{attribute}" if attribute is not None else ""


def _short(key: object) -> str:
    text = repr(key) if isinstance(key, (str, int, float)) else type(key).__qualname__
    return text if len(text) <= 40 else f"{text[:37]}...'"
