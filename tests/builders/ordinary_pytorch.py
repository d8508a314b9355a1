"""Sequences of ordinary PyTorch, as programs do them with a model that they take to be home."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from tests.builders.threads import in_threads


class Net(nn.Module):
    """Layers and tensors of many kinds: empty, without dimensions, bool, complex, float8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 8)
        self.fc2 = nn.Linear(8, 8)
        self.emb = nn.Embedding(10, 8)
        self.plist = nn.ParameterList([nn.Parameter(torch.randn(8)) for _ in range(3)])
        self.pdict = nn.ParameterDict({"a": nn.Parameter(torch.randn(8))})
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("zero", torch.tensor(2.0))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("cplx", torch.randn(8, dtype=torch.complex64))
        self.register_buffer("f8", torch.randn(8).to(torch.float8_e4m3fn))
        self.register_buffer("idx", torch.arange(8))
        self.requires_grad_(False).eval().cuda()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn(self.conv(x)).mean((2, 3))
        y = self.fc2(F.relu(self.fc(y)))
        for parameter in self.plist:
            y = y + parameter
        y = y * self.pdict["a"] + self.emb(self.idx[:1]) * self.zero
        return y + self.f8.float() if self.flag else y


def image() -> torch.Tensor:
    return torch.linspace(-1, 1, 96, device="cuda").reshape(2, 3, 4, 4)


def rows() -> torch.Tensor:
    return torch.linspace(-1, 1, 16, device="cuda").reshape(2, 8)


USES: dict[str, Callable[[Net], Any]] = {}


def _use(function: Callable[[Net], Any]) -> Callable[[Net], Any]:
    USES[function.__name__.replace("_", " ").strip()] = function
    return function


# Weights that are replaced by others ---------------------------------------------------------------


