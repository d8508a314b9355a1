"""How qmove speaks in ComfyUI's console: one line as it starts, and "[qmove]" before each line."""

from __future__ import annotations

import logging

import torch

from . import meter, settings

log = logging.getLogger("qmove")

PREFIX = "[qmove] "


class _Prefix(logging.Filter):
    """Puts the prefix before each line of a record, once."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not getattr(record, "has_qmove_prefix", False):
            lines = record.getMessage().split("\n")
            record.msg, record.args = "\n".join(PREFIX + line for line in lines), None
            record.has_qmove_prefix = True
        return True


_prefix = _Prefix()


def use_prefix() -> None:
    """From now on each line of qmove's log has the prefix; calling it twice changes nothing."""
    log.addFilter(_prefix)


def say_start(version: str | None) -> None:
    """Says that qmove is there, in one line."""
    where = ", ".join(map(_title, meter.devices())) or "no GPU found"
    parks = "auto-parking is on" if settings.auto_park() else "auto-parking is off"
    name = f"qmove {version}" if version else "qmove"
    log.info("%s: %s; %s. The VRAM tab in the sidebar shows more.", name, where, parks)


def _title(device: torch.device) -> str:
    module = torch.get_device_module(device)
    known = getattr(module, "get_device_name", None)
    return f"{known(device)} ({device})" if known is not None else str(device)
