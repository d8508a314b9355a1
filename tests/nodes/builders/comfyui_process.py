"""A real ComfyUI, started from a checkout as its own process over a simulated GPU, on loopback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
DEADLINE = 300.0  # seconds; only a process that hangs comes near


class ComfyUI:
    """Start it with `with`; the pack and the careless pack are in it unless `packs` says otherwise.

    Args:
        checkout: the folder with ComfyUI's main.py.
        folder: an empty folder for its models, settings and output.
        memory: of the simulated GPU.
        arguments: further arguments for main.py.
        settings: ComfyUI's stored settings of the default user.
    """

    def __init__(
        self,
        checkout: Path,
        folder: Path,
        *,
        memory: str = "2GiB",
        devices: int = 1,
        arguments: tuple[str, ...] = (),
        packs: tuple[Path, ...] = (ROOT, HERE / "packs" / "careless"),
        settings: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self.events = folder / "events.txt"
        self.log = folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None
        self._port = _free_port()
        self._command = [
            *(
                os.environ.get("COMFYUI_PYTHON", sys.executable),
                "-m",
                "simcuda",
                "--memory",
                memory,
            ),
            *(
                "--devices",
                str(devices),
                str(checkout / "main.py"),
                "--listen",
                "127.0.0.1",
                "--port",
                str(self._port),
            ),
            *(
                "--base-directory",
                str(folder),
                "--database-url",
                "sqlite:///:memory:",
                "--disable-api-nodes",
                *arguments,
            ),
        ]
        self._checkout = checkout
        for name in ("custom_nodes", "input", "user/default"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "user" / "default" / "comfy.settings.json").write_text(json.dumps(settings or {}))
        for pack in packs:
            (folder / "custom_nodes" / ("qmove" if pack == ROOT else pack.name)).symlink_to(pack)

    def __enter__(self) -> ComfyUI:
        paths = [str(HERE / "standins"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            "CARELESS_EVENTS": str(self.events),
            "TORCHDYNAMO_DISABLE": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, env=environment, cwd=self._checkout
            )
        self.until(lambda: self._answers("/system_stats"), "answers")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if kind is None:  # what a guard has caught fails no prompt, but the test
            text = self.log.read_text(errors="replace")
            caught = [line for line in text.splitlines() if line.startswith("qmove could not")]
            assert not caught, caught

    def run(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """Runs a prompt to its end, however it ends, and returns its history."""
        return self.result(self.submit(prompt))

    def submit(self, prompt: dict[str, Any]) -> str:
        status, answer = self.post("/prompt", {"prompt": prompt})
        assert status == 200, answer
        return str(answer["prompt_id"])

    def result(self, prompt_id: str) -> dict[str, Any]:
        return self.until(
            lambda: self.get(f"/history/{prompt_id}").get(prompt_id), f"ends prompt {prompt_id}"
        )

    def moved(self, prompt: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """Runs a prompt; returns its history, and bytes copied in and out of each device."""
        before = self.get("/careless/counters")
        history = self.run(prompt)
        after = self.get("/careless/counters")
        pairs = zip(before, after, strict=True)
        return history, [(b[0] - a[0], b[1] - a[1]) for a, b in pairs]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}{path}", timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and decoded body."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self._port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read()
                return answer.status, json.loads(text) if text else None
        except urllib.error.HTTPError as error:
            text = error.read()
            with suppress(ValueError):
                return error.code, json.loads(text)
            return error.code, text.decode()

    def times_noted(self, what: str) -> int:
        """How often nodes of the careless pack have noted this."""
        return self.events.read_text().splitlines().count(what) if self.events.exists() else 0

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Polls until `condition()` is true; fails with the log if the process dies or the deadline
        passes."""
        end = time.monotonic() + DEADLINE
        while time.monotonic() < end:
            result = condition()
            if result:
                return result
            assert self._process is not None and self._process.poll() is None, (
                f"ComfyUI has ended:\n{self.tail()}"
            )
            time.sleep(0.05)
        raise AssertionError(f"ComfyUI did not get there: {what}\n{self.tail()}")

    def tail(self, length: int = 6000) -> str:
        return self.log.read_text(errors="replace")[-length:]

    def _answers(self, path: str) -> bool:
        try:
            self.get(path)
        except (OSError, ValueError):
            return False
        return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
