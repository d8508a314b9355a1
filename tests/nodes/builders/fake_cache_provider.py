"""`comfy_execution.cache_provider` of the fake host, and how its cache of outputs asks providers.

The names, signatures and moments are those of 0.18.2 to 0.33.0; `tests/nodes/pool/test_contract.py`
holds them against a real checkout.
"""

from __future__ import annotations

import asyncio
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from .fake_graph import Cache, is_link


@dataclass
class CacheContext:
    node_id: str
    class_type: str
    cache_key_hash: str


@dataclass
class CacheValue:
    outputs: list
    ui: dict | None = None


class CacheProvider(ABC):
    @abstractmethod
    async def on_lookup(self, context: CacheContext) -> CacheValue | None: ...

    @abstractmethod
    async def on_store(self, context: CacheContext, value: CacheValue) -> None: ...

    def should_cache(self, context: CacheContext, value: CacheValue | None = None) -> bool:
        return True

    def on_prompt_start(self, prompt_id: str) -> None:
        return None

    def on_prompt_end(self, prompt_id: str) -> None:
        return None


class Providers:
    """The registered ones, and a prompt's questions to them: on each miss, and at each store."""

    def __init__(self, classes: Mapping[str, type]) -> None:
        self._classes = classes
        self.registered: list[CacheProvider] = []
        self._prompt: Mapping[str, Any] = {}
        self._changed: dict[str, Any] = {}

    def module(self) -> ModuleType:
        module = ModuleType("comfy_execution.cache_provider")
        module.__dict__.update(
            CacheContext=CacheContext,
            CacheValue=CacheValue,
            CacheProvider=CacheProvider,
            register_cache_provider=self.register_cache_provider,
            unregister_cache_provider=self.unregister_cache_provider,
        )
        return module

    def register_cache_provider(self, provider: CacheProvider) -> None:
        if provider not in self.registered:
            self.registered.append(provider)

    def unregister_cache_provider(self, provider: CacheProvider) -> None:
        self.registered.remove(provider)

    def begin(self, prompt: Mapping[str, Any]) -> None:
        self._prompt, self._changed = prompt, {}
        for provider in self.registered:
            provider.on_prompt_start("prompt")

    def end(self) -> None:
        for provider in self.registered:
            provider.on_prompt_end("prompt")

    async def look_up(self, cache: Cache, node_id: str) -> None:
        """Puts what a provider gives for a node into the cache, if nothing is there."""
        context = self._context(node_id)
        if context is None or cache.get(node_id) is not None:
            return
        for provider in self.registered:
            if not provider.should_cache(context):
                continue
            value = await provider.on_lookup(context)
            if value is not None:
                assert isinstance(value, CacheValue) and isinstance(value.outputs, (list, tuple))
                cache.put(node_id, list(value.outputs))
                return

    def store(self, node_id: str, outputs: list[Any], ui: dict[str, Any] | None) -> None:
        context = self._context(node_id)
        for provider in self.registered if context is not None else ():
            value = CacheValue(outputs=outputs, ui=ui)
            if provider.should_cache(context, value):  # type: ignore[arg-type]
                # As in the real one it dies with the prompt, unless something waits before that.
                asyncio.get_running_loop().create_task(provider.on_store(context, value))  # type: ignore[arg-type]

    def signature(self, prompt: Mapping[str, Any], node_id: str) -> Any:
        """Equal for equal inputs, whatever the ids, except of nodes that depend on their own."""
        node = prompt[node_id]
        cls: Any = self._classes[node["class_type"]]
        own_id = (
            "UNIQUE_ID" in cls.INPUT_TYPES().get("hidden", {}).values()
            if hasattr(cls, "INPUT_TYPES")
            else False
        )
        own_id = own_id or getattr(cls, "NOT_IDEMPOTENT", False)
        parts = [
            (name, (self.signature(prompt, value[0]), value[1]) if is_link(value) else value)
            for name, value in sorted(node["inputs"].items())
        ]
        return (
            node["class_type"],
            self.is_changed(prompt, node_id),
            node_id if own_id else "",
            tuple(parts),
        )

    def is_changed(self, prompt: Mapping[str, Any], node_id: str) -> Any:
        """What IS_CHANGED says of a node's constant inputs, asked once in a prompt."""
        if prompt is not self._prompt:
            self._prompt, self._changed = prompt, {}
        if node_id not in self._changed:
            cls: Any = self._classes.get(prompt[node_id]["class_type"])
            inputs = {n: None if is_link(v) else v for n, v in prompt[node_id]["inputs"].items()}
            asked = getattr(cls, "IS_CHANGED", None)
            self._changed[node_id] = False if asked is None else asked(**inputs)
        return self._changed[node_id]

    def _context(self, node_id: str) -> CacheContext | None:
        if not self.registered or node_id not in self._prompt:  # a node that another expanded into
            return None
        signature = self.signature(self._prompt, node_id)
        if "nan" in repr(signature):
            return None
        digest = hashlib.sha256(repr(signature).encode()).hexdigest()
        return CacheContext(node_id, self._prompt[node_id]["class_type"], digest)
