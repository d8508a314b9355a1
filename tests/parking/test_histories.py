"""Random histories: moves mixed with what users do, compared with a twin that never moved.

Each step is done to both. After it the results are compared, and at the end every byte.
"""

from __future__ import annotations

import copy
import gc
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qmove_core as qmove
from qmove_core.parking import sleeping, streaming
from tests.builders.device import GPU

pytestmark = pytest.mark.simulated

WIDTH = 8


class Pair:
    """Two models that share a part, in a pipeline; and tensors that a user keeps of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        shared = nn.Linear(WIDTH, WIDTH)
        self.pipe = {
            "a": nn.Sequential(nn.Linear(WIDTH, WIDTH), shared, nn.LayerNorm(WIDTH)),
            "b": nn.Sequential(shared, nn.Linear(WIDTH, WIDTH)),
        }
        for model in self.pipe.values():
            model.cuda().requires_grad_(False)
        self.kept: list[torch.Tensor] = []

    def layer(self, index: int) -> nn.Linear:
        layers = [m for model in self.pipe.values() for m in model if hasattr(m, "in_features")]
        return layers[index % len(layers)]


def x() -> torch.Tensor:
    return torch.linspace(-1, 1, 3 * WIDTH, device="cuda").reshape(3, WIDTH)


def saved(model: nn.Module) -> list[float]:
    file = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, file)
    file.seek(0)
    return [tensor.sum().item() for tensor in torch.load(file).values()]


def keep(pair: Pair, n: int) -> None:
    weight = pair.layer(n).weight
    pair.kept.append([weight.data, weight[0], weight.T, weight.detach().clone()][n % 4])


def put_back(pair: Pair, n: int) -> None:
    """As EMA does: other weights for one forward, then those from before."""
    weight = pair.layer(n).weight
    before = weight.data
    weight.data = before * 0.5
    pair.pipe["a"](x())
    weight.data = before


def replace(pair: Pair, n: int) -> None:
    layer = pair.layer(n)
    layer.weight = nn.Parameter(layer.weight.data * 0.9, requires_grad=False)


def add(pair: Pair, n: int) -> None:
    layer = pair.layer(n)
    layer.register_buffer(
        "more", torch.full((WIDTH,), n, device=layer.weight.device, dtype=torch.float)
    )


def share(pair: Pair, n: int) -> None:
    pair.layer(n).weight = pair.layer(n + 1).weight


def cast(pair: Pair, n: int) -> None:
    pair.layer(n).double()
    pair.layer(n).float()


def load(pair: Pair, n: int) -> None:
    layer = pair.layer(n)
    state = {name: tensor * 0.5 for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state, assign=n % 2 == 0)
    layer.requires_grad_(False)


def resize(pair: Pair, n: int) -> None:
    """A buffer grows, and a weight's storage is taken away and given back, as FSDP does."""
    layer = pair.layer(n)
    layer.register_buffer("grown", torch.ones(WIDTH, device=layer.weight.device))
    layer.grown.resize_(WIDTH * (1 + n % 3)).fill_(n)


def delete(pair: Pair, n: int) -> None:
    """One model of the pipeline goes, and a new one comes, with the shared part or without."""
    key = "ab"[n % 2]
    torch.manual_seed(n)
    last = pair.layer(n) if n % 3 else nn.Linear(WIDTH, WIDTH)
    pair.pipe[key] = nn.Sequential(nn.Linear(WIDTH, WIDTH), last).cuda().requires_grad_(False)


def exchange(pair: Pair, n: int) -> None:
    one, other = pair.layer(n).weight, pair.layer(n + 1).weight
    if one is not other:
        torch.utils.swap_tensors(one, other)


def gradients(pair: Pair, n: int) -> Any:
    layer = pair.layer(n)
    weight = layer.weight.requires_grad_(True)
    loss = (weight**2).sum() + (layer(x()).sum() if n % 2 else 0)
    (gradient,) = torch.autograd.grad(loss, [weight])
    weight.requires_grad_(False)
    return gradient


def noise(pair: Pair, n: int) -> Any:
    torch.manual_seed(n)
    weight = pair.layer(n).weight
    return [weight + torch.randn_like(weight), nn.functional.dropout(weight), weight.type()]