class _Symmetric(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.triu() + x.triu(1).mT


@_use
def parametrized(m: Net) -> Any:
    if not parametrize.is_parametrized(m.fc):
        parametrize.register_parametrization(m.fc, "weight", _Symmetric())
    return m.fc.weight, m.fc(rows())


@_use
def parametrized_for_a_while(m: Net) -> Any:
    parametrize.register_parametrization(m.fc, "weight", _Symmetric())
    parametrize.remove_parametrizations(m.fc, "weight")
    return m.fc.weight


@_use
def weight_norm(m: Net) -> Any:
    if not parametrize.is_parametrized(m.fc):
        parametrizations.weight_norm(m.fc)
    return m.fc(rows()), m.fc.weight


@_use
def old_weight_norm(m: Net) -> Any:
    if not hasattr(m.fc, "weight_g"):
        nn.utils.weight_norm(m.fc)
    return m.fc(rows()), m.fc.weight_g


@_use
def spectral_norm(m: Net) -> Any:
    torch.manual_seed(1)
    if not parametrize.is_parametrized(m.fc):
        parametrizations.spectral_norm(m.fc)
    return m.fc.weight


@_use
def orthogonal(m: Net) -> Any:
    if not parametrize.is_parametrized(m.fc):
        parametrizations.orthogonal(m.fc)
    return m.fc.weight.device, m.fc(rows()).device


@_use
def pruned(m: Net) -> Any:
    if not prune.is_pruned(m.fc):
        prune.l1_unstructured(m.fc, "weight", amount=0.5)
    torch.manual_seed(0)
    prune.random_unstructured(m.fc2, "weight", amount=3)
    prune.remove(m.fc2, "weight")
    return m.fc(rows()), m.fc.weight_mask, m.fc2.weight


@_use
def fused(m: Net) -> Any:
    if isinstance(m.bn, nn.BatchNorm2d):
        m.conv, m.bn = nn.utils.fuse_conv_bn_eval(m.conv, m.bn), nn.Identity()
    return m(image())


@_use
def swapped(m: Net) -> Any:
    torch.utils.swap_tensors(m.fc.weight, m.fc2.weight)
    other = nn.Parameter(torch.ones(8, 8, device="cuda"), requires_grad=False)
    torch.utils.swap_tensors(m.fc2.weight, other)
    return m.fc(rows()), m.fc2(rows()), other


@_use
def set_to_another(m: Net) -> Any:
    m.fc.weight.set_(m.fc2.weight)
    m.fc.bias.data.set_(torch.ones(8, device="cuda"))
    m.plist[0].set_(m.plist[1].untyped_storage(), 0, (8,), (1,))
    return m.fc(rows()), m.plist[0], m.fc.weight.data_ptr() == m.fc2.weight.data_ptr()


@_use
def strided_otherwise(m: Net) -> Any:
    weight = m.fc.weight.as_strided((8, 8), (1, 8))
    m.fc.weight = nn.Parameter(weight, requires_grad=False)
    return m.fc(rows()), rows()[0, :3] @ m.fc.weight.as_strided((3, 3), (2, 1))


@_use
def aliased_buffer(m: Net) -> Any:
    m.register_buffer("alias", m.fc.weight[0])
    m.alias.add_(1)
    return m.fc(rows()), m.alias


@_use
def changed_containers(m: Net) -> Any:
    m.plist[1] = nn.Parameter(m.plist[0] * 2, requires_grad=False)
    m.plist.append(nn.Parameter(torch.ones(8, device=m.fc.weight.device), requires_grad=False))
    m.pdict["b"] = nn.Parameter(m.pdict["a"].data.clone(), requires_grad=False)
    m.pdict.update({"a": m.pdict["b"]})
    m._buffers["zero"] = m.zero * 2
    m.fc._parameters["weight"] = nn.Parameter(m.fc.weight.mT.contiguous(), requires_grad=False)
    return len(m.plist), m.pdict["a"] * rows(), m(image())


@_use
def python_attributes(m: Net) -> Any:
    m.cached = m.fc.weight * 3
    m.table = torch.arange(8.0).to(m.fc.weight)
    m.table2 = torch.arange(8.0).type_as(m.fc.weight)
    torch.manual_seed(0)
    m.adapter = nn.Linear(8, 8).to(m.fc.weight).requires_grad_(False)
    return m.table * rows(), m.table2 * rows(), m.cached, m.adapter.weight.device


class _Special(nn.Parameter):
    pass


@_use
def parameters_of_a_class(m: Net) -> Any:
    m.fc.weight = _Special(m.fc.weight.data, requires_grad=False)
    m.fc2.weight = _Special(m.fc2.weight, requires_grad=False)
    m.buffer = nn.Buffer(m.fc.weight * 2)
    result = m.fc(rows()), m.fc2(rows()), m.buffer * rows()[0], m.fc.weight.new(2, 2).device
    return result, type(m.fc.weight).__name__, type(m.fc2.weight).__name__


@_use
def conversions_that_swap(m: Net) -> Any:
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        m.fc.double().float().load_state_dict({k: v * 2 for k, v in m.fc2.state_dict().items()})
        m.fc2.cuda()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    return m.fc(rows()), m.fc2(rows())


@_use
def recurrent(m: Net) -> Any:
    torch.manual_seed(0)
    m.rnn = nn.LSTM(8, 8, batch_first=True).to(m.fc.weight.device).requires_grad_(False)
    return m.rnn(rows()[None])[0], m.rnn._flat_weights[0].device


@_use
def merged_and_unmerged(m: Net) -> Any:
    change = torch.ones(8, 2, device="cuda") @ torch.ones(2, 8, device="cuda")
    m.fc.weight.data += 0.1 * change
    result = m.fc(rows())
    m.fc.weight.data -= 0.1 * change
    u, s, v = torch.linalg.svd(m.fc.weight)
    return result, m.fc.weight, (u[:, :2] * s[:2]) @ v[:2] @ rows().mT


@_use
def casts(m: Net) -> Any:
    m.fc.to("cuda", torch.float64)
    m.conv.to(memory_format=torch.channels_last)
    m.fc2.to(torch.ones(1, device="cuda", dtype=torch.float64))
    result = m.fc2(m.fc(rows().double())), m.conv(image()), m.conv.weight.stride()
    m.fc.float(), m.fc2.float()
    return result


@_use
def hooks_on_the_state_dict(m: Net) -> Any:
    def add(module: Net, state: dict[str, Any], _prefix: str, _metadata: Any) -> None:
        state["more"] = module.fc.weight * 2

    def take(_module: Net, state: dict[str, Any], *_rest: Any) -> None:
        state["fc.weight"] = state.pop("more")

    hooks = [m._register_state_dict_hook(add), m.register_load_state_dict_pre_hook(take)]
    m.load_state_dict(m.state_dict())
    for hook in hooks:
        hook.remove()
    return m.fc.weight, m.fc(rows())


@_use
def assigned_states(m: Net) -> Any:
    m.load_state_dict(m.state_dict(), assign=True)
    other = nn.Linear(8, 8, device="cuda")
    other.load_state_dict(m.fc.state_dict(), assign=True)
    return m.fc.weight, other(rows()).detach()


@_use
def lazy_layer(m: Net) -> Any:
    if not hasattr(m, "lazy"):
        torch.manual_seed(3)
        m.lazy = nn.LazyLinear(4).to(m.fc.weight.device)
    return m.lazy(rows()).detach()


@_use
def initialized(m: Net) -> Any:
    torch.manual_seed(5)
    nn.init.xavier_uniform_(m.fc.weight)
    m.apply(lambda x: nn.init.normal_(x.weight) if isinstance(x, nn.Embedding) else None)
    m.fc2.reset_parameters()
    m.fc.bias.uniform_(-1, 1)
    return m.fc.weight, m.fc.bias, m.fc2.weight, m.emb.weight


@_use
def trained_normalization(m: Net) -> Any:
    m.bn.train()
    result = m.bn(m.conv(image()))
    m.bn.eval().num_batches_tracked += 3
    return result, m.bn.running_mean, m.bn.num_batches_tracked


@_use
def resized_and_shared(m: Net) -> Any:
    m.plist[0].resize_(4).resize_(8)
    m.fc.share_memory()
    return m.plist[0].shape, m.fc.weight.share_memory_().is_shared(), m.fc(rows())


# Gradients ----------------------------------------------------------------------------------------


def _with_gradients(m: Net, loss: Callable[[], torch.Tensor]) -> Any:
    m.fc.requires_grad_(True)
    loss().backward()
    gradients = [parameter.grad for parameter in m.fc.parameters()]
    m.fc.zero_grad()
    m.fc.requires_grad_(False)
    return gradients


LOSSES: dict[str, Callable[[Net], torch.Tensor]] = {
    "of weights alone": lambda m: (m.fc.weight**2).sum() + m.fc.bias.exp().sum(),
    "of a penalty too": lambda m: m.fc(rows()).sum() + (m.fc.weight**2).sum(),
    "of a table made first": lambda m: (m.fc.weight.exp() * rows()[0]).sum(),
    "of a row": lambda m: (m.fc.weight[0] * rows()[0]).sum() + m.fc.weight.view(-1)[3:].sum(),
    "in place": lambda m: torch.zeros_like(m.fc.weight).add_(m.fc.weight).mul_(rows()[0]).sum(),
}
for _name, _loss in LOSSES.items():
    USES[f"gradients {_name}"] = lambda m, loss=_loss: _with_gradients(m, lambda: loss(m))


@_use
def hooks_on_gradients(m: Net) -> Any:
    got: list[torch.Tensor] = []
    hook = m.fc.weight.requires_grad_(True).register_hook(lambda g: got.append(g) or g * 2)
    result = _with_gradients(m, lambda: (m.fc.weight * 3).sum())
    hook.remove()
    return got, result


@_use
def optimizers(m: Net) -> Any:
    m.fc.requires_grad_(True)
    result = []
    for make in (torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)):
        optimizer = make(list(m.fc.parameters()))
        for parameter in m.fc.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        result.append([dict(state) for state in optimizer.state.values()])
        optimizer.zero_grad()
    m.fc.requires_grad_(False)
    return m.fc.weight, result


