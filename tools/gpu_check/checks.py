"""What a step finds out: checks that hold or fail, figures, and parts that were left out."""

from __future__ import annotations

import contextlib
import json
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Check:
    """One line of the result.

    Attributes:
        step: the step that made it.
        name: what should hold, or what was measured.
        status: "passed", "failed", "skipped" or "figure".
        detail: the figures, or the reason.
        topics: short names of what a failure concerns, as in docs/gpu-check.md.
    """

    step: str
    name: str
    status: str
    detail: str = ""
    topics: tuple[str, ...] = ()


class Checks:
    """Takes the checks of one step, and writes each to a file at once: a later crash keeps them."""

    def __init__(self, step: str, file: Path) -> None:
        self._step, self._file = step, file

    def expect(self, name: str, holds: bool, detail: object = "", *topics: str) -> None:
        """Notes whether something holds."""
        self._note(name, "passed" if holds else "failed", detail, topics)

    def figure(self, name: str, value: object) -> None:
        """Notes something measured, which no limit is set for."""
        self._note(name, "figure", value, ())

    def skip(self, name: str, reason: str) -> None:
        """Notes what could not be tried here, and why."""
        self._note(name, "skipped", reason, ())

    @contextlib.contextmanager
    def no_error(self, name: str, *topics: str) -> Iterator[None]:
        """Notes whether the body runs without an exception. The step goes on either way."""
        try:
            yield
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            detail = (
                f"{type(error).__name__}: {reason} ({Path(where.filename).name}:{where.lineno})"
            )
            self._note(name, "failed", detail, topics)
        else:
            self._note(name, "passed", "", topics)

    def _note(self, name: str, status: str, detail: object, topics: tuple[str, ...]) -> None:
        check = Check(self._step, name, status, str(detail), topics)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(check)) + "\n")


def read(file: Path) -> list[Check]:
    """The checks that a step has written."""
    if not file.exists():
        return []
    lines: list[dict[str, Any]] = [json.loads(line) for line in file.read_text().splitlines()]
    return [Check(**{**line, "topics": tuple(line["topics"])}) for line in lines]
