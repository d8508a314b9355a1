"""A speech model that is loaded by a node of its own and goes to others over a wire."""

from __future__ import annotations

from typing import Any

import torch

from .models import CATEGORY, SHARE, SpeechModel, load

RATE = 24000  # samples a second
SECONDS = 0.06  # of each letter


class StandInSpeechLoader:
    """Loads a speech model. Stands for a loader of another pack."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    FUNCTION = "load"
    RETURN_TYPES = ("STAND_IN_SPEECH",)
    RETURN_NAMES = ("speech model",)
    DEV_ONLY = True  # no search offers it, where the frontend knows that

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"share_of_vram": ("FLOAT", SHARE)}}

    def load(self, share_of_vram: float) -> tuple[SpeechModel]:
        return (load(SpeechModel, share_of_vram),)


class StandInSpeech:
    """Speaks a text, in tones. Stands for a speech node of another pack."""

    CATEGORY = CATEGORY
    DESCRIPTION = __doc__
    FUNCTION = "speak"
    RETURN_TYPES = ("AUDIO",)
    DEV_ONLY = True  # no search offers it, where the frontend knows that

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        text = {"multiline": True, "default": "It came back bit for bit."}
        return {"required": {"speech_model": ("STAND_IN_SPEECH",), "text": ("STRING", text)}}

    def speak(self, speech_model: SpeechModel, text: str) -> tuple[dict[str, Any]]:
        """The audio has shape (1, 1, samples): a tone for each letter, silence for all else."""
        speech_model.check()
        time = torch.arange(int(RATE * SECONDS)) / RATE
        tones = [220 * 2 ** (ord(c) % 24 / 12) if c.isalnum() else 0.0 for c in text or " "]
        wave = torch.cat([0.2 * torch.sin(2 * torch.pi * tone * time) for tone in tones])
        return ({"waveform": wave.reshape(1, 1, -1), "sample_rate": RATE},)
