"""The `__slots__` of a class, which `vars(obj)` does not show."""

from __future__ import annotations


def slots_of(cls: type) -> tuple[str, ...]:
    """The names of all slots of a class and its bases, private ones mangled."""
    names: list[str] = []
    for base in cls.__mro__:
        slots = base.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            is_private = name.startswith("__") and not name.endswith("__")
            names.append(f"_{base.__name__.lstrip('_')}{name}" if is_private else name)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
