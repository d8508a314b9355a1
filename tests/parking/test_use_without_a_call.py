"""A parked model that is used in other ways than by a call gives what one gives that was never parked.

Each use is tried on a model that was parked and on its twin, twice: what it leaves behind is good for
the next use too. Where a tensor says it lives, and what it is, are compared as well.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qmove_core as qmove
from qmove_core.parking import streaming
from tests.builders.device import GPU
from tests.builders.models import inputs, layers
from tests.builders.places import place_of, places

pytestmark = pytest.mark.simulated


class Codec(nn.Module):
    """Like the codecs and image encoders of transformers: methods read weights without a forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.codebook = nn.Parameter(torch.randn(16, 8))
        self.register_buffer("usage", torch.rand(16) + 1)
        self.register_buffer("positions", torch.randn(32, 8))
        self.register_buffer("gain", torch.tensor(3.0))
        self.layer = nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.codebook
        self._table: torch.Tensor | None = None
        self.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layer(x) * self.gain)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        if self._table is None:
            self._table = self.codebook / self.usage.clamp(min=0.1)[:, None]
        return F.embedding(codes, self._table)

    def dense(self) -> torch.Tensor:
        grid = torch.ones((4, 8), device=self.codebook.device, dtype=self.codebook.dtype)
        return grid.cumsum(dim=0) @ self.layer.weight


def x_of(model: Any) -> torch.Tensor:
    return torch.linspace(-1, 1, 24, device="cuda").reshape(3, 8).to(model.dtype)


def ids() -> torch.Tensor:
    return torch.tensor([3, 1, 2], device="cuda")


class CastingLayer(nn.Module):
    """Brings its weight to where the input is, or the input to where its weight is."""

    def __init__(self, layer: nn.Linear, weight_moves: bool) -> None:
        super().__init__()
        self.weight, self.bias, self.weight_moves = layer.weight, layer.bias, weight_moves

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.weight_moves:
            return F.linear(x.to(self.weight.device), self.weight, self.bias)
        return F.linear(x, self.weight.to(x.device), self.bias.to(x.device, x.dtype))


def exchange_with_average(model: Codec) -> torch.Tensor:
    """As EMA does: other weights for one forward."""
    average = [parameter.detach().clone() for parameter in model.parameters()]
    torch._foreach_mul_(average, 0.5)
    kept = [parameter.data for parameter in model.parameters()]
    for parameter, other in zip(model.parameters(), average, strict=True):
        parameter.data = other
    result = model(x_of(model))
    for parameter, own in zip(model.parameters(), kept, strict=True):
        parameter.data = own
    return result


def functional(model: Codec) -> torch.Tensor:
    doubled = {name: parameter * 2 for name, parameter in model.named_parameters()}
    return torch.func.functional_call(model, doubled, x_of(model))


