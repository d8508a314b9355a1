"""What tests ask a running ComfyUI: bytes over the links, and to drop what the nodes keep."""

import gc

from aiohttp import web
from server import PromptServer

import simcuda

from .hiding import forget


@PromptServer.instance.routes.get("/careless/counters")
async def counters(request):
    """By device: bytes copied in and out since the start, and allocated now."""
    import torch

    devices = [simcuda.counters(index) for index in range(torch.cuda.device_count())]
    return web.json_response([[d.h2d_bytes, d.d2h_bytes, d.allocated] for d in devices])


@PromptServer.instance.routes.post("/careless/forget")
async def drop(request):
    """Drops the models that the nodes keep; answers what is allocated then."""
    forget()
    gc.collect()
    return await counters(request)
