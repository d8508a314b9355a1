"""A node waits until other programs have freed VRAM, with progress, or until it is interrupted."""

from __future__ import annotations

import logging
import time

import torch

import qmove_core as qmove
from qmove_core import for_hosts
from qmove_core.for_hosts import readable_bytes

from .. import meter, progress
from ..words import say
from . import job_queue

log = logging.getLogger("qmove")

SECONDS_BETWEEN_LOOKS = 0.5

NO_NVML = (
    "NVML does not answer for {device}, so that qmove cannot tell what other programs hold there: "
    "run `pip install nvidia-ml-py` in ComfyUI's environment (NVIDIA only)."
)


def wait_for_others(device: torch.device, nbytes: int) -> list[str]:
    """Waits until `nbytes` are free on a device for any program. What this process holds there
    should have left before.

    What others ask for while it waits (`job_queue`) need not wait for the node.

    Returns:
        Lines for people: what it waited for, or why it did not.

    Raises:
        MissingDependency: nobody can tell what is free there.
        InterruptProcessingException (ComfyUI's): the user has stopped the prompt.
    """
    memory = _memory(device)
    if memory is None:
        raise qmove.MissingDependency(NO_NVML.format(device=device))
    if memory.free >= nbytes:
        return []
    ours = meter.reserved_bytes(device)
    if memory.total - ours < nbytes:
        return [
            say(
                "Did not wait for {size} on {device}: it has {total} in all, and this process "
                "holds {ours} of them itself.",
                size=readable_bytes(nbytes),
                device=device,
                total=readable_bytes(memory.total),
                ours=readable_bytes(ours),
            )
        ]
    log.info("Waits until %s are free on %s.%s", readable_bytes(nbytes), device, _held_by(device))
    with job_queue.paused(), progress.shown("wait", str(device), 0, nbytes) as shown:
        while memory is not None and memory.free < nbytes:
            shown.report(memory.free, nbytes)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            memory = _memory(device)
        if memory is None:
            raise qmove.MissingDependency(NO_NVML.format(device=device))
        shown.report(nbytes, nbytes)
    waited = say(
        "Waited {seconds} s until other programs had freed VRAM of {device}.",
        seconds=f"{shown.seconds:.1f}",
        device=device,
    )
    return [waited] if for_hosts.memory_of_card(device) else [waited, NO_NVML.format(device=device)]


def _memory(device: torch.device) -> for_hosts.Memory | None:
    """What all programs leave free: of NVML, else of the driver through PyTorch."""
    return for_hosts.memory_of_card(device) or for_hosts.memory_without_context(device)


def _held_by(device: torch.device) -> str:
    if for_hosts.memory_of_card(device) is None:
        return " " + NO_NVML.format(device=device)
    others = for_hosts.other_processes(device)
    held = [f"{other.title} holds {readable_bytes(other.nbytes)}" for other in others]
    return f" {for_hosts.first_of(held)}." if held else ""
