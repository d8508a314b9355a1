"""What its user calls a model: the file or the repository that its loader names, what the model
says of itself, else the title of its loader; its class only where nothing else is known.

`naming.py` gives the names.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import PureWindowsPath

from torch.utils.weak import WeakIdKeyDictionary

LONGEST = 200  # characters of what is taken for a name
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+?)(?:[/\\]|$)")  # of Hugging Face's cache

_names: WeakIdKeyDictionary = WeakIdKeyDictionary()  # model -> str


def of(model: object) -> str:
    """The name of a model, or of ComfyUI's own one that a patcher moves."""
    known = _names.get(model) if type(model).__weakrefoffset__ else None
    return str(known or own_name(model) or type(model).__name__)


def has_none(model: object) -> bool:
    """Whether a model can be given a name and has none."""
    return type(model).__weakrefoffset__ != 0 and model not in _names


def give(model: object, name: str) -> None:
    """Names a model for as long as it lives. Where another one has the name already it gets a
    number: "flux.safetensors (2)"."""
    taken = set(_names.values())
    number = next(n for n in itertools.count(1) if _numbered(name, n) not in taken)
    _names[model] = _numbered(name, number)


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name} ({number})"


def own_name(model: object) -> str:
    """The repository or folder that a model of transformers or diffusers says it is from."""
    for told in _told(model):
        if isinstance(told, str) and 0 < len(told.strip()) <= 4 * LONGEST:
            return repository(told.strip()) or last_part(told.strip())
    return ""


def repository(text: str) -> str:
    """ "owner/name", where a text names a repository or its folder in Hugging Face's cache."""
    cached = _SNAPSHOT.search(text)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    return text if _REPOSITORY.fullmatch(text) and not text.startswith(".") else ""


def last_part(text: str) -> str:
    """The name of a file or folder, of any system's path."""
    return PureWindowsPath(text.rstrip("/\\")).name or text


def _told(model: object) -> Iterator[object]:
    own = getattr(model, "__dict__", {})  # no property of somebody else's is called
    yield own.get("name_or_path")
    for config in (own.get("config"), own.get("_internal_dict")):
        if isinstance(config, dict):
            yield config.get("_name_or_path")
        yield getattr(config, "__dict__", {}).get("_name_or_path")