USER: dict[str, Callable[[Pair, int], Any]] = {
    "forward a": lambda pair, n: pair.pipe["a"](x()),
    "forward b": lambda pair, n: pair.pipe["b"](x()),
    "part": lambda pair, n: pair.layer(n)(x()),
    "weights with the device": lambda pair, n: x() @ pair.layer(n).weight,
    "weights alone": lambda pair, n: pair.layer(n).weight * pair.layer(n + 1).bias,
    "device": lambda pair, n: str(pair.layer(n).weight.device),
    "in place": lambda pair, n: pair.layer(n).weight.mul_(1.5),
    "in place through data": lambda pair, n: pair.layer(n).weight.data[0].add_(1),
    "in place with the device": lambda pair, n: pair.layer(n).bias.add_(x()[0]),
    "in place in what is kept": lambda pair, n: [kept.mul_(0.5) for kept in pair.kept[-1:]],
    "kept with the device": lambda pair, n: [kept.sum() + x().sum() for kept in pair.kept[-1:]],
    "keep": keep,
    "drop": lambda pair, n: pair.kept.clear(),
    "put back": put_back,
    "replace": replace,
    "add": add,
    "share": share,
    "resize": resize,
    "delete": delete,
    "exchange": exchange,
    "gradients": gradients,
    "noise": noise,
    "cast": cast,
    "load": load,
    "save": lambda pair, n: saved(pair.pipe["a"]),
    "copy": lambda pair, n: copy.deepcopy(pair.pipe["b"])(x()),
    "remove": lambda pair, n: setattr(pair.layer(n), "bias", None) if n % 7 == 0 else None,
    "to the device": lambda pair, n: pair.layer(n).cuda() and None,
}
MOVES: dict[str, Callable[[Pair], Any]] = {
    "park": lambda pair: qmove.park(pair.pipe),
    "park a": lambda pair: qmove.park(pair.pipe["a"]),
    "park b": lambda pair: qmove.park(pair.pipe["b"]),
    "restore": lambda pair: qmove.restore(pair.pipe),
    "restore b": lambda pair: qmove.restore(pair.pipe["b"]),
    "stream": lambda pair: qmove.restore(pair.pipe, stream=True),
    "prefetch a": lambda pair: qmove.prefetch(pair.pipe["a"]),
    "wait": lambda pair: streaming.wait_for(),
    "collect": lambda pair: gc.collect(),
    "trim": lambda pair: qmove.trim(),
}
STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(sorted(USER)), st.integers(0, 20)),
        st.tuples(st.sampled_from(sorted(MOVES)), st.just(0)),
    ),
    max_size=14,
)


def seen(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.detach().cpu().tolist()
    if isinstance(result, (list, tuple)):
        return [seen(item) for item in result]
    return result


def contents(pair: Pair) -> dict[str, Any]:
    return {
        f"{key}.{name}": (tensor.cpu().tolist(), str(tensor.device), tensor.dtype)
        for key, model in pair.pipe.items()
        for name, tensor in model.state_dict().items()
    }


def outcome(step: Callable[[], Any]) -> Any:
    try:
        return seen(step())
    except (RuntimeError, TypeError) as error:  # of PyTorch, on the twin as well
        return type(error)


@given(STEPS)
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_a_history_gives_what_it_gives_without_the_moves(gpu: GPU, steps: list[Any]) -> None:
    twin, pair = Pair(), Pair()
    for name, n in steps:
        if name in MOVES:
            MOVES[name](pair)
        else:
            expected = outcome(lambda: USER[name](twin, n))  # noqa: B023
            assert outcome(lambda: USER[name](pair, n)) == expected, (name, n)  # noqa: B023
    qmove.restore(pair.pipe)
    assert contents(pair) == contents(twin)
    assert [seen(kept) for kept in pair.kept] == [seen(kept) for kept in twin.kept]
    assert not qmove.park(pair.pipe).stragglers
    assert set(qmove.inventory(pair.pipe).by_device) == {"cpu"}
    for key, model in pair.pipe.items():
        assert seen(model(x())) == seen(twin.pipe[key](x()))
    qmove.restore(pair.pipe)
    streaming.wait_for()
    tensors = [t for model in pair.pipe.values() for t in model.state_dict().values()]
    assert {type(tensor) for tensor in tensors} == {torch.Tensor}
    modules = [module for model in pair.pipe.values() for module in model.modules()]
    assert not any(module in sleeping._wakers for module in modules)
