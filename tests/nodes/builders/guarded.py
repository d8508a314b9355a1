"""What `nodes.host.guard` has caught during a test, and whether the test expects it."""

from __future__ import annotations

import logging


class Guarded(logging.Handler):
    """Keeps what `guard` has caught and logged: `failures` has what qmove then could not do."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.failures: list[str] = []
        self._expected: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        if record.module == "guard":
            self.failures.append(str(record.args[0]))  # type: ignore[index]

    def expect(self, *what: str) -> None:
        """This test is about qmove failing to do `what`."""
        self._expected.update(what)

    def check(self) -> None:
        assert set(self.failures) == self._expected, (
            "what a guard has caught, and what was expected"
        )
