"""Ray Serve: models that wait in RAM behind the set that Ray keeps loaded.

    from qmove_core.serving import ray_serve

    app = ray_serve.application(loaders, answer, vram=20 << 30, replicas=2)
    serve.run(app)          # or: serve run my_file:app

Ray's multiplexing keeps `max_num_models_per_replica` models and drops the one used longest ago.
What it keeps here are handles (`handles.py`): so that number is the set in VRAM, and the RAM of the
pool holds the larger set behind it. The router sends a request to a replica that has its model.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from ..base_errors import MissingDependency
from ..memory.limits import total_ram
from ..parking.stats import stats
from ..pool import ModelPool
from ..settings import configure
from .handles import figures_of
from .replica import Replica

Loaders = Mapping[str, Callable[[], Any]]
SECONDS_TO_WAKE = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0]
GAUGES = {
    "models_in_vram": "Models in VRAM",
    "models_in_ram": "Models parked in RAM",
    "models_on_disk": "Models parked on disk",
    "bytes_in_vram": "Bytes of VRAM that models take",
    "bytes_in_ram": "Bytes of RAM that models take",
    "waiting": "Requests that wait for room",
}
COUNTERS = {
    "hits": "Uses whose loader did not run",
    "loads": "Loaders that ran",
    "seconds_saved": "Seconds that loaders did not take",
}


def serve() -> Any:
    """The module `ray.serve`.

    Raises:
        MissingDependency: it is not installed.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingDependency(
            "Ray Serve, which this needs, is not installed: pip install 'qmove[ray]'"
        ) from error
    return serve


class Metrics:
    """The figures of a replica as metrics of Ray, `qmove_...`: gauges, counters, and a histogram of
    the seconds that models took to come home."""

    def __init__(self) -> None:
        serve()
        from ray.util import metrics

        self._gauges = {k: metrics.Gauge(f"qmove_{k}", description=GAUGES[k]) for k in GAUGES}
        self._counters = {
            k: metrics.Counter(f"qmove_{k}", description=COUNTERS[k]) for k in COUNTERS
        }
        self._counted = dict.fromkeys(COUNTERS, 0.0)
        self._to_wake = metrics.Histogram(
            "qmove_seconds_to_wake",
            description="Seconds until a model came home from RAM or disk",
            boundaries=SECONDS_TO_WAKE,
            tag_keys=("model",),
        )

    def note_wake(self, name: str, seconds: float) -> None:
        self._to_wake.observe(seconds, tags={"model": name})

    def update(self, pool: ModelPool) -> None:
        """Sets them to what holds now."""
        figures = figures_of(pool)
        for name, gauge in self._gauges.items():
            gauge.set(figures[name])
        for name, counter in self._counters.items():
            more = figures[name] - self._counted[name]
            if more > 0:
                counter.inc(more)
                self._counted[name] = figures[name]


class Models:
    """One replica: a pool, and Ray's multiplexing in front of it. `application` makes a deployment
    of it; its methods are called by `Front`."""

    def __init__(
        self,
        loaders: Loaders | Callable[[], Loaders],
        answer: Callable[[Any, Any], Any],
        options: Mapping[str, Any],
    ) -> None:
        known = loaders() if callable(loaders) else loaders
        options = dict(options)
        timeout, disk_folder = options.pop("timeout"), options.pop("disk_folder")
        holds_vram = options.pop("holds_vram")
        if disk_folder is not None:
            configure(disk_folder=disk_folder)
        self._answer, self._metrics = answer, Metrics()
        pool = ModelPool(**options)
        for name, loader in known.items():
            pool.add(name, loader)
        self.replica = Replica(
            pool, timeout=timeout, on_wake=self._metrics.note_wake, holds_vram=holds_vram
        )

    async def handle(self, name: str) -> Any:
        """What Ray's multiplexing calls, and keeps."""
        return await self.replica.handle(name)

    async def answer(self, name: str, request: Any) -> Any:
        if name not in self.replica.pool.names():
            raise KeyError(name)
        handle = await self.handle(name)
        try:
            return await self.replica.answer(handle, self._answer, request)
        finally:
            self._metrics.update(self.replica.pool)

    async def sleep(self, timeout: float | None = None) -> int:
        return await self.replica.sleep(timeout)

    async def wake_up(self) -> None:
        await self.replica.wake_up()

    def is_sleeping(self) -> bool:
        return self.replica.is_sleeping

    def figures(self) -> dict[str, Any]:
        self._metrics.update(self.replica.pool)
        held = stats()
        copies = {"ram_copies": held.mirror_bytes + held.spare_bytes, "ram": total_ram()}
        where = {"replica": _replica_id(), "pid": os.getpid()}
        return self.replica.figures() | copies | where

    def check_health(self) -> None:
        """Asked by Ray; a replica that raises is replaced."""
        self._metrics.update(self.replica.pool)


