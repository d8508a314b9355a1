"""bitsandbytes weights in a file of a parked model: what the library keeps beside their bytes as
plain values, and a layer that is not quantized yet made one that is, without quantizing."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from ...attributes import Undo, set_aside
from ...memory.disk_manifest import BadManifest, dtype_of
from .bitsandbytes_layout import awaits_quantization, is_of, quant_state_of, with_nested

_MOST = 1 << 40  # of any dimension or block size
_TABLE = 1 << 16  # bytes of a table, at most; they have 64 or 1024


def same_name(name: str) -> str:
    """The scales of an 8-bit layer move from its weight to its state in the first forward."""
    for part in ("CB", "SCB"):
        if name == f"state.{part}" or name.endswith(f".state.{part}"):
            return name.removesuffix(f"state.{part}") + f"weight.{part}"
    return name


def tables(modules: Iterable[Any]) -> set[int]:
    """The ids of the tables that codes are looked up in. They are saved by value, since most are
    the library's own."""
    return {
        id(state.code)
        for module in modules
        for state in with_nested(_state_of(module))
        if state.code is not None
    }


def describe(modules: Mapping[str, Any]) -> dict[str, Any]:
    """By the name of each 4-bit or 8-bit weight its plain values."""
    found: dict[str, Any] = {}
    for name, module in modules.items():
        weight = _weight_of(module)
        state = _state_of(module)
        key = f"{name}.weight" if name else "weight"
        if state is not None:
            found[key] = {"bits": 4, "states": [_values(s) for s in with_nested(state)]}
        elif weight is not None and is_of(weight, "Int8Params") and weight.dtype == torch.int8:
            found[key] = {"bits": 8}
    return found


def _values(state: Any) -> dict[str, Any]:
    with torch._C.DisableTorchFunctionSubclass():
        code = None if state.code is None else state.code.detach().cpu().contiguous()
        content = None if code is None else bytes(code.view(torch.uint8).numpy().tobytes())
    return {
        "shape": None if state.shape is None else list(state.shape),
        "dtype": None if state.dtype is None else str(state.dtype).removeprefix("torch."),
        "blocksize": state.blocksize,
        "quant_type": state.quant_type,
        "code": None if content is None else base64.b64encode(content).decode(),
        "offset": state.offset is not None,
    }


def _weight_of(module: Any) -> Any:
    return getattr(module, "_parameters", {}).get("weight")


def _state_of(module: Any) -> Any:
    weight = _weight_of(module)
    if weight is None or not is_of(weight, "Params4bit"):
        return None
    return quant_state_of(module)


def prepare(
    modules: Mapping[str, Any], quantized: Mapping[str, Any], shapes: Mapping[str, Any], undo: Undo
) -> tuple[list[tuple[str, str]], list[tuple[torch.Tensor, str]]]:
    """Makes the layers of a model that are not quantized yet what those in a file are: with all
    their tensors, in which no byte is right yet.

    Args:
        quantized: as `describe` gave it.
        shapes: (dtype, shape, home) of each saved tensor, by name.
        undo: gets what makes them as they were.

    Returns:
        (name, problem) of what does not fit, and (table, home) of each that was made, on the host.

    Raises:
        BadManifest: the values are absurd.
    """
    problems, made = [], dict[tuple[str, str], torch.Tensor]()
    here = describe(modules)
    for name, values in quantized.items():
        module = modules.get(name.rpartition(".")[0])
        weight = _weight_of(module)
        if name in here:
            if here[name] != values:
                problems.append((name, _how(here[name], values)))
        elif weight is None or not (is_of(weight, "Params4bit") or is_of(weight, "Int8Params")):
            problems.append((name, f"it is quantized to {values.get('bits')} bits in the folder"))
        elif not awaits_quantization(weight):
            problems.append((name, "the model keeps it in a form that cannot be attached to"))
        elif is_of(weight, "Params4bit") != (values.get("bits") == 4):
            problems.append((name, f"it is quantized to {values.get('bits')} bits in the folder"))
        elif values["bits"] == 4:
            problems += _prepare_4bit(name, module, values, shapes, made, undo)
        else:
            _prepare_8bit(name, module, shapes, undo)
    problems += [(n, "it is not quantized in the folder") for n in here if n not in quantized]
    return problems, [(table, home) for (_text, home), table in made.items()]


