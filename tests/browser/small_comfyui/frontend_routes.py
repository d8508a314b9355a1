"""What the frontend asks a ComfyUI for.

A path that is not here answers 404, which the tests see in the page's console.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import torch
from aiohttp import web

from .prompts import ServedHost
from .server import FEATURES, Server

VERSION = "0.33.0"  # which ComfyUI this one says it is
LOCALE_PARTS = ("nodeDefs", "commands", "settings")
EMPTY: dict[str, Any] = {  # what a ComfyUI without models, past jobs and the like answers
    "/embeddings": [],
    "/models": [],
    "/experiment/models": [],
    "/global_subgraphs": {},
    "/node_replacements": {},
    "/customnode/getmappings": {},
    "/features": FEATURES,
    "/internal/folder_paths": {},
    "/internal/logs": "",
    "/jobs": {"jobs": [], "pagination": {"offset": 0, "limit": 200, "total": 0, "has_more": False}},
}
# As ComfyUI says it where nothing is to be fetched from elsewhere (--disable-api-nodes).
ONLY_FROM_HERE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self' data:; frame-src 'self'; object-src 'self';"
)


@dataclass(frozen=True)
class Pack:
    name: str
    folder: Path
    web: Path | None
    display_names: Mapping[str, str]


class FrontendRoutes:
    def __init__(
        self, server: Server, host: ServedHost, packs: list[Pack], frontend: Path, user: Path
    ) -> None:
        self._server, self._host, self._packs, self._frontend = server, host, packs, frontend
        self._user = user
        self._settings = user / "comfy.settings.json"

    @web.middleware
    async def no_cache_and_no_other_host(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        answer = await handler(request)
        if not answer.prepared:
            hashed = request.path.startswith("/assets/")  # their names change with their content
            answer.headers["Cache-Control"] = (
                "public, max-age=86400, immutable" if hashed else "no-cache"
            )
            answer.headers["Content-Security-Policy"] = ONLY_FROM_HERE
        return answer

    def add_to(self, application: web.Application) -> None:
        get: dict[str, Callable[[web.Request], Any]] = {
            "/users": lambda request: {"storage": "server", "migrated": True},
            "/settings": lambda request: self._stored(),
            "/settings/{id}": lambda request: self._stored().get(request.match_info["id"]),
            "/extensions": lambda request: self._extensions(),
            "/object_info": lambda request: self._nodes(),
            "/object_info/{node}": lambda request: {
                request.match_info["node"]: self._nodes()[request.match_info["node"]]
            },
            "/i18n": lambda request: self._translations(),
            "/workflow_templates": lambda request: {
                pack.name: names
                for pack in self._packs
                if (names := [f.stem for f in _workflows(pack)])
            },
            "/system_stats": lambda request: self._system(),
            "/prompt": lambda request: {
                "exec_info": {"queue_remaining": self._host.queue.remaining()}
            },
            "/queue": lambda request: {
                "queue_running": list(self._host.queue.currently_running.values()),
                "queue_pending": [],
            },
            "/history": lambda request: self._host.queue.history,
            "/history/{id}": lambda request: {
                key: value
                for key, value in self._host.queue.history.items()
                if key == request.match_info["id"]
            },
            "/userdata": lambda request: self._userdata(request.query["dir"]),
        }
        for path, value in EMPTY.items():
            get[path] = lambda request, value=value: value
        for path, answer in get.items():
            _add(application, "GET", path, _json(answer))
        for path, change in {
            "/settings": self._store_all,
            "/settings/{id}": self._store_one,
            "/prompt": self._prompt,
            "/interrupt": self._interrupt,
            "/free": self._free,
            "/queue": _nothing,
            "/history": _nothing,
        }.items():
            _add(application, "POST", path, change)
        _add(application, "GET", "/userdata/{file:.+}", self._read_userdata)
        _add(application, "POST", "/userdata/{file:.+}", self._write_userdata)
        application.router.add_get("/", self._index)
        for pack in self._packs:
            if pack.web is not None:
                application.router.add_static(f"/extensions/{pack.name}", pack.web)
            if _workflows(pack):
                application.router.add_static(
                    f"/api/workflow_templates/{pack.name}", pack.folder / "example_workflows"
                )
        application.router.add_static("/", self._frontend)

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(self._frontend / "index.html")

    def _extensions(self) -> list[str]:
        """Every script below the frontend's and the packs' folders: the frontend imports each of
        them."""
        own = sorted((self._frontend / "extensions").rglob("*.js"))
        paths = [f"/{file.relative_to(self._frontend).as_posix()}" for file in own]
        for pack in self._packs:
            files = sorted(pack.web.rglob("*.js")) if pack.web is not None else []
            paths += [
                f"/extensions/{quote(pack.name)}/{f.relative_to(pack.web).as_posix()}"
                for f in files
            ]  # type: ignore[arg-type]
        return paths

    def _nodes(self) -> dict[str, Any]:
        names = {node: name for pack in self._packs for node, name in pack.display_names.items()}
        return {
            node: _node_info(node, names.get(node, node), cls)
            for node, cls in self._host.classes.items()
        }

    def _translations(self) -> dict[str, Any]:
        """By language; main.json lies at the top, the other files under their names."""
        result: dict[str, dict[str, Any]] = {}
        for pack in self._packs:
            for folder in sorted((pack.folder / "locales").glob("*/")):
                language = result.setdefault(folder.name, {})
                _merge(language, _read(folder / "main.json"))
                for part in LOCALE_PARTS:
                    _merge(language, {part: _read(folder / f"{part}.json")})
        return result

    def _system(self) -> dict[str, Any]:
        memory = psutil.virtual_memory()
        devices = [torch.cuda.mem_get_info(index) for index in range(torch.cuda.device_count())]
        return {
            "system": {
                "os": sys.platform, "ram_total": memory.total, "ram_free": memory.available, "comfyui_version": VERSION,
                "python_version": sys.version, "pytorch_version": torch.__version__, "embedded_python": False,
                "argv": ["main.py"], "required_frontend_version": None, "installed_templates_version": None,
                "required_templates_version": None,
            },
            "devices": [
                {
                    "name": f"cuda:{index} simulated", "type": "cuda", "index": index, "vram_total": total,
                    "vram_free": free, "torch_vram_total": total - free, "torch_vram_free": 0,
                }
                for index, (free, total) in enumerate(devices)
            ],
        }  # fmt: skip

    def _stored(self) -> dict[str, Any]:
        return _read(self._settings)

    def _store(self, changes: Mapping[str, Any]) -> web.Response:
        self._settings.write_text(json.dumps(self._stored() | changes), encoding="utf-8")
        return web.Response()

    async def _store_all(self, request: web.Request) -> web.Response:
        return self._store(await request.json())

    async def _store_one(self, request: web.Request) -> web.Response:
        return self._store({request.match_info["id"]: await request.json()})

    def _userdata(self, folder: str) -> list[Any]:
        root = self._user / folder
        return [
            {
                "path": file.relative_to(root).as_posix(), "size": file.stat().st_size,
                "modified": file.stat().st_mtime, "created": file.stat().st_ctime,
            }
            for file in sorted(root.rglob("*")) if file.is_file()
        ]  # fmt: skip

    async def _read_userdata(self, request: web.Request) -> web.StreamResponse:
        file = self._user / request.match_info["file"]
        return web.FileResponse(file) if file.is_file() else web.Response(status=404)

    async def _write_userdata(self, request: web.Request) -> web.Response:
        file = self._user / request.match_info["file"]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(await request.read())
        info = {
            "path": request.match_info["file"],
            "size": file.stat().st_size,
            "modified": file.stat().st_mtime,
        }
        return web.json_response(info)

    async def _prompt(self, request: web.Request) -> web.Response:
        body = await request.json()
        unknown = sorted(
            {n["class_type"] for n in body["prompt"].values()} - self._host.classes.keys()
        )
        if unknown:
            error = {
                "type": "invalid_prompt",
                "message": f"unknown nodes: {unknown}",
                "details": "",
                "extra_info": {},
            }
            return web.json_response({"error": error, "node_errors": {}}, status=400)
        prompt_id = self._host.queue.put(
            body["prompt"],
            body.get("client_id"),
            body.get("prompt_id"),
            body.get("extra_data", {}),
        )
        return web.json_response({"prompt_id": prompt_id, "number": 0, "node_errors": {}})

    async def _interrupt(self, request: web.Request) -> web.Response:
        self._host.management.interrupt_current_processing()
        return web.Response()

    async def _free(self, request: web.Request) -> web.Response:
        self._host.management.unload_all_models()
        return web.Response()


def _add(application: web.Application, method: str, path: str, handler: Any) -> None:
    for prefix in ("", "/api"):
        application.router.add_route(method, prefix + path, handler)


def _json(answer: Callable[[web.Request], Any]) -> Any:
    async def handler(request: web.Request) -> web.Response:
        return web.json_response(answer(request))

    return handler


async def _nothing(request: web.Request) -> web.Response:
    return web.Response()


def _workflows(pack: Pack) -> list[Path]:
    return sorted((pack.folder / "example_workflows").glob("*.json"))


def _node_info(node: str, display_name: str, cls: Any) -> dict[str, Any]:
    inputs, outputs = cls.INPUT_TYPES(), cls.RETURN_TYPES
    return {
        "input": inputs,
        "input_order": {kind: list(names) for kind, names in inputs.items()},
        "output": outputs,
        "output_is_list": getattr(cls, "OUTPUT_IS_LIST", [False] * len(outputs)),
        "output_name": getattr(cls, "RETURN_NAMES", outputs),
        "name": node,
        "display_name": display_name,
        "description": getattr(cls, "DESCRIPTION", ""),
        "python_module": cls.RELATIVE_PYTHON_MODULE,
        "category": getattr(cls, "CATEGORY", "sd"),
        "output_node": getattr(cls, "OUTPUT_NODE", False),
        "search_aliases": getattr(cls, "SEARCH_ALIASES", []),
    }


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _merge(into: dict[str, Any], new: Mapping[str, Any]) -> None:
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
