"""The pack, imported as ComfyUI imports it, and the hosts it is tested in."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMFYUI_DIR = os.environ.get("COMFYUI_DIR")
REAL_MODULES = ("comfy", "comfy_execution", "nodes", "execution", "server", "folder_paths")


def load_pack(name: str = "qmove_pack") -> ModuleType:
    """Imports the pack from its folder under a name of the host's choice, as the host does."""
    spec = importlib.util.spec_from_file_location(
        name, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


load_pack()

from qmove_pack.nodes.host import guard, hooks, listen_to_core, settings  # noqa: E402
from qmove_pack.nodes.host.models import adopted, finding  # noqa: E402
from qmove_pack.nodes.host.pool import provider  # noqa: E402
from qmove_pack.nodes.host.pool.keeping import pool  # noqa: E402
from qmove_pack.nodes.host.stages import executor, needs  # noqa: E402

from tests.nodes.builders.fake_host import FakeHost  # noqa: E402
from tests.nodes.builders.guarded import Guarded  # noqa: E402


class RealHost:
    """The modules of the checkout that COMFYUI_DIR names, in this process."""

    def __init__(self, modules: dict[str, ModuleType]) -> None:
        self._modules = modules
        self.management: Any = modules["comfy.model_management"]
        self.list_class = modules["comfy_execution.graph"].ExecutionList  # type: ignore[attr-defined]

    def modules(self) -> dict[str, ModuleType]:
        return self._modules


@pytest.fixture(scope="session")
def real_modules() -> dict[str, ModuleType]:
    if COMFYUI_DIR is None:
        pytest.skip("needs a ComfyUI: name a checkout in COMFYUI_DIR")
    before = dict(sys.modules)
    sys.path[:0] = [COMFYUI_DIR, str(Path(__file__).parent / "builders" / "standins")]
    arguments, sys.argv = sys.argv, ["main.py"]
    try:
        for name in (
            "comfy.model_management",
            "comfy.model_patcher",
            "comfy_execution.graph",
            "comfy.utils",
        ):
            importlib.import_module(name)
        return {
            name: module
            for name, module in sys.modules.items()
            if name.partition(".")[0] in REAL_MODULES
        }
    finally:
        sys.argv = arguments
        del sys.path[:2]
        for name in [
            name
            for name in sys.modules
            if name.partition(".")[0] in REAL_MODULES and name not in before
        ]:
            del sys.modules[name]


def enter(host: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the host the one of this process for one test."""
    for name, module in host.modules().items():
        monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture(params=["fake", "fake 0.3.64", "real"])
def any_host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Each host in turn: what holds in all of them is the contract."""
    if request.param == "real":
        host: Any = RealHost(request.getfixturevalue("real_modules"))
    else:
        host = FakeHost(old=request.param == "fake 0.3.64")
    enter(host, monkeypatch)
    yield host
    host.management.current_loaded_models.clear()


@pytest.fixture(params=["new", "0.3.64"])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    """A fake host with qmove hooked in, in the shapes of new and of old versions."""
    fake = FakeHost(old=request.param == "0.3.64")
    enter(fake, monkeypatch)
    yield from _hooked_in(fake)


@pytest.fixture
def forgetful_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    """A host that keeps no outputs between prompts (--cache-none)."""
    fake = FakeHost(keeps_outputs=False)
    enter(fake, monkeypatch)
    yield from _hooked_in(fake)


@pytest.fixture
def pool_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHost]:
    """A host whose models stay loaded when their workflow is left."""
    fake = FakeHost()
    enter(fake, monkeypatch)
    monkeypatch.setattr(adopted, "_keeper", None)
    finding.forget_all()
    assert provider.install()
    yield from _hooked_in(fake)
    pool.forget_all()


def _hooked_in(fake: FakeHost) -> Iterator[FakeHost]:
    assert executor.install()
    listen_to_core()
    yield fake
    hooks.unwrap_all()
    fake.cache.entries.clear()


@pytest.fixture(autouse=True)
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Fails a test in which a guard has caught an exception, unless the test expects that failure."""
    monkeypatch.setattr(guard, "_logged", set())
    caught = Guarded()
    logging.getLogger("qmove").addHandler(caught)
    yield caught
    logging.getLogger("qmove").removeHandler(caught)
    caught.check()


@pytest.fixture(autouse=True)
def _nothing_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "learned", needs.Needs())


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    settings.change(settings.DEFAULTS)
    yield
    settings.change(settings.DEFAULTS)
    gc.collect()
    torch.cuda.empty_cache()
