"""The type of a wire that takes anything."""

from __future__ import annotations


class AnyType(str):
    """Equal to every other type: ComfyUI compares with `!=`, where "*" fails up to 0.3.75."""

    def __ne__(self, other: object) -> bool:
        return False


ANY = AnyType("*")
