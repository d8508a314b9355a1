"""How ComfyUI asks the pool: through its own `CacheProvider`.

Its cache of outputs asks each provider where it has nothing itself: at the start of a prompt for
all nodes, and again before a node runs. What it stores it offers in `should_cache`; `on_store` runs
in a task that dies with the prompt, so nothing is left to that. With `--cache-none` nobody is
asked.
"""

from __future__ import annotations

import logging
from typing import Any

from qmove_core import for_hosts

from .. import comfy, settings
from ..guard import never_fails
from ..models import adopted
from .keeping import pool

log = logging.getLogger("qmove")

_installed: Any = None  # the module that has our provider


class Asked:
    """What ComfyUI calls; mixed into its `CacheProvider`, which has what newer versions add."""

    @never_fails("look for a model that stays loaded, or keep one", False)
    def should_cache(self, context: Any, value: Any = None) -> bool:
        if value is None:
            return pool.may_have(context.cache_key_hash)
        if not value.ui:  # what shows something is shown anew in each prompt
            pool.note_output(
                context.node_id, context.class_type, context.cache_key_hash, value.outputs
            )
        return False

    async def on_lookup(self, context: Any) -> Any:
        outputs = _give(context.node_id, context.cache_key_hash)
        module = comfy.cache_providers()
        return None if outputs is None or module is None else module.CacheValue(outputs=outputs)

    async def on_store(self, context: Any, value: Any) -> None:
        pass

    @never_fails("begin a prompt with what stays loaded", None)
    def on_prompt_start(self, prompt_id: str) -> None:
        pool.begin_prompt()

    @never_fails("end a prompt with what stays loaded", None)
    def on_prompt_end(self, prompt_id: str) -> None:
        pool.end_prompt()


_NOTHING: list[Any] | None = None


@never_fails("give back a model that stays loaded", _NOTHING)
def _give(node_id: str, key: str) -> list[Any] | None:
    return pool.give(node_id, key)


def install() -> bool:
    """Registers the pool with ComfyUI, once. Returns whether ComfyUI asks it."""
    global _installed
    module = comfy.cache_providers()
    if module is None:
        log.info(
            "This ComfyUI asks no other caches (they do from 0.18.2 on): models of another "
            "workflow are loaded anew."
        )
        return False
    if comfy.keeps_no_outputs():
        log.info("With --cache-none ComfyUI asks no other caches: models are loaded in each run.")
        return False
    if _installed is not module:
        provider = type("QMovePool", (Asked, module.CacheProvider), {})
        module.register_cache_provider(provider())
        _installed = module
    adopted.set_keeper(pool)
    for_hosts.on_ram_shortage(give_up)
    settings.on_change(follow_settings)
    return True


def is_installed() -> bool:
    return _installed is not None and _installed is comfy.cache_providers()


@never_fails("let go of models where RAM is short", None)
def give_up(nbytes: int) -> None:
    pool.give_up(nbytes)


@never_fails("keep to the settings", None)
def follow_settings() -> None:
    pool.keep_to_settings()