@_use
def averages(m: Net) -> Any:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    result = []
    for average in (
        AveragedModel(m.fc),
        AveragedModel(m.fc, None, None, get_ema_multi_avg_fn(0.9)),
    ):
        average.update_parameters(m.fc)
        average.update_parameters(m.fc)
        result.append(average(rows()))
    return result


@_use
def checkpointed(m: Net) -> Any:
    from torch.utils.checkpoint import checkpoint

    x = image().requires_grad_()
    result = checkpoint(m, x, use_reentrant=False)
    result.sum().backward()
    return result.detach(), x.grad


@_use
def transforms(m: Net) -> Any:
    func: Any = torch.func
    named, weight = dict(m.fc.named_parameters()), m.fc.weight

    def loss(parameters: Any, x: torch.Tensor) -> torch.Tensor:
        return func.functional_call(m.fc, parameters, (x,)).sum()  # type: ignore[no-any-return]

    return (
        func.grad(lambda w: (rows() @ w).sum())(weight),
        func.grad(lambda w: (w**2).sum())(m.fc2.weight),
        func.grad(loss)(named, rows()),
        func.vjp(lambda w: rows() @ w, weight)[0],
        func.jacrev(lambda w: rows() @ w)(m.fc.bias[:, None]),
        func.vmap(func.grad(loss), in_dims=(None, 0))(named, rows()),
        func.vmap(lambda x: x * m.plist[0] + m.plist[1] * 2)(rows()),
    )


