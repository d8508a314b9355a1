"""A server that the real frontend takes for ComfyUI: `python -m simcuda -m browser.small_comfyui
--help`.

What the frontend needs of ComfyUI is written here from what it asks for; model management and the
execution of prompts are those of `tests.nodes.builders.fake_host`. qmove itself is the real pack,
loaded from its folder as ComfyUI loads packs: its nodes, its routes and the moves behind them are
the ones that users get, over a simulated GPU.
"""
