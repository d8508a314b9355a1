"""The ComfyUI pack: on a fake host, and on a real ComfyUI where COMFYUI_DIR names a checkout."""