@_use
def grad_transform_alone(m: Net) -> Any:
    return torch.func.grad(lambda w: (w**2).sum())(m.fc.weight)


@_use
def functionalized(m: Net) -> Any:
    return torch.func.functionalize(lambda w: w.clone().add_(rows()[0]))(m.fc.weight)


# What gives something else on the host ------------------------------------------------------------

RANDOM: dict[str, Callable[[Net], Any]] = {
    "randn like": lambda m: torch.randn_like(m.fc.weight),
    "of its shape": lambda m: torch.randn(m.fc.weight.shape, device=m.fc.weight.device),
    "dropout": lambda m: F.dropout(m.fc.weight),
    "dropout of channels": lambda m: F.dropout2d(m.conv.weight),
    "alpha dropout": lambda m: F.alpha_dropout(m.fc.weight, training=True),
    "dropout module": lambda m: nn.Dropout()(m.fc.weight),
    "gumbel": lambda m: F.gumbel_softmax(m.fc.weight),
    "rrelu": lambda m: F.rrelu(m.fc.weight, training=True),
    "pooling": lambda m: F.fractional_max_pool2d(m.conv.weight, 2, output_size=(1, 1)),
    "attention": lambda m: F.scaled_dot_product_attention(
        m.fc.weight[None], m.fc.weight[None], m.fc.weight[None], dropout_p=0.5
    ),
    "exponential": lambda m: m.fc.weight.clone().exponential_(),
    "normal": lambda m: torch.normal(m.fc.bias, 1.0),
    "binomial": lambda m: torch.binomial(torch.full_like(m.fc.bias, 9), m.fc.bias.sigmoid()),
    "distributions": lambda m: [
        torch.distributions.Normal(m.fc.bias, 1.0).sample(),
        torch.distributions.Categorical(m.fc.bias.sigmoid()).sample(),
        torch.distributions.Gamma(m.fc.bias.exp(), m.fc.bias.exp()).sample(),
    ],
    "generator": lambda m: m.fc.bias.clone().normal_(
        generator=torch.Generator("cuda").manual_seed(3)
    ),
}
for _name, _draw in RANDOM.items():
    USES[f"random: {_name}"] = lambda m, draw=_draw: (torch.manual_seed(5), draw(m))[1]


@_use
def autocast(m: Net) -> Any:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return m.fc.weight @ m.fc2.weight, m.fc(rows()), F.linear(rows(), m.fc.weight)


@_use
def asked_where_it_is(m: Net) -> Any:
    w = m.fc.weight
    return (
        w.type(),
        w.type(torch.float64).device,
        w.type("torch.cuda.DoubleTensor").device,
        w.type(torch.DoubleTensor).device,
        w.is_shared(),
        m.idx.type(),
        m.get_buffer("zero").device,
        f"{m.zero:.2f}",
    )


# Operators ----------------------------------------------------------------------------------------


@_use
def indices_on_the_host(m: Net) -> Any:
    here, there = torch.tensor([0, 1]), torch.tensor([0, 1], device="cuda")
    m.fc.weight[0] = rows()[0]
    m.fc.weight[m.idx > 5] = 0
    x = rows()
    x[:, m.idx[:2]] = m.plist[0][:2]
    return m.fc.weight[here], m.fc.weight[there], m.fc.weight[[1, 2]], x, [1, 2, 3][m.idx[1]]


