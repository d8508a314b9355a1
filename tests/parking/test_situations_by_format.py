"""What is done with a parked model gives what it gives on one that was never parked, in every format.

`test_ordinary_pytorch.py` and `test_use_without_a_call.py` try many more situations, on plain models.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.formats import MODELS, model_in, pipeline, x_of
from tests.builders.situations import SITUATIONS

pytestmark = [
    pytest.mark.simulated,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::UserWarning"),
]


def seen(result: Any) -> Any:
    """What is compared: values, and all that a tensor says of itself."""
    if isinstance(result, torch.Tensor):
        facts = (str(result.device), result.dtype, result.shape, result.__class__)
        return (*facts, *values(result))
    if isinstance(result, dict):
        return {name: seen(value) for name, value in result.items()}
    if isinstance(result, (tuple, list)):
        return [seen(item) for item in result]
    return result


def values(tensor: Any) -> list[Any]:
    if hasattr(type(tensor), "__tensor_flatten__"):
        with torch._C.DisableTorchFunctionSubclass():
            names, _context = tensor.__tensor_flatten__()
        return [item for name in names for item in values(getattr(tensor, name))]
    host = tensor.detach().cpu().contiguous()
    return [bytes(host.reshape(-1).view(torch.uint8).numpy().tobytes())]


WHOLES: dict[str, Callable[[], Any]] = MODELS | {"pipeline": pipeline}

# Where a situation makes no sense, and why in a word: a model that is home raises too.
NO_SENSE: dict[str, dict[str, str]] = {
    "weights with an input": {"dispatched to two": "devices"},
    "weights in the layers operator": {
        "int8": "codes",
        "nf4": "packed",
        "dispatched to two": "devices",
    },
    "weights transposed": {
        "int8": "codes",
        "nf4": "packed",
        "torchao": "unsupported",
        "dispatched to two": "devices",
    },
    "weights sent to the host": {"nf4": "state"},
    "vmap over calls": {"int8": "autograd"},
    "grad transform": {"int8": "autograd", "nf4": "autograd", "dispatched to two": "storage"},
    "traced": {"int8": "schema"},
    "symbolically traced": {"int8": "branches", "nf4": "branches"},
    "hooked": {"dispatched to two": "devices"},
    "pickled": {"torchao": "local", "dispatched": "local", "dispatched to two": "local"},
    "saved and loaded": {"int8": "state", "nf4": "state"},
    "loaded again": {"int8": "state", "nf4": "state"},
    "loaded from the host": {"int8": "state", "nf4": "state"},
    "a state assigned": {"int8": "state", "nf4": "state"},
    "a parameter made of it": {"int8": "class", "nf4": "class"},
    "trained adapter": {"dispatched to two": "devices"},
    "a layer to the host and back": {"dispatched to two": "devices"},
    "all to the host and back": {"dispatched to two": "devices"},
    "all to the device": {"dispatched to two": "devices"},
}
CASES = [(use, name) for use in SITUATIONS for name in WHOLES if name not in NO_SENSE.get(use, {})]


@pytest.mark.parametrize("how", ["parked", "arriving"])
@pytest.mark.parametrize(("use", "name"), CASES)
def test_a_situation_gives_what_it_gives_on_a_model_that_was_never_parked(
    gpu: GPU, second_gpu: GPU, use: str, name: str, how: str
) -> None:
    whole_twin, whole = WHOLES[name](), WHOLES[name]()
    twin, model = model_in(whole_twin), model_in(whole)
    assert seen(model(x_of(model))) == seen(twin(x_of(twin)))
    expected = seen(SITUATIONS[use](twin))
    qmove.park(whole)
    if how == "arriving":
        qmove.restore(whole, stream=True)
    assert seen(SITUATIONS[use](model)) == expected
    assert seen(model(x_of(model))) == seen(twin(x_of(twin)))
    qmove.restore(whole)
    streaming.wait_for()
    assert seen(dict(model.state_dict())) == seen(dict(twin.state_dict()))
    tensors = [*model.parameters(), *model.buffers()]
    assert not any("_qmove_variant" in type(tensor).__dict__ for tensor in tensors)
    assert not qmove.park(whole).stragglers
    assert seen(model(x_of(model))) == seen(twin(x_of(twin)))


@pytest.mark.parametrize("use", NO_SENSE)
@pytest.mark.parametrize("how", ["never parked", "parked"])
def test_where_a_situation_makes_no_sense_it_raises(second_gpu: GPU, use: str, how: str) -> None:
    for name in NO_SENSE[use]:
        model = model_in(WHOLES[name]())
        model(x_of(model))
        if how == "parked":
            qmove.park(model)
        with pytest.raises((RuntimeError, AttributeError, ValueError)):
            SITUATIONS[use](model)
            model(x_of(model))
