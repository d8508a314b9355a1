"""Ray Serve as a test needs it: the example's models behind plain multiplexing, and requests over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

PORT = 8173


class Plain:
    """Ray's multiplexing alone: what is dropped is loaded again. `deployment` decorates it."""

    async def load(self, name: str) -> Any:
        from examples import ray_serve

        return ray_serve.load(name)

    async def __call__(self, request: Any) -> Any:
        from ray import serve
        from starlette.responses import JSONResponse

        from examples import ray_serve

        name = serve.get_multiplexed_model_id()
        model = await self.load(name)
        content = {"model": name, "answer": ray_serve.answer(model, await request.json())}
        return JSONResponse(content)


def plain_application(replicas: int, options: dict[str, Any]) -> Any:
    from ray import serve

    class Multiplexed(Plain):
        @serve.multiplexed(max_num_models_per_replica=1)
        async def load(self, name: str) -> Any:
            return await Plain.load(self, name)

    deployment = serve.deployment(
        Multiplexed, name="Plain", num_replicas=replicas, ray_actor_options=options
    )
    return deployment.bind()


def ask(method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """The status and the JSON of one request."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}{path}",
        method=method,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **headers},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def reads(folder: Path) -> Counter[tuple[int, str]]:
    """How often each process has read each checkpoint."""
    lines = (folder / "reads.txt").read_text().splitlines()
    return Counter((int(pid), name) for pid, name in (line.split() for line in lines))
