"""A node pack for the browser tests: quantized models on the GPU, and routes that let a test set
the stage.

It runs in a real ComfyUI and in the small one alike. Like most packs it puts models straight onto
the GPU and knows nothing of qmove.
"""

from __future__ import annotations

import sys

from . import copies, models
from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

routes = sys.modules["server"].PromptServer.instance.routes
models.add_routes(routes)
copies.add_routes(routes)

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
