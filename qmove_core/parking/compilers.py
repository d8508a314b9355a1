"""Compilers: they read a module's code and tensors instead of calling it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from typing import Any

_READERS = ("torch.jit", "torch._jit_internal")


def reads_code(frame: types.FrameType) -> bool:
    """Whether the code of a frame reads a module's `forward` to compile it (TorchScript)."""
    return str(frame.f_globals.get("__name__", "")).startswith(_READERS)


def is_compiling_whole(frame: types.FrameType) -> bool:
    """Whether TorchDynamo looks at an object there for a graph without breaks (`fullgraph=True`).

    Then what it looks at must be awake: the graph must not have our code in it. Where breaks are
    allowed the object wakes by a break, and the graphs of before stay good.
    """
    if not str(frame.f_globals.get("__name__", "")).startswith("torch._dynamo.variables"):
        return False
    if frame.f_code.co_name == "__init__":  # it may never be used
        return False
    dynamo = sys.modules["torch._dynamo.symbolic_convert"]
    return bool(dynamo.InstructionTranslator.current_tx().one_graph)


def as_if_called_by(frame: types.FrameType, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, called in a frame that has the place of another one.

    `torch.jit.trace` compares what it has traced with a second trace, and where that was called.
    """
    code = _call.__code__.replace(
        co_filename=frame.f_code.co_filename, co_firstlineno=frame.f_lineno
    )
    return functools.partial(types.FunctionType(code, {}), function)


# On one line, which is the first line of its code.
def _call(f: Any, *args: Any, **kwargs: Any) -> Any: return f(*args, **kwargs)  # fmt: skip
