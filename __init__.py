"""ComfyUI's entry to qmove: the nodes, the templates' stand-ins, and the frontend's folder."""

from . import nodes, stand_ins
from .nodes import WEB_DIRECTORY

NODE_CLASS_MAPPINGS = {**nodes.NODE_CLASS_MAPPINGS, **stand_ins.NODE_CLASS_MAPPINGS}
NODE_DISPLAY_NAME_MAPPINGS = {
    **nodes.NODE_DISPLAY_NAME_MAPPINGS,
    **stand_ins.NODE_DISPLAY_NAME_MAPPINGS,
}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
