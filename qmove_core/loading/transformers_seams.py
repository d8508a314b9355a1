"""Where qmove comes between transformers and a checkpoint: it opens the files, and is shown the
quantizer. For loads of `qmove.from_pretrained` only, in their own thread.

Import it where transformers is installed.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from transformers import modeling_utils
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from ..errors import MissingDependency, QMoveError
from .mapped_checkpoint import mapped
from .quantizing import quantizing_as_before, quantizing_there

_SEAMS = ("safe_open", "get_hf_quantizer")  # of transformers.modeling_utils


@dataclass
class Load:
    """One load.

    Attributes:
        device: where the model will be home; None where transformers places it itself.
        files: the safetensors files that were opened.
    """

    device: torch.device | None
    files: list[str] = field(default_factory=list)
    quantizer: Any = None


_current: ContextVar[Load | None] = ContextVar("qmove load", default=None)
_installing = threading.Lock()


def require(model_class: Any) -> None:
    """Raises QMoveError if this is no model class of transformers, MissingDependency if this
    transformers is too old."""
    if not isinstance(model_class, type) or not issubclass(
        model_class, (transformers.PreTrainedModel, _BaseAutoModelClass)
    ):
        raise QMoveError(
            f"Cannot load {model_class!r}: it is no model class of transformers, such as "
            "AutoModelForCausalLM. Load it by its own library, and call qmove.park(model)."
        )
    if not all(hasattr(modeling_utils, name) for name in _SEAMS):
        raise MissingDependency(
            f"The installed transformers, {transformers.__version__}, loads in another way; "
            "5.0 is needed: pip install 'transformers>=5'"
        )


@contextmanager
def loading(device: torch.device | None) -> Iterator[Load]:
    """Inside, this thread's `from_pretrained` goes through qmove."""
    _install()
    load = Load(device)
    token = _current.set(load)
    try:
        yield load
    finally:
        _current.reset(token)
        if load.quantizer is not None:
            quantizing_as_before(load.quantizer)


def _install() -> None:
    """Once for a process."""
    with _installing:
        if not hasattr(modeling_utils.safe_open, "__wrapped__"):
            modeling_utils.safe_open = _opens(modeling_utils.safe_open)
            modeling_utils.get_hf_quantizer = _shows(modeling_utils.get_hf_quantizer)


def _opens(original: Any) -> Any:
    def safe_open(filename: Any, *args: Any, **kwargs: Any) -> Any:
        load = _current.get()
        reader = original(filename, *args, **kwargs)
        if load is None:
            return reader
        if str(filename) not in load.files:
            load.files.append(str(filename))
        return reader if load.device is None else mapped(reader, filename)

    safe_open.__wrapped__ = original  # type: ignore[attr-defined]
    return safe_open


def _shows(original: Any) -> Any:
    @functools.wraps(original)
    def get_hf_quantizer(*args: Any, **kwargs: Any) -> Any:
        given = original(*args, **kwargs)
        load = _current.get()
        if load is not None and load.device is not None and given[0] is not None:
            quantizing_there(given[0], load.device)
            load.quantizer = given[0]
        return given

    return get_hf_quantizer
