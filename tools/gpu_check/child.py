"""One step in its own process: `python -m tools.gpu_check.child STEP FILE SIZES`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from . import steps
from .checks import Checks
from .machine import Sizes, is_simulated


def main() -> None:
    name, file, sizes = sys.argv[1:]
    step = next(step for step in steps.STEPS if step.name == name)
    chosen = json.loads(sizes)
    of_machine = Sizes.of_this_machine(is_simulated())
    steps.run(step, Checks(name, Path(file)), Sizes(**{**of_machine.to_dict(), **chosen}))


if __name__ == "__main__":
    main()
