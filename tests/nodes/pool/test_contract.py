"""The stand-in of ComfyUI's provider API has the names and signatures of a real one."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.nodes.builders import fake_cache_provider as fake
from tests.nodes.builders.real_prompts import COMFYUI_DIR

SOURCE = Path(COMFYUI_DIR or ".") / "comfy_api" / "latest" / "_caching.py"
NAMES = (
    "CacheContext",
    "CacheValue",
    "CacheProvider",
    "register_cache_provider",
    "unregister_cache_provider",
)


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Any:
    if COMFYUI_DIR is None or not SOURCE.exists():
        pytest.skip("needs a ComfyUI with cache providers: name a checkout in COMFYUI_DIR")
    before = dict(sys.modules)
    monkeypatch.syspath_prepend(COMFYUI_DIR)
    # Its package would import all of ComfyUI.
    spec = importlib.util.spec_from_file_location("comfy_api.latest._caching", SOURCE)
    assert spec is not None and spec.loader is not None
    types = importlib.util.module_from_spec(spec)
    for name in ("comfy_api", "comfy_api.latest"):
        package = type(sys)(name)
        package.__path__ = []
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "comfy_api.latest._caching", types)
    spec.loader.exec_module(types)
    yield importlib.import_module("comfy_execution.cache_provider")
    for name in [
        n for n in sys.modules if n.partition(".")[0] == "comfy_execution" and n not in before
    ]:
        del sys.modules[name]


def test_names_and_fields_are_the_same(real: Any) -> None:
    stand_in = fake.Providers({}).module()
    assert [name for name in NAMES if not hasattr(real, name)] == []
    assert [name for name in NAMES if not hasattr(stand_in, name)] == []
    for name in ("CacheContext", "CacheValue"):
        fields = [
            [(f.name, f.default) for f in dataclasses.fields(getattr(module, name))]
            for module in (real, stand_in)
        ]
        assert fields[0] == fields[1]


def test_the_methods_of_a_provider_are_the_same(real: Any) -> None:
    def methods(provider: Any) -> dict[str, tuple[bool, bool, list[tuple[str, Any]]]]:
        return {
            name: (
                inspect.iscoroutinefunction(method),
                getattr(method, "__isabstractmethod__", False),
                [(p.name, p.default) for p in inspect.signature(method).parameters.values()],
            )
            for name, method in inspect.getmembers(provider, inspect.isfunction)
            if not name.startswith("_")
        }

    assert methods(real.CacheProvider) == methods(fake.CacheProvider)
