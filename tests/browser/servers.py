"""The server processes that the browser talks to: the small one of this folder, or the real ComfyUI
that COMFYUI_DIR names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from tests.nodes.builders.comfyui_process import ComfyUI

ROOT = Path(__file__).resolve().parents[2]
STAGEHAND = Path(__file__).resolve().parent / "packs" / "stagehand"
REAL = os.environ.get("COMFYUI_DIR")
# Of each simulated GPU. A real ComfyUI keeps 1.2 GiB free for computing.
MEMORY = "4GiB" if REAL else "640MiB"
# What the user's file says before the first start: no template dialog, no offers of other versions,
# and for 1.27.10 the two values that it would set by itself while it starts, upon which it
# stumbles.
STORED = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Notification.ShowVersionUpdates": False,
    "Comfy.Canvas.LeftMouseClickBehavior": "panning",
    "Comfy.Canvas.MouseWheelScroll": "zoom",
}


def prompt_of(
    *models: tuple[str, str, int], use: bool = False, first_use: int = 101
) -> dict[str, Any]:
    """Nodes 1, 2, ... load the models, nodes `first_use`, ... take them; each waits for the one
    before it."""
    prompt: dict[str, Any] = {}
    for number, (name, kind, mib) in enumerate(models, 1):
        load = {"name": name, "kind": kind, "mib": mib, "device": "cuda:0"}
        after = {"after": [str(first_use + number - 2), 0]} if number > 1 else {}
        prompt[str(number)] = {"class_type": "StagehandLoad", "inputs": load | after}
        taken = {"model": [str(number), 0], "seed": number}
        prompt[str(first_use + number - 1)] = {
            "class_type": "StagehandUse" if use else "StagehandKeep",
            "inputs": taken,
        }
    return prompt


class Server(ComfyUI):
    """Started and ended as often as a test wants, always on the same port and over the same folder."""

    def __init__(self, frontend: Path, folder: Path) -> None:
        arguments = ("--front-end-root", str(frontend))
        super().__init__(
            Path(REAL) if REAL else ROOT / "tests",
            folder,
            memory=MEMORY,
            devices=2,
            arguments=arguments,
            packs=(ROOT, STAGEHAND),
            settings=STORED,
        )
        for name in ("workflows", "subgraphs"):  # which the frontend lists
            (folder / "user" / "default" / name).mkdir(exist_ok=True)
        self.url = f"http://127.0.0.1:{self._port}"
        self.stored_settings = folder / "user" / "default" / "comfy.settings.json"
        if not REAL:
            self._command = [
                *(
                    sys.executable,
                    "-m",
                    "simcuda",
                    "--memory",
                    MEMORY,
                    "--devices",
                    "2",
                    "-m",
                    "browser.small_comfyui",
                ),
                *("--frontend", str(frontend), "--folder", str(folder), "--port", str(self._port)),
            ]

    def start(self) -> None:
        self.__enter__()

    def stop(self) -> None:
        """Ends it as a crash would: nothing is said to the browsers first."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def start_if_ended(self) -> None:
        if self._process is None or self._process.poll() is not None:
            self.start()

    def told(self, path: str, body: Any) -> Any:
        """Posts something that has to be accepted, and returns the answer."""
        status, answer = self.post(path, body)
        assert status in (200, 202), f"{path}: {status} {answer}\n{self.tail()}"
        return answer

    # What the tests ask and do on the server's side -----------------------------------------------

    def settings(self) -> dict[str, Any]:
        return self.get("/qmove/settings")

    def models(self) -> dict[str, dict[str, Any]]:
        """What qmove knows, by name."""
        return {model["name"]: model for model in self.get("/qmove/state")["models"]}

    def allocated(self, device: int = 0) -> int:
        """Bytes on a simulated GPU, as the GPU itself counts them."""
        return self.get("/stagehand/memory")["allocated"][device]

    def load(self, *models: tuple[str, str, int], use: bool = False) -> dict[str, Any]:
        """Runs a prompt that loads models, each (name, kind, MiB), one after the other, and uses
        each at once if told to."""
        return self.run(prompt_of(*models, use=use))

    def load_resident(self, *models: tuple[str, str, int]) -> None:
        """As `load`, and afterwards all are in VRAM, also those that were parked for a node of
        unknown needs."""
        self.load(*models)
        self.told("/qmove/restore", {"models": "all"})

    def forget_models(self) -> None:
        """Lets the models go that stay loaded, and runs a prompt that keeps nothing of the ones before
        it."""
        kept = self.settings()["qmove.keepLoaded"]
        self.told("/qmove/settings", {"qmove.keepLoaded": False})
        self._forgotten = getattr(self, "_forgotten", 0) + 1
        self.run({"1": {"class_type": "StagehandNothing", "inputs": {"seed": self._forgotten}}})
        self.told("/qmove/settings", {"qmove.keepLoaded": kept})

    def hold_copies(self, after_bytes: int) -> None:
        """From now on the link stops after so many bytes, until `let_copies_go`."""
        self.told("/stagehand/close_gate", {"after_bytes": after_bytes})

    def let_copies_go(self) -> None:
        self.told("/stagehand/open_gate", {})
