"""Runs the prompts that the browser sends, one after the other, and tells it what happens."""

from __future__ import annotations

import queue
import threading
import time
import traceback
import uuid
from collections.abc import Mapping
from typing import Any

from tests.nodes.builders.fake_host import FakeHost

from .server import Server


class ServedHost(FakeHost):
    """The fake host with a real server: its nodes' progress and results go to the browser."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server  # type: ignore[assignment]
        self.queue = server.prompt_queue = PromptQueue(self, server)
        self.prompt_id = ""
        self.node_id: str | None = None
        self.outputs: dict[str, Any] = {}  # what the nodes of the last prompt showed

    def tell(self, event: str, **data: Any) -> None:
        """Tells the browser whose prompt it is; the others have other nodes."""
        if self.server.client_id is not None:
            data = {"prompt_id": self.prompt_id, "timestamp": int(time.time() * 1000)} | data
            self.server.send_sync(event, data, self.server.client_id)  # type: ignore[call-arg]

    async def _run_node(self, nodes: Any, node_id: str, pending: dict[str, Any]) -> bool:
        self.node_id = self.server.last_node_id = node_id  # type: ignore[attr-defined]
        self.tell("executing", node=node_id, display_node=node_id)
        self._show_progress(node_id, "running", 0, 1)
        done = await super()._run_node(nodes, node_id, pending)
        self._show_progress(node_id, "finished", 1, 1)
        return done

    async def _get_output_data(self, prompt_id: str, unique_id: str, *inputs: Any) -> Any:
        results = await super()._get_output_data(prompt_id, unique_id, *inputs)
        for result in results:
            if isinstance(result, dict) and "ui" in result:
                self.outputs[unique_id] = result["ui"]
                self.tell("executed", node=unique_id, display_node=unique_id, output=result["ui"])
        return results

    def _show_progress(self, node_id: str, state: str, value: float, most: float) -> None:
        self.tell(
            "progress_state",
            nodes={
                node_id: {
                    "value": value, "max": most, "state": state, "node_id": node_id, "display_node_id": node_id,
                    "real_node_id": node_id, "parent_node_id": None, "prompt_id": self.prompt_id,
                }
            },
        )  # fmt: skip

    def _bar_class(self) -> type:
        host, bar_class = self, super()._bar_class()

        class ShownBar(bar_class):  # type: ignore[misc, valid-type]
            def update_absolute(self, value: int, total: int | None = None) -> None:
                super().update_absolute(value, total)
                node_id = self._node_id or host.node_id
                host.tell("progress", value=value, max=total or 1, node=node_id)
                if node_id:
                    host._show_progress(node_id, "running", value, total or 1)

        return ShownBar


class PromptQueue:
    """Prompts that wait, the one that runs, and what became of the others."""

    def __init__(self, host: ServedHost, server: Server) -> None:
        self.currently_running: dict[int, tuple[Any, ...]] = {}
        self.history: dict[str, Any] = {}
        self._host, self._server = host, server
        self._waiting: queue.Queue[tuple[Any, ...]] = queue.Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def remaining(self) -> int:
        return self._waiting.qsize() + len(self.currently_running)

    def put(
        self,
        prompt: Mapping[str, Any],
        client_id: str | None,
        prompt_id: str | None,
        extra: Mapping[str, Any],
    ) -> str:
        prompt_id = prompt_id or str(uuid.uuid4())
        self._waiting.put((0, prompt_id, prompt, {**extra, "client_id": client_id}, list(prompt)))
        self._tell_length()
        return prompt_id

    def _tell_length(self) -> None:
        self._server.send_sync(
            "status", {"status": {"exec_info": {"queue_remaining": self.remaining()}}}
        )

    def _work(self) -> None:
        while True:
            item = self._waiting.get()
            self.currently_running[0] = item
            self._server.client_id = item[3]["client_id"]
            self._run(item)
            self.currently_running.clear()
            self._tell_length()

    def _run(self, item: tuple[Any, ...]) -> None:
        host, (_number, prompt_id, prompt, _extra, _outputs) = self._host, item
        host.prompt_id, host.outputs = prompt_id, {}
        host.tell("execution_start")
        host.tell("execution_cached", nodes=[])
        host.run(prompt)
        error = host.errors[0] if host.errors else None
        interrupted = isinstance(error, host.management.InterruptProcessingException)
        where = {
            "node_id": host.node_id,
            "node_type": prompt[host.node_id]["class_type"] if host.node_id else None,
        }
        if error is None:
            host.tell("execution_success")
        elif interrupted:
            host.tell("execution_interrupted", executed=[], **where)
        else:
            text = traceback.format_exception(error)
            host.tell(
                "execution_error", executed=[], exception_message=str(error), exception_type=type(error).__name__,
                traceback=text, current_inputs={}, current_outputs=[], **where,
            )  # fmt: skip
        host.tell("executing", node=None)
        self.history[prompt_id] = {
            "prompt": item, "outputs": host.outputs, "meta": {},
            "status": {"status_str": "error" if error else "success", "completed": error is None, "messages": []},
        }  # fmt: skip