def stacked(model: Codec) -> torch.Tensor:
    parameters, buffers = torch.func.stack_module_state([model, model])
    base = copy.deepcopy(model).to("meta")

    def call(parameters: Any, buffers: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(base, (parameters, buffers), (x,))  # type: ignore[no-any-return]

    result: torch.Tensor = torch.vmap(call, in_dims=(0, 0, None))(parameters, buffers, x_of(model))
    return result


def optimizer_step(model: Codec) -> torch.Tensor:
    weight = nn.Parameter(model.layer.weight)
    optimizer = torch.optim.AdamW([weight])
    (x_of(model) @ weight).sum().backward()
    optimizer.step()
    return weight.detach()


USES: dict[str, Callable[[Codec], Any]] = {
    "codebook": lambda model: model.decode(ids()),
    "rows": lambda model: model.positions[ids()],
    "a dense table": lambda model: model.dense(),
    "a slice that is added": lambda model: x_of(model) + model.positions[:3].to(model.dtype),
    "a table that is computed first": lambda model: (
        x_of(model) + (model.positions[:3] * model.gain).to(model.dtype)
    ),
    "made of weights alone": lambda model: model.codebook * model.usage[:, None],
    "a number of the host": lambda model: model.codebook * torch.tensor(2.0),
    "clone": lambda model: model.codebook.clone(),
    "view": lambda model: model.codebook.view(-1)[3:7],
    "cast": lambda model: model.codebook.double(),
    "zeros like it": lambda model: torch.zeros_like(model.codebook),
    "new": lambda model: model.codebook.new_full((2, 2), 7.0),
    "random numbers like it": lambda model: (torch.manual_seed(1), torch.rand_like(model.usage))[1],
    "random numbers in it": lambda model: (
        torch.manual_seed(1), nn.init.normal_(model.codebook.clone()))[1],
    "dropout": lambda model: (torch.manual_seed(1), F.dropout(model.usage))[1],
    "tensor in a function": lambda model: F.linear(x_of(model), model.codebook),
    "in a list": lambda model: torch.cat([x_of(model), model.codebook]),
    "out of it": lambda model: torch.add(
        x_of(model), 1, out=torch.empty(3, 8, device="cuda", dtype=model.dtype)),
    "in place with the device's": lambda model: model.codebook.add_(x_of(model)[0]),
    "copied to the device": lambda model: torch.empty(
        16, 8, device="cuda", dtype=model.dtype).copy_(model.codebook),
    "copied from the device": lambda model: model.layer.bias.copy_(x_of(model)[0]),
    "to the device": lambda model: model.codebook.to("cuda"),
    "to the device with its index": lambda model: model.codebook.to(torch.device("cuda", 0)),
    "to where another is": lambda model: model.codebook.to(x_of(model)),
    "cuda": lambda model: model.codebook.cuda(),
    "to the other device": lambda model: model.codebook.to("cuda:1"),
    "to the host": lambda model: model.codebook.cpu(),
    "to the host, and read": lambda model: model.codebook.to("cpu").add_(1),
    "equal": lambda model: torch.equal(model.codebook, model.codebook.clone()),
    "comparison": lambda model: model.codebook[0] > x_of(model)[0],
    "parameter of it": lambda model: nn.Parameter(model.codebook),
    "parameter of a buffer": lambda model: nn.Parameter(model.usage),
    "parameter of its data": lambda model: nn.Parameter(model.codebook.data * 2),
    "where": lambda model: torch.where(x_of(model)[0] > 0, model.codebook[0], model.codebook[1]),
    "einsum": lambda model: torch.einsum("bi,oi->bo", x_of(model), model.codebook),
    "foreach": lambda model: torch._foreach_mul([x_of(model), model.codebook], 2.0)[1],
    "dlpack": lambda model: torch.from_dlpack(model.codebook.detach()),
    "autograd": lambda model: torch.autograd.functional.vjp(
        lambda x: x @ model.layer.weight, x_of(model), x_of(model))[1],
    "vmap over rows": lambda model: torch.vmap(lambda row: row * 2)(model.codebook),
    "vmap with the device's": lambda model: torch.vmap(
        lambda row, x: row * x, in_dims=(0, None))(model.codebook, x_of(model)[0]),
    "vmap over stacked modules": stacked,
    "vmap over calls": lambda model: torch.vmap(model)(x_of(model)),
    "gradient through calls": lambda model: torch.func.grad(lambda x: model(x).sum())(x_of(model)),
    "traced": lambda model: torch.jit.trace(model.layer, x_of(model))(x_of(model)),
    "scripted": lambda model: torch.jit.script(model.layer)(x_of(model)),
    "symbolically traced": lambda model: torch.fx.symbolic_trace(model)(x_of(model)),
    "a deep copy": lambda model: copy.deepcopy(model)(x_of(model)),
    "a deep copy of a tensor": lambda model: copy.deepcopy(model.codebook),
    "a copy of a tensor": lambda model: copy.copy(model.codebook),
    "other weights for a call": functional,
    "average exchanged": exchange_with_average,
    "optimizer": optimizer_step,
    "a bound forward": lambda model: model.layer.forward(x_of(model)),
    "weight cast to the input": lambda model: CastingLayer(model.layer, True)(x_of(model)),
    "input cast to the weight": lambda model: CastingLayer(model.layer, False)(x_of(model)),
    "clip": lambda model: nn.utils.clip_grad_norm_(model.parameters(), 1.0),
    "vector": lambda model: nn.utils.parameters_to_vector(model.parameters()),
    "numbers": lambda model: (model.gain.item(), float(model.gain), bool(model.gain > 2)),
    "list": lambda model: model.usage.tolist(),
    "device": lambda model: (
        model.device, model.codebook.device, model.codebook.is_cuda, model.codebook.is_cpu,
        model.codebook.get_device(), torch.get_device(model.codebook)),
    "device of what hangs on it": lambda model: [
        tensor.device for tensor in (model.codebook.T, model.codebook.data, model.codebook.detach())],
    "device in the state dict": lambda model: {
        name: (tensor.device, tensor.__class__) for name, tensor in model.state_dict().items()},
    "device after half": lambda model: model.half().device,
    "device after an assignment": lambda model: (
        model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True),
        model.device)[1],
    "device after the data was exchanged": lambda model: (
        setattr(model.codebook, "data", model.codebook.data * 2), model.device)[1],
    "class": lambda model: (
        isinstance(model.codebook, nn.Parameter), model.codebook.__class__, model.usage.__class__),
}  # fmt: skip


