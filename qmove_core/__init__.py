"""qmove: big quantized models leave the GPU for CPU RAM and come back bit for bit."""

from .errors import (
    CannotMove,
    DtypeCastRefused,
    LiveAutogradGraph,
    MetaTensorsPresent,
    MissingDependency,
    NotEnoughMemory,
    NoTensors,
    QMoveError,
    UnknownDevice,
)
from .inventory import Holding, Inventory, MetaTensor, inventory
from .parking import Moved, Parked, Restored, is_parked, move, park, parked, parked_models, resident, restore
from .settings import configure
from .statistics import Stats, stats
from .strangers import Straggler

__all__ = [
    "CannotMove",
    "DtypeCastRefused",
    "Holding",
    "Inventory",
    "LiveAutogradGraph",
    "MetaTensor",
    "MetaTensorsPresent",
    "MissingDependency",
    "Moved",
    "NoTensors",
    "NotEnoughMemory",
    "Parked",
    "QMoveError",
    "Restored",
    "Stats",
    "Straggler",
    "UnknownDevice",
    "configure",
    "inventory",
    "is_parked",
    "move",
    "park",
    "parked",
    "parked_models",
    "resident",
    "restore",
    "stats",
]