def _how(here: Any, there: Any) -> str:
    if here.get("bits") != there.get("bits"):
        return f"it has {there.get('bits')} bits in the folder, and {here.get('bits')} in the model"
    return "it is quantized in another way (type, block size, dtype or shape) in the folder"


def _prepare_4bit(
    name: str,
    module: Any,
    values: Any,
    shapes: Mapping[str, Any],
    made_tables: dict[tuple[str, str], torch.Tensor],
    undo: Undo,
) -> list[tuple[str, str]]:
    from bitsandbytes.functional import QuantState

    weight = module.weight
    states = values.get("states")
    if not isinstance(states, list) or not 1 <= len(states) <= 2:
        raise BadManifest(f"{name} has no quantization state")
    quant_type, shape = states[0].get("quant_type"), states[0].get("shape")
    if quant_type != weight.quant_type:
        return [(name, f"it is {quant_type} in the folder, and {weight.quant_type} in the model")]
    if shape != list(weight.shape):
        return [
            (name, f"it has the shape {shape} in the folder, {list(weight.shape)} in the model")
        ]
    made: Any = None
    for depth in reversed(range(len(states))):
        state, prefix = states[depth], f"{name}.quant_state" + ".state2" * depth
        made = QuantState(
            absmax=_empty(shapes, f"{prefix}.absmax"),
            shape=None if state["shape"] is None else torch.Size(_sizes(state["shape"])),
            code=_table(state.get("code"), shapes[name][2], made_tables),
            blocksize=_number(state.get("blocksize")),
            quant_type=state.get("quant_type"),
            dtype=None if state.get("dtype") is None else dtype_of(str(state["dtype"])),
            offset=_empty(shapes, f"{prefix}.offset") if state.get("offset") else None,
            state2=made,
        )
    new = type(weight)(
        _empty(shapes, name),
        requires_grad=False,
        quant_state=made,
        blocksize=made.blocksize,
        compress_statistics=len(states) == 2,
        quant_type=quant_type,
        quant_storage=dtype_of(str(shapes[name][0])),
        module=getattr(weight, "module", None),
        bnb_quantized=True,
    )
    _put(module, new, undo)
    if "quant_state" in module.__dict__:
        set_aside(undo, module, quant_state=made)
    return []


def _prepare_8bit(name: str, module: Any, shapes: Mapping[str, Any], undo: Undo) -> None:
    weight = module.weight
    codes = _empty(shapes, name)
    new = type(weight)(
        codes,
        requires_grad=False,
        has_fp16_weights=False,
        CB=None,
        SCB=_empty(shapes, f"{name}.SCB"),
    )
    with torch._C.DisableTorchFunctionSubclass():
        new.CB = new.detach()
    _put(module, new, undo)


def _put(module: Any, weight: Any, undo: Undo) -> None:
    undo.note(module._parameters.__setitem__, "weight", module._parameters["weight"])
    module._parameters["weight"] = weight


def _empty(shapes: Mapping[str, Any], name: str) -> torch.Tensor:
    """A tensor as it was saved, with pages that nobody has touched."""
    if name not in shapes:
        raise BadManifest(f"there is no tensor {name}")
    dtype, shape, _home = shapes[name]
    return torch.empty(shape, dtype=dtype_of(dtype), device="cpu")


def _table(text: Any, home: str, made: dict[tuple[str, str], torch.Tensor]) -> torch.Tensor | None:
    """One tensor for each content and each device, as the library has it."""
    if text is None:
        return None
    if (text, home) in made:
        return made[text, home]
    if not isinstance(text, str) or len(text) > _TABLE:
        raise BadManifest("a table of codes is not what it should be")
    try:
        content = bytearray(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise BadManifest("a table of codes is not what it should be") from error
    if not content or len(content) % 4:
        raise BadManifest("a table of codes is not what it should be")
    made[text, home] = torch.frombuffer(content, dtype=torch.float32).clone()
    return made[text, home]


def _number(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _MOST:
        raise BadManifest(f"{value!r} is no block size")
    return value


def _sizes(values: Any) -> list[int]:
    if not isinstance(values, list) or len(values) > 8:
        raise BadManifest("a shape is not what it should be")
    return [_number(value) for value in values]
