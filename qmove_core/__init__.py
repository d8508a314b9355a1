"""qmove: big quantized models leave the GPU for CPU RAM and come back bit for bit."""

import importlib
from typing import Any

# First: it says so where PyTorch is missing or too old.
from . import requirements as _requirements  # noqa: F401
from .errors import (
    CannotAttach,
    CannotMove,
    CannotWriteToDisk,
    CapturingGraph,
    ChangesNotKept,
    CorruptedCopy,
    DeviceLost,
    DtypeCastRefused,
    InUse,
    LiveAutogradGraph,
    MetaTensorsPresent,
    MissingDependency,
    NotEnoughMemory,
    NoTensors,
    OffloadedDataError,
    Pinned,
    QMoveError,
    UnknownDevice,
)
from .loading.from_pretrained import from_pretrained
from .materialize.materialize import materialize_meta_tensors
from .materialize.undo import materialized
from .memory.giving_back import trim
from .memory.mapped_files import MappedFileChanged
from .methods.dispatching import dispatch_model, redispatch
from .methods.to_method import disable_to, enable_to
from .model.holders import Straggler
from .model.holdings import Holding, Inventory, MetaTensor
from .model.inventory import inventory
from .parking.file_mirrors import CannotMirror, mirror_files
from .parking.requests import (
    Moved,
    Parked,
    Restored,
    attach,
    is_parked,
    move,
    park,
    parked_models,
    prefetch,
    prepare,
    restore,
)
from .parking.stats import Stats, stats
from .parking.staying import is_pinned, parked, pin, resident, unpin
from .parking.swapping import swap
from .requantize.requantize import dequantize_and_move, move_and_requantize
from .settings import configure

__all__ = [
    "CannotAttach",
    "CannotMirror",
    "CannotMove",
    "CannotWriteToDisk",
    "CapturingGraph",
    "ChangesNotKept",
    "CorruptedCopy",
    "DeviceLost",
    "DtypeCastRefused",
    "Holding",
    "InUse",
    "Inventory",
    "LiveAutogradGraph",
    "MappedFileChanged",
    "MetaTensor",
    "MetaTensorsPresent",
    "MissingDependency",
    "Moved",
    "NoTensors",
    "NotEnoughMemory",
    "OffloadedDataError",
    "Parked",
    "Pinned",
    "QMoveError",
    "Restored",
    "Stats",
    "Straggler",
    "UnknownDevice",
    "attach",
    "configure",
    "dequantize_and_move",
    "disable_to",
    "dispatch_model",
    "enable_to",
    "from_pretrained",
    "inventory",
    "is_parked",
    "is_pinned",
    "materialize_meta_tensors",
    "materialized",
    "mirror_files",
    "move",
    "move_and_requantize",
    "park",
    "parked",
    "parked_models",
    "pin",
    "prefetch",
    "prepare",
    "redispatch",
    "resident",
    "restore",
    "stats",
    "swap",
    "trim",
    "unpin",
]


def __getattr__(name: str) -> Any:
    """What works with other libraries is imported when it is asked for."""
    if name in ("accelerate", "diffusers"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
