"""Models that stay loaded within budgets of VRAM and RAM: see README.md."""

from .leases import Lease
from .model_pool import ModelPool
from .states import State

__all__ = ["Lease", "ModelPool", "State"]
