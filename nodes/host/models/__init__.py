"""Models that other packs loaded, as entries of ComfyUI's model management."""