def seen(result: Any) -> Any:
    """What is compared: values, and where each tensor says that it lives."""
    if isinstance(result, torch.Tensor):
        values = result.detach().cpu().clone()
        return str(result.device), result.dtype, values.tolist(), result.__class__
    if isinstance(result, (tuple, list)):
        return [seen(item) for item in result]
    return result


@pytest.mark.parametrize("how", ["parked", "arriving"])
@pytest.mark.parametrize("use", USES.values(), ids=USES.keys())
def test_a_use_gives_what_it_gives_on_a_model_that_was_never_parked(
    gpu: GPU, second_gpu: GPU, use: Callable[[Codec], Any], how: str
) -> None:
    twin, model = Codec().cuda(), Codec().cuda()
    for _ in range(2):
        qmove.park(model)
        if how == "arriving":
            qmove.restore(model, stream=True)
        for _ in range(2):
            assert seen(use(model)) == seen(use(twin))
        assert seen(model(x_of(model))) == seen(twin(x_of(twin)))
        assert (model.head.weight is model.codebook) == (twin.head.weight is twin.codebook)
    streaming.wait_for()
    assert {type(tensor) for tensor in model.state_dict().values()} == {torch.Tensor}
    assert not qmove.park(model).stragglers
    assert set(qmove.inventory(model).by_device) == {"cpu"}


COMPILED: dict[str, Callable[[Codec], Any]] = {
    "module": lambda model: torch.compile(model, backend="eager")(x_of(model)),
    "function with a weight": lambda model: torch.compile(
        lambda x: x @ model.codebook.T, backend="eager")(x_of(model)),
    "function with a module": lambda model: torch.compile(
        lambda x: model(x) + 1, backend="eager")(x_of(model)),
}  # fmt: skip


@pytest.mark.usefixtures("compiling")
@pytest.mark.parametrize("how", ["parked", "arriving"])
@pytest.mark.parametrize("use", COMPILED.values(), ids=COMPILED.keys())
def test_what_is_compiled_over_a_parked_model(
    gpu: GPU, use: Callable[[Codec], Any], how: str
) -> None:
    twin, model = Codec().cuda(), Codec().cuda()
    qmove.park(model)
    if how == "arriving":
        qmove.restore(model, stream=True)
    assert seen(use(model)) == seen(use(twin))
    assert seen(use(model)) == seen(use(twin))


@pytest.mark.usefixtures("compiling")
def test_what_was_compiled_before_the_original_was_parked(gpu: GPU) -> None:
    model = Codec().cuda()
    compiled = torch.compile(model, backend="eager")
    expected = seen(compiled(x_of(model)))
    for _ in range(2):
        qmove.park(model)
        assert seen(compiled(x_of(model))) == expected
        assert seen(compiled(x_of(model))) == expected


@pytest.mark.parametrize("first", ["target", "draft"])
@pytest.mark.parametrize("share", ["tied", "view", "transposed"])
def test_an_awake_model_that_shares_a_weight_with_a_parked_one(
    gpu: GPU, share: str, first: str
) -> None:
    def pair() -> tuple[nn.Module, nn.Module]:
        target, draft = layers(3), layers(2)
        if share == "tied":
            draft[0].weight = target[0].weight
        elif share == "view":
            draft[0].weight = nn.Parameter(target[0].weight.data[:], requires_grad=False)
        else:
            del draft[0].weight
            draft[0].weight = target[0].weight.T
        return target, draft

    (target, draft), twins = pair(), pair()
    expected = [twin(inputs()) for twin in twins]
    for _ in range(2):
        qmove.park(target)
        used = [(target, expected[0]), (draft, expected[1])]
        for model, wanted in used if first == "target" else used[::-1]:
            assert torch.equal(model(inputs()), wanted)
            copied = qmove.stats().copied_bytes if hasattr(qmove.stats(), "copied_bytes") else 0
            assert torch.equal(model(inputs()), wanted)
            if copied:
                assert qmove.stats().copied_bytes == copied, "nothing crosses the link for ever"
        streaming.wait_for()
        assert type(draft[0].weight) is type(twins[1][0].weight)


