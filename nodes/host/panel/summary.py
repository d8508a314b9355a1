"""What parking has gained in one run, from measured figures: the VRAM that it ran in, and what all
of its models would have taken at once."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Any

import torch

from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from ..models.adopted import adopted_models

log = logging.getLogger("qmove")

LEAST_SHARE = 0.02  # of what a run would have taken: less is not worth a line


class Gains:
    """The highest readings of a run, and the moves that it took."""

    def __init__(self) -> None:
        self._parked = Counter(for_hosts.parked_bytes())  # as the run began
        self._parked_of = {
            adopted.number: Counter({str(d): n for d, n in adopted.parked.items()})
            for adopted in adopted_models()
        }
        self._used: dict[torch.device, int] = {}  # at most
        self._wanted: dict[torch.device, int] = {}  # at most, with all that was parked then
        self._aside: dict[int, str] = {}  # models that have left for a node, by number
        self._moved: set[int] = set()
        self._times: list[tuple[float, float]] = []  # when something moved
        self._failed = False

    def note_use(self, device: torch.device, nbytes: int, total: int, *, is_quiet: bool) -> None:
        """A reading of what is in use. While something moves it is not quiet: those bytes are in
        two places."""
        nbytes = min(nbytes, total)
        self._used[device] = max(self._used.get(device, 0), nbytes)
        if is_quiet:
            wanted = nbytes + for_hosts.parked_bytes().get(str(device), 0)
            self._wanted[device] = max(self._wanted.get(device, 0), wanted)

    def note_move(self, verb: str, model: int, name: str, began: float, seconds: float) -> None:
        """A model has left for a node of the run ("park"), or come home for one ("restore")."""
        self._moved.add(model)
        self._times.append((began, began + seconds))
        if verb == "park":
            self._aside[model] = name

    def fail(self) -> None:
        """The run did not end well."""
        self._failed = True

    def summary(self) -> dict[str, Any] | None:
        """Plain data; None where no model has stepped aside, or nothing was gained by it.

        Returns:
            "device"; in bytes what was "used" on it at most and what would have been "wanted";
            the "models" that stepped aside, by name, and for how many "seconds" models moved.
        """
        if self._failed or not self._aside:
            return None
        # What was away before, and was not asked for, would not have been there.
        away = self._parked.copy()
        for number in self._moved & self._parked_of.keys():
            away.subtract(self._parked_of[number])
        wanted = {d: nbytes - away[str(d)] for d, nbytes in self._wanted.items()}
        gained = {d: nbytes - self._used.get(d, 0) for d, nbytes in wanted.items()}
        device = max(gained, key=lambda each: gained[each], default=None)
        if device is None or gained[device] < LEAST_SHARE * wanted[device]:
            return None
        used, all_at_once = self._used[device], wanted[device]
        models, seconds = list(self._aside.values()), _covered(self._times)
        log.info(
            "ran in %s instead of %s: %s stepped aside for %.1f s",
            readable_bytes(used),
            readable_bytes(all_at_once),
            "1 model" if len(models) == 1 else f"{len(models)} models",
            seconds,
        )
        return {
            "device": str(device),
            "used": used,
            "wanted": all_at_once,
            "models": models,
            "seconds": round(seconds, 3),
        }


def _covered(times: list[tuple[float, float]]) -> float:
    """Seconds in which something moved: two that move at once take their time once."""
    seconds = 0.0
    end = float("-inf")
    for began, ended in sorted(times):
        seconds += max(0.0, ended - max(began, end))
        end = max(end, ended)
    return seconds