@_use
def odd_dtypes(m: Net) -> Any:
    m.cplx = m.cplx.conj()
    return (
        m.cplx * rows(), m.cplx.is_conj(), torch.view_as_real(m.cplx.resolve_conj()), m.cplx.imag,
        m.f8.float() * rows(), m.f8.view(torch.uint8), bool(m.flag), ~m.flag,
        torch.where(m.flag, rows(), -rows()), m.zero * rows(), m.zero * torch.tensor(2.0),
        torch.cat([m.empty, rows()[0]]), m.empty.sum(), rows()[0][m.idx[2]],
    )  # fmt: skip


@_use
def lists_of_tensors(m: Net) -> Any:
    return (
        torch._foreach_add([m.fc.weight, m.fc2.weight], 1.0), torch.stack(list(m.plist)),
        torch._foreach_mul([rows()], [m.fc.weight[:2]]), sum(m.plist),
        nn.utils.rnn.pad_sequence([m.plist[0], m.plist[1][:3]]),
        nn.utils.get_total_norm([m.fc.weight]),
    )  # fmt: skip


@_use
def written_to_it(m: Net) -> Any:
    torch.mm(rows(), m.fc2.weight, out=m.fc.weight[:2])
    torch.add(m.plist[0], 1, out=m.plist[1])
    m.fc.bias.lerp_(rows()[0], 0.1).addcdiv_(m.plist[0], m.plist[1], value=0.1)
    return m.fc.weight, m.plist[1], m.fc.bias


@_use
def subclasses(m: Net) -> Any:
    weight = m.fc.weight.as_subclass(_Tagged)
    return type(weight).__name__, rows() @ weight, rows().as_subclass(_Tagged) @ m.fc2.weight


class _Tagged(torch.Tensor):
    pass


@_use
def inference_mode(m: Net) -> Any:
    with torch.inference_mode():
        m.table = m.fc.weight.clone()
        row = m.fc.weight[0]
    return m.table * rows()[0], m.table.is_inference(), row * rows()[0], m.fc.weight.is_inference()


@_use
def modes(m: Net) -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as flops, torch.device("cuda"):
        result = m(image()), torch.ones(8) * m.fc.bias, rows() @ m.fc.weight
    with torch.cuda.device(1):
        return result, flops.get_total_flops(), m.fc.weight.to("cuda:0").device


@_use
def custom_operators(m: Net) -> Any:
    aten = torch.ops.aten
    return aten.mul.Tensor(m.fc.weight, 2), aten.mm(rows(), m.fc.weight)


@_use
def exchanged_by_dlpack(m: Net) -> Any:
    return torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(m.fc.weight))


# Copies, threads, devices -------------------------------------------------------------------------


@_use
def in_parallel(m: Net) -> Any:
    both = nn.parallel.parallel_apply([m.fc, m.fc2], [(rows(),), (rows(),)])
    return both, nn.DataParallel(nn.ModuleList([m.fc])).device_ids


@_use
def threads(m: Net) -> Any:
    return in_threads(lambda: m(image()))


@_use
def saved_and_loaded(m: Net) -> Any:
    """A file names the place of what it was saved from, which is the host's for a parked model."""
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    return dict(torch.load(file, map_location="cuda"))


@_use
def copied(m: Net) -> Any:
    part = copy.deepcopy(m.fc)
    part.weight.mul_(2)
    return part(rows()), copy.copy(m.fc)(rows()), copy.deepcopy(m)(image())


@_use
def quantized_on_the_host(m: Net) -> Any:
    """mkldnn and quantized tensors are made of what was sent to the host."""
    host = m.fc.weight.cpu()
    part = copy.deepcopy(m.fc).cpu()
    quantized = torch.quantize_per_tensor(host, 0.1, 0, torch.qint8)
    dynamic = torch.ao.quantization.quantize_dynamic(nn.Sequential(part), {nn.Linear})
    return host.to_mkldnn().to_dense(), quantized.dequantize(), dynamic(rows().cpu())


@_use
def removed_and_put_back(m: Net) -> Any:
    weight, bias = m.fc.weight, m.fc.bias
    del m.fc.weight
    m.fc.bias = None
    m.fc.register_parameter("weight", weight)
    result = m.fc(rows())
    m.fc.bias = bias
    return result, m.fc(rows())
