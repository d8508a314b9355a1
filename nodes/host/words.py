"""Reports of nodes and buttons, in the language that ComfyUI is set to.

A sentence stands in the code in English, and is the key to the others in
`locales/<language>/reports.json`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from . import comfy

LANGUAGES = ("en", "ja", "zh")
LOCALES = Path(__file__).resolve().parents[2] / "locales"

_of_browser = "en"


def say(sentence: str, /, **parts: object) -> str:
    """The sentence in the user's language, with `{name}` replaced by the part of this name."""
    return _sentences(language()).get(sentence, sentence).format(**parts)


def language() -> str:
    """The language that is set in ComfyUI; while none is, the browser's, as for its frontend."""
    return _known(_chosen()) or _of_browser


def follow_browser(accepted: str | None) -> None:
    """Notes the language of a browser from its `Accept-Language`. Programs send none."""
    global _of_browser
    if accepted:
        _of_browser = _known(accepted.partition(",")[0].partition(";")[0]) or "en"


def _known(locale: str) -> str:
    """The language of "zh", "zh-TW" or "ja"; empty for one that qmove does not speak."""
    short = locale.strip().partition("-")[0].lower()
    return short if short in LANGUAGES else "en" if short else ""


def _chosen() -> str:
    """`Comfy.Locale` of ComfyUI's default user, which is stored once it is not the browser's."""
    folder = comfy.user_directory()
    if folder is None:
        return ""
    file = Path(folder) / "default" / "comfy.settings.json"
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        return ""
    return _stored(file, changed)


@functools.lru_cache(maxsize=1)
def _stored(file: Path, _changed: int) -> str:
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # ComfyUI writes it just now
        return ""
    locale = stored.get("Comfy.Locale") if isinstance(stored, dict) else None
    return locale if isinstance(locale, str) else ""


@functools.cache
def _sentences(language: str) -> dict[str, str]:
    file = LOCALES / language / "reports.json"
    if language == "en" or not file.is_file():
        return {}
    sentences: dict[str, str] = json.loads(file.read_text(encoding="utf-8"))
    return sentences