def test_what_an_operator_needs_comes_home_alone(gpu: GPU) -> None:
    model = layers(4)
    qmove.park(model)
    F.linear(inputs(), model[2].weight)
    assert [place_of(layer.weight) for layer in model] == ["cpu", "cpu", "cuda", "cpu"]
    assert qmove.is_parked(model)


ON_THE_HOST: dict[str, Callable[[Any], Any]] = {
    "saved": lambda model: torch.save(model.state_dict(), io.BytesIO()),
    "pickled": lambda model: pickle.dumps(model),
    "copied": copy.deepcopy,
    "state dict to the host": lambda model: {n: t.cpu() for n, t in model.state_dict().items()},
    "numpy": lambda model: model.codebook.numpy().sum(),
    "sum": lambda model: sum(p.float().norm() for p in model.parameters()).item(),
    "compared": lambda model: torch.equal(model.codebook, torch.ones(16, 8)),
    "loaded": lambda model: model.load_state_dict(Codec().state_dict()),
    "changed in place": lambda model: model.codebook.mul_(2),
    "changed through data": lambda model: model.codebook.data.add_(1),
    "merged": lambda model: model.layer.weight.data.addmm_(torch.ones(8, 2), torch.ones(2, 8)),
    "repr": lambda model: (repr(model), repr(model.codebook), str(model.usage)),
    "iterated": lambda model: [row.sum().item() for row in model.codebook],
    "asked": lambda model: (model.codebook.device, model.codebook.shape, model.codebook.dim()),
    "inventory": lambda model: str(qmove.inventory(model)),
    "half": lambda model: model.half(),
}


@pytest.mark.parametrize("read", ON_THE_HOST.values(), ids=ON_THE_HOST.keys())
def test_what_reads_a_parked_model_by_itself_leaves_it_parked(
    gpu: GPU, read: Callable[[Any], Any]
) -> None:
    empty = gpu.allocated()
    twin, model = Codec(), Codec().cuda()
    read(twin)
    twin.cuda()
    resident = gpu.allocated() - empty - qmove.inventory(model).nbytes
    qmove.park(model)
    read(model)
    assert gpu.allocated() == empty + resident
    assert qmove.is_parked(model)
    assert seen(model(x_of(model))) == seen(twin(x_of(twin)))


def test_safetensors_saves_a_parked_model(gpu: GPU, tmp_path: Any) -> None:
    from safetensors.torch import load_file, save_file, save_model

    model = Codec().cuda()
    expected = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
    qmove.park(model)
    save_model(model, str(tmp_path / "model.safetensors"))
    whole = dict(model.state_dict())
    del whole["head.weight"]
    save_file(whole, tmp_path / "state.safetensors")
    for name in ("model", "state"):
        loaded = load_file(tmp_path / f"{name}.safetensors")
        assert len(loaded) == 6
        assert all(torch.equal(expected[key], value) for key, value in loaded.items())


def test_a_bound_forward_of_before_the_park(gpu: GPU) -> None:
    model, twin = layers(2), layers(2)
    forwards = [model.forward, model[0].forward]
    expected = [twin(inputs()), twin[0](inputs())]
    for forward, wanted in zip(forwards, expected, strict=True):
        qmove.park(model)
        assert torch.equal(forward(inputs()), wanted)
        assert torch.equal(forward(inputs()), wanted)


def test_a_layer_with_a_fast_path_takes_it_again_at_once(gpu: GPU) -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
        return nn.TransformerEncoder(layer, 3).cuda().eval().requires_grad_(False)

    x = torch.randn(2, 7, 64, device="cuda")
    with torch.inference_mode():
        expected = build()(x)
        model = build()
        for _ in range(3):
            qmove.park(model)
            assert torch.equal(model(x), expected)
            assert torch.equal(model(x), expected)
        attention = model.layers[0].self_attn
        wanted = attention(x, x, x)[0]
        qmove.park(attention)
        assert torch.equal(attention(x, x, x)[0], wanted)


def test_a_resident_model_carries_nothing_of_it(gpu: GPU) -> None:
    model = Codec().cuda()
    qmove.park(model)
    model.decode(ids())
    model(x_of(model))
    streaming.wait_for()
    assert places(model) == {"cuda"}
    tensors = [*model.parameters(), *model.buffers()]
    assert {type(tensor) for tensor in tensors} == {nn.Parameter, torch.Tensor}
