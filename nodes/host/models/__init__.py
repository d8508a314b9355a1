"""The models that qmove knows: found on wires, registered with ComfyUI, brought home and parked."""
