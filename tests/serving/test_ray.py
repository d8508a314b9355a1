"""A real Ray Serve on this machine, over a simulated GPU in each replica: `make test-ray`.

Six int8 models over two replicas with room for one each. What it counts goes to the file that
QMOVE_RAY_RESULTS names.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.builders.served_models import PORT, ask, plain_application, reads

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.skipif(not os.environ.get("QMOVE_RAY"), reason="takes a minute: make test-ray"),
]
ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 4
REQUEST = {"values": [1.0, 2.0, 3.0]}
results: dict[str, Any] = {}


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The example, with a folder of its own, and a Ray on this machine for it."""
    patch = pytest.MonkeyPatch()
    patch.setenv("QMOVE_EXAMPLE_FOLDER", str(tmp_path_factory.mktemp("checkpoints")))
    patch.setenv("PYTHONPATH", str(ROOT))
    patch.syspath_prepend(str(ROOT))
    import ray
    from ray import serve

    from examples import ray_serve

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    serve.start(http_options={"port": PORT})
    yield ray_serve
    serve.shutdown()
    ray.shutdown()
    patch.undo()
    if file := os.environ.get("QMOVE_RAY_RESULTS"):
        Path(file).write_text(json.dumps(results, indent=1) + "\n")


@pytest.fixture
def fresh(example: Any) -> Iterator[Any]:
    """Nothing was read yet, and no application runs."""
    from ray import serve

    (example.FOLDER / "reads.txt").unlink(missing_ok=True)
    yield example
    serve.delete("default")


@pytest.fixture(scope="module")
def expected(example: Any) -> dict[str, list[float]]:
    """What each model answers, without Ray and without a pool."""
    return {name: example.answer(example.load(name), REQUEST) for name in example.MODELS}


def ask_all(example: Any, expected: dict[str, list[float]]) -> None:
    """Each round asks for each model, two requests at a time."""
    with ThreadPoolExecutor(2) as clients:
        for turn in range(ROUNDS):
            names = example.MODELS[turn:] + example.MODELS[:turn]
            answers = clients.map(
                lambda name: ask("POST", "/", REQUEST, serve_multiplexed_model_id=name), names
            )
            for name, (status, content) in zip(names, answers, strict=True):
                assert status == 200, content
                assert content == {"model": name, "answer": expected[name]}


def test_each_checkpoint_is_read_once_per_replica(
    expected: dict[str, list[float]], fresh: Any
) -> None:
    from ray import serve

    serve.run(fresh.app)
    started = time.perf_counter()
    ask_all(fresh, expected)
    seconds = time.perf_counter() - started
    counted = reads(fresh.FOLDER)
    assert set(counted.values()) == {1}
    assert {name for _pid, name in counted} == set(fresh.MODELS)
    status, figures = ask("GET", "/models")
    assert status == 200 and len(figures["replicas"]) == 2
    for replica in figures["replicas"]:
        assert replica["bytes_in_vram"] <= fresh.SIZE * 3 // 2
        assert replica["models_in_vram"] <= 1
    assert sum(replica["loads"] for replica in figures["replicas"]) == counted.total()
    results["pool"] = {
        "requests": 6 * ROUNDS,
        "reads": counted.total(),
        "seconds": round(seconds, 2),
    }

    assert ask("POST", "/sleep")[0] == 200
    assert ask("GET", "/is_sleeping") == (200, {"is_sleeping": True})
    assert all(r["bytes_in_vram"] == 0 for r in ask("GET", "/models")[1]["replicas"])
    assert ask("POST", "/wake_up")[0] == 200
    assert ask("GET", "/is_sleeping") == (200, {"is_sleeping": False})
    assert ask("POST", "/models/model-0", REQUEST)[1]["answer"] == expected["model-0"]
    assert ask("POST", "/models/none", REQUEST)[0] == 404
    assert ask("POST", "/", REQUEST)[0] == 400
    assert ask("PUT", "/other")[0] == 404
    assert ask("GET", "/health") == (200, {"replicas": 2})


def test_plain_multiplexing_reads_again_what_it_has_dropped(
    expected: dict[str, list[float]], fresh: Any
) -> None:
    from ray import serve

    serve.run(plain_application(2, fresh.replica_options()))
    started = time.perf_counter()
    ask_all(fresh, expected)
    counted = reads(fresh.FOLDER)
    assert max(counted.values()) > 1
    results["plain multiplexing"] = {
        "requests": 6 * ROUNDS,
        "reads": counted.total(),
        "seconds": round(time.perf_counter() - started, 2),
    }
    if "pool" in results:
        assert results["pool"]["reads"] < counted.total()


def test_a_replica_killed_in_the_middle_loses_only_what_it_held(
    expected: dict[str, list[float]], fresh: Any
) -> None:
    from ray import serve

    serve.run(fresh.app)
    ask_all(fresh, expected)
    first, second = (replica["pid"] for replica in ask("GET", "/models")[1]["replicas"])
    before = {key: n for key, n in reads(fresh.FOLDER).items() if key[0] == second}
    running = threading.Barrier(2)

    def kill() -> None:
        running.wait(60)
        os.kill(first, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    running.wait(60)
    ask_all(fresh, expected)
    killer.join()
    counted = reads(fresh.FOLDER)
    assert set(counted.values()) == {1}
    assert all(counted[key] == n for key, n in before.items())
    results["pool, one replica killed"] = {
        "requests": 2 * 6 * ROUNDS,
        "reads": counted.total(),
        "processes": len(Counter(pid for pid, _name in counted)),
    }
