"""qmove's nodes for ComfyUI, one a file. Importing this hooks qmove into ComfyUI."""

from .one_core import load_core

load_core()

from . import host  # noqa: E402
from .free_vram import QMoveFreeVRAM  # noqa: E402
from .host import progress  # noqa: E402
from .materialize import QMoveMaterialize  # noqa: E402
from .park import QMovePark  # noqa: E402
from .pin import QMovePin  # noqa: E402
from .report import QMoveReport  # noqa: E402
from .restore import QMoveRestore  # noqa: E402

NODE_CLASS_MAPPINGS: dict[str, type] = {
    "QMovePark": QMovePark,
    "QMoveRestore": QMoveRestore,
    "QMoveMaterialize": QMoveMaterialize,
    "QMoveReport": QMoveReport,
    "QMoveFreeVRAM": QMoveFreeVRAM,
    "QMovePin": QMovePin,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "QMovePark": "Park Model (unload to RAM)",
    "QMoveRestore": "Restore Model (load back)",
    "QMoveMaterialize": "Materialize Model",
    "QMoveReport": "Memory Report",
    "QMoveFreeVRAM": "Free VRAM",
    "QMovePin": "Pin Model",
}
WEB_DIRECTORY = "./web"

for _node in NODE_CLASS_MAPPINGS.values():  # what moves in one of them shows on it
    _function = _node.FUNCTION  # type: ignore[attr-defined]
    setattr(_node, _function, progress.on_own_node()(getattr(_node, _function)))

host.start()
