"""Draws what is in memory: a bar for each device and for RAM, with the models by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from qmove_core.for_hosts import first_of, readable_bytes

from .host.words import say

WIDTH, BAR, GAP = 900, 34, 22  # pixels
BACKGROUND, TEXT, OTHER, FREE = "#1e1f22", "#e6e6e6", "#6b7280", "#33363c"
COLORS = ("#4c9f70", "#d08c3c", "#5b8def", "#b86bb5", "#c75c5c", "#3fa7a5")

Part = tuple[str, int, str]  # name, bytes, color


def write_text(snapshot: dict[str, Any]) -> str:
    """The snapshot of `state.snapshot`, to read."""
    lines = []
    for title, total, parts in _bars(snapshot, say):
        lines.append(say("{title}: {size} in all", title=title, size=readable_bytes(total)))
        lines += [f"  {name}: {readable_bytes(nbytes)}" for name, nbytes, _color in parts if nbytes]
    lines += _same_weights(snapshot)
    for model in snapshot["models"]:
        if model["lost"]:
            lines.append(
                say(
                    "{name}: {weights} lost their bytes, as somebody has emptied the storages "
                    "(resize_(0)). Load it again.",
                    name=_titled(model, say),
                    weights=first_of(model["lost"]),
                )
            )
    lines += _stay_loaded(snapshot["pool"])
    done = snapshot["done"]
    lines.append(
        say(
            "Since the start: {parks} parks, {restores} restores, {size} copied.",
            parks=done["parks"],
            restores=done["restores"],
            size=readable_bytes(done["copied_bytes"]),
        )
    )
    return "\n".join(lines)


def _stay_loaded(pool: dict[str, Any] | None) -> Iterator[str]:
    """A line on the models that stay loaded between workflows, where that is on."""
    if pool is not None and pool["limit"]:
        yield say(
            "Stay loaded between workflows: {models} models, {size}, of which {in_ram} of {limit} "
            "in RAM; {hits} loads saved ({seconds} s), {misses} made.",
            models=pool["models"],
            size=readable_bytes(pool["nbytes"]),
            in_ram=readable_bytes(pool["in_ram"]),
            limit=readable_bytes(pool["limit"]),
            hits=pool["hits"],
            seconds=f"{pool['seconds_saved']:.1f}",
            misses=pool["misses"],
        )


def _same_weights(snapshot: dict[str, Any]) -> Iterator[str]:
    """A line for each two models that have the same weights, and what is saved by it."""
    for model in snapshot["models"]:
        for other in model["same"]:
            if model["id"] < other["id"]:
                yield say(
                    "{name} and {other} have the same weights: {size} of each.",
                    name=_titled(model, say),
                    other=other["name"],
                    size=readable_bytes(other["nbytes"]),
                )
    shared = snapshot["ram"]["shared"]
    if shared:
        yield say(
            "Parked models share {size} of RAM, as they have the same weights.",
            size=readable_bytes(shared),
        )


def draw_picture(snapshot: dict[str, Any]) -> torch.Tensor:
    """The snapshot as an IMAGE: float32 of shape (1, height, width, 3), from 0 to 1.

    Its words are English: the font that comes with PIL has no Chinese or Japanese.
    """
    from PIL import Image, ImageDraw, ImageFont  # ComfyUI has it; importing the nodes needs none

    bars = list(_bars(snapshot, _in_english))
    rows = sum(2 + sum(1 for part in parts if part[1]) for _title, _total, parts in bars)
    image = Image.new("RGB", (WIDTH, rows * 20 + len(bars) * (BAR + GAP) + GAP), BACKGROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default()
    y = GAP
    for title, total, parts in bars:
        draw.text((20, y), f"{title}: {readable_bytes(total)}", TEXT, font)
        y += 20
        x = 20.0
        for _name, nbytes, color in parts:
            width = (WIDTH - 40) * nbytes / max(total, 1)
            draw.rectangle((x, y, x + width, y + BAR), color)
            x += width
        y += BAR + 6
        for name, nbytes, color in parts:
            if nbytes:
                draw.rectangle((20, y + 2, 30, y + 12), color)
                draw.text((38, y), f"{name}: {readable_bytes(nbytes)}", TEXT, font)
                y += 20
        y += GAP
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, image.height, image.width, 3).float() / 255


Words = Callable[..., str]  # `say`, or the same in English


def _in_english(sentence: str, /, **parts: object) -> str:
    return sentence.format(**parts)


def _bars(snapshot: dict[str, Any], say: Words) -> Iterator[tuple[str, int, list[Part]]]:
    """For each memory its title, its size and its parts, which add up to the size."""
    for device in snapshot["devices"]:
        if device["total"] is not None:
            yield device["name"], device["total"], _parts(snapshot, device, say)
    ram = snapshot["ram"]
    parked = [
        (
            say("{name} (parked from {home})", name=model["name"], home=home),
            nbytes,
            COLORS[index % len(COLORS)],
        )
        for index, model in enumerate(snapshot["models"])
        for home, nbytes in model["parked"].items()
    ]
    parked = _once(parked, ram["shared"])
    other = ram["total"] - ram["free"] - sum(nbytes for _name, nbytes, _color in parked)
    yield (say("RAM"), ram["total"], [*parked, *_rest(other, ram["free"], say)])


def _rest(other: int, free: int, say: Words) -> list[Part]:
    return [(say("other use"), max(0, other), OTHER), (say("free"), free, FREE)]


def _once(parked: list[Part], shared: int) -> list[Part]:
    """The same without what is shared, which counts for the first who has it."""
    result = []
    for name, nbytes, color in reversed(parked):
        less = min(nbytes, shared)
        shared -= less
        result.append((name, nbytes - less, color))
    return result[::-1]


def _titled(model: dict[str, Any], say: Words) -> str:
    """A model's name, where it was found if no wire carries it, and whether it is pinned."""
    place, pin = model.get("place", ""), model.get("pin", "unpin")
    notes = [place] if place not in ("", model["name"]) else []
    if pin == "pin":
        notes.append(say("pinned"))
    elif pin == "forget":
        notes.append(say("left alone"))
    elif pin != "unpin":
        notes.append(say("kept on {device}", device=pin))
    return f"{model['name']} ({', '.join(notes)})" if notes else model["name"]


def _titled_other(other: dict[str, Any], say: Words) -> str:
    """Who holds VRAM without being a model. A program's title is its own."""
    if other["kind"] == "wires":
        return say("images and latents on wires")
    if other["kind"] == "unexplained":
        return say("not explained by this process (contexts, engines in C++, other programs)")
    return str(other["name"])


def _parts(snapshot: dict[str, Any], device: dict[str, Any], say: Words) -> list[Part]:
    parts: list[Part] = []
    for index, model in enumerate([*snapshot["models"], *snapshot["comfyui_models"]]):
        nbytes = model["resident"].get(device["name"], 0)
        if nbytes:
            parts.append((_titled(model, say), nbytes, COLORS[index % len(COLORS)]))
    parts += [(_titled_other(o, say), o["nbytes"], OTHER) for o in device["others"]]
    free = device["free"] or 0
    other = device["total"] - free - sum(nbytes for _name, nbytes, _color in parts)
    return [*parts, *_rest(other, free, say)]
