"""Starts the server: the fake host first, then the packs, which hook into it, then HTTP."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType

from aiohttp import web

from .core_nodes import CORE_NODES
from .frontend_routes import FrontendRoutes, Pack
from .prompts import ServedHost
from .server import Server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--frontend",
        type=Path,
        required=True,
        help="the static folder of a comfyui-frontend-package",
    )
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="with custom_nodes/ and user/, as ComfyUI has them",
    )
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(options.frontend, options.folder, options.port))


async def _serve(frontend: Path, folder: Path, port: int) -> None:
    server = Server(asyncio.get_running_loop())
    host = ServedHost(server)
    host.add(*CORE_NODES, pack="nodes")
    sys.modules.update(host.modules())
    sys.modules["nodes"].NODE_DISPLAY_NAME_MAPPINGS = {}  # type: ignore[attr-defined]
    sys.modules["folder_paths"] = _folder_paths(folder)
    packs = [_load_pack(path, host) for path in sorted((folder / "custom_nodes").iterdir())]
    routes = FrontendRoutes(server, host, packs, frontend, folder / "user" / "default")
    application = web.Application(middlewares=[routes.no_cache_and_no_other_host])
    server.add_to(application)
    routes.add_to(application)
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await asyncio.Event().wait()


def _folder_paths(folder: Path) -> ModuleType:
    module = ModuleType("folder_paths")
    module.__dict__.update(
        get_user_directory=lambda: str(folder / "user"),
        get_output_directory=lambda: str(folder / "output"),
        get_temp_directory=lambda: str(folder / "temp"),
    )
    return module


def _load_pack(path: Path, host: ServedHost) -> Pack:
    """Imports a pack by its folder, under a name that no import statement could give, as ComfyUI
    does."""
    name = str(path).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(
        name, path / "__init__.py", submodule_search_locations=[str(path)]
    )
    assert spec is not None and spec.loader is not None, f"{path} is no node pack"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    for node, cls in module.NODE_CLASS_MAPPINGS.items():
        cls.RELATIVE_PYTHON_MODULE = f"custom_nodes.{path.name}"
        host.classes[node] = cls
    display_names: dict[str, str] = getattr(module, "NODE_DISPLAY_NAME_MAPPINGS", {})
    sys.modules["nodes"].NODE_DISPLAY_NAME_MAPPINGS.update(display_names)  # type: ignore[attr-defined]
    web_directory = getattr(module, "WEB_DIRECTORY", None)
    return Pack(
        path.name,
        path,
        (path / web_directory).resolve() if web_directory else None,
        display_names,
    )


if __name__ == "__main__":
    main()