class Front:
    """What answers HTTP: finds the replica that has the model, and speaks to all of them for sleep
    and figures.

    - `POST /models/{name}`, or `POST /` with the header `serve_multiplexed_model_id`: an answer
    - `POST /sleep`, `POST /wake_up`, `GET /is_sleeping`: all replicas
    - `GET /models`: the figures of each replica; `GET /health`
    """

    def __init__(self, models: Any, tries: int) -> None:
        self._models, self._tries = models, tries

    async def __call__(self, request: Any) -> Any:
        from starlette.responses import JSONResponse

        path = request.url.path.rstrip("/")
        calls: dict[tuple[str, str], Callable[[], Any]] = {
            ("GET", "/health"): self._health,
            ("GET", "/models"): self._figures,
            ("POST", "/sleep"): lambda: self._sleep(request),
            ("POST", "/wake_up"): self._wake_up,
            ("POST", "/wakeup"): self._wake_up,
            ("GET", "/is_sleeping"): self._is_sleeping,
        }
        call = calls.get((request.method, path))
        if call is not None:
            status, content = await call()
        elif request.method == "POST" and (path == "" or path.startswith("/models/")):
            given = request.headers.get("serve_multiplexed_model_id", "")
            status, content = await self._ask(path[len("/models/") :] or given, request)
        else:
            status, content = 404, {"error": f"There is no {request.method} {path or '/'}."}
        return JSONResponse(content, status_code=status)

    async def _ask(self, name: str, request: Any) -> tuple[int, Any]:
        if not name:
            return 400, {"error": "Name a model: POST /models/{name}."}
        try:
            body = await request.json() if await request.body() else None
        except ValueError as error:
            return 400, {"error": f"The body is not JSON: {error}."}
        return await self.ask(name, body)

    async def ask(self, name: str, body: Any) -> tuple[int, Any]:
        """An answer with its HTTP status. A replica that dies is replaced by Ray; the request that
        it had goes to another one."""
        from ray.exceptions import RayActorError, RayTaskError

        for left in reversed(range(self._tries)):
            try:
                handle = self._models.options(multiplexed_model_id=name)
                return 200, {"model": name, "answer": await handle.answer.remote(name, body)}
            except RayActorError as error:
                if not left:
                    return 503, {"error": f"The replica has died: {str(error).splitlines()[0]}"}
            except RayTaskError as error:
                cause: Any = error.cause
                if isinstance(cause, KeyError):
                    return 404, {"error": f"There is no model {name!r}."}
                return 503 if _is_busy(cause) else 500, {"error": str(cause)}
        raise AssertionError("unreachable")

    async def _all(self, method: str, *arguments: Any) -> list[Any]:
        return list(await self._models.broadcast(method, *arguments).results_async())

    async def _health(self) -> tuple[int, Any]:
        return 200, {"replicas": len(await self._all("is_sleeping"))}

    async def _figures(self) -> tuple[int, Any]:
        return 200, {"replicas": await self._all("figures")}

    async def _sleep(self, request: Any) -> tuple[int, Any]:
        from ray.exceptions import RayTaskError

        try:
            timeout = float(request.query_params.get("timeout", 60))
        except ValueError:
            return 400, {"error": "timeout is a number of seconds."}
        try:
            return 200, {"freed": sum(await self._all("sleep", timeout))}
        except RayTaskError as error:
            return 409, {"error": str(error.cause)}

    async def _wake_up(self) -> tuple[int, Any]:
        await self._all("wake_up")
        return 200, {"is_sleeping": False}

    async def _is_sleeping(self) -> tuple[int, Any]:
        return 200, {"is_sleeping": any(await self._all("is_sleeping"))}


def _is_busy(error: BaseException | None) -> bool:
    from ..errors import NotEnoughMemory, QMoveError

    return isinstance(error, NotEnoughMemory) or (
        isinstance(error, QMoveError) and str(error).startswith("Cannot use")
    )


def _replica_id() -> str:
    context = serve().get_replica_context()
    return str(context.replica_id.unique_id)


def application(
    loaders: Loaders | Callable[[], Loaders],
    answer: Callable[[Any, Any], Any],
    *,
    vram: Any = None,
    ram: Any = None,
    device: str | None = None,
    disk_folder: str | None = None,
    models_in_vram: int = 1,
    models_loaded: int | None = None,
    replicas: int = 1,
    timeout: float | None = 60.0,
    tries: int = 3,
    ray_actor_options: Mapping[str, Any] | None = None,
) -> Any:
    """An application for `serve.run`: models by name behind HTTP, on several replicas.

    Args:
        loaders: a loader for each model by its name; or a function that gives them, called in each
            replica, which keeps heavy imports there.
        answer: called as `answer(model, request)` in a thread; what it returns must be JSON.
        vram, ram, device: as for `ModelPool`, for each replica. Replicas that share a machine share
            its RAM: give each its part.
        disk_folder: where each replica parks what its RAM has no room for, on a disk of its own
            machine.
        models_in_vram: how many models Ray holds in each replica, and the router looks for. They
            stay in VRAM meanwhile, so they must fit into `vram`.
        models_loaded: instead of that how many models Ray holds in VRAM and RAM together, so that
            the router looks for a replica that has the model in either; the pool decides which are
            in VRAM. It pays from some tens of models on (docs/serving.md).
        replicas: how many there are; a larger number is all that a cluster takes.
        timeout: seconds that a request waits for room.
        tries: how often a request is sent whose replica dies while it runs.
        ray_actor_options: of each replica; `{"num_gpus": 1}` gives each a GPU of its own.

    Raises:
        MissingDependency: Ray Serve is not installed.
    """
    ray_serve = serve()
    held = models_in_vram if models_loaded is None else models_loaded

    class Multiplexed(Models):
        @ray_serve.multiplexed(max_num_models_per_replica=held)  # type: ignore[misc]
        async def handle(self, name: str) -> Any:
            return await self.replica.handle(name)

    options = {
        "vram": vram,
        "ram": ram,
        "device": device,
        "timeout": timeout,
        "disk_folder": disk_folder,
        "holds_vram": models_loaded is None,
    }
    models = ray_serve.deployment(
        Multiplexed,
        name="Models",
        num_replicas=replicas,
        ray_actor_options=dict(ray_actor_options or {}),
    ).bind(loaders, answer, options)
    front = ray_serve.deployment(Front, name="Front", ray_actor_options={"num_cpus": 0})
    return front.bind(models, tries)
