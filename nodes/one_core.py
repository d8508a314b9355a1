"""Makes sure that a process has one `qmove_core`: the pack's own copy, or an installed package.

Other packs that `import qmove_core` must see the models that the nodes have parked. So the pack's
own copy is imported under its plain name, and one that is imported already is used as it is.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

NAME = "qmove_core"
OWN_COPY = Path(__file__).resolve().parent.parent / NAME / "__init__.py"

log = logging.getLogger("qmove")


def load_core(own_copy: Path = OWN_COPY) -> ModuleType:
    """Returns `qmove_core`: the one imported already, else the pack's copy, else an installed one.

    Raises:
        ImportError: there is none, or it cannot be imported (it names what is missing).
    """
    present = sys.modules.get(NAME)
    if present is not None:
        if present.__file__ is None or Path(present.__file__).resolve() != own_copy:
            log.info(
                "qmove uses the qmove_core at %s, which was imported before this pack",
                present.__file__,
            )
        return present
    spec = importlib.util.spec_from_file_location(
        NAME, own_copy, submodule_search_locations=[str(own_copy.parent)]
    )
    if not own_copy.exists() or spec is None or spec.loader is None:
        import qmove_core

        return qmove_core
    core = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = core
    try:
        spec.loader.exec_module(core)
    except BaseException:
        del sys.modules[NAME]
        raise
    return core
