"""What programs do with a model and its weights whatever format they have, as if it were home."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.builders.formats import Model, dense, x_of
from tests.builders.threads import in_threads

SITUATIONS: dict[str, Callable[[Model], Any]] = {}


def _use(function: Callable[[Model], Any]) -> Callable[[Model], Any]:
    SITUATIONS[function.__name__.replace("_", " ")] = function
    return function


def between(m: Model) -> torch.Tensor:
    """An input for `base`."""
    return x_of(m).abs()


# Weights that are read ----------------------------------------------------------------------------


@_use
def weights_with_an_input(m: Model) -> Any:
    return F.linear(between(m), dense(m.base).to(m.dtype)), between(m) * m.first.weight[0]


@_use
def weights_alone(m: Model) -> Any:
    return dense(m.base), m.first.weight * 2, m.scale.sum()


@_use
def weights_in_the_layers_operator(m: Model) -> Any:
    return F.linear(between(m), m.base.weight, m.base.bias)


@_use
def weights_transposed(m: Model) -> Any:
    return between(m) @ m.base.weight.t()


@_use
def weights_sent_to_the_host(m: Model) -> Any:
    return m.base.weight.to("cpu"), m.first.weight.cpu().add_(1), m.scale.to("cpu").add_(1)


@_use
def weights_sent_to_the_device(m: Model) -> Any:
    return m.base.weight.to("cuda"), m.base.weight.cuda(), m.first.weight.to(between(m))


@_use
def weights_cloned(m: Model) -> Any:
    return m.base.weight.clone(), m.base.weight.detach(), m.base.weight.data


@_use
def weights_copied(m: Model) -> Any:
    return copy.deepcopy(m.base.weight), copy.copy(m.first.weight), copy.deepcopy(m.scale)


@_use
def tensors_like_weights(m: Model) -> Any:
    weight = m.first.weight
    return (
        torch.zeros_like(weight),
        weight.new_ones(2),
        torch.ones(2).to(weight),
        x_of(m).to(weight),
    )


@_use
def asked_where_they_are(m: Model) -> Any:
    tensors = [m.first.weight, m.base.bias, m.last.weight, m.scale]
    return [(t.device, t.is_cuda, t.is_cpu, t.get_device()) for t in tensors if t is not None]


@_use
def asked_where_the_weight_is(m: Model) -> Any:
    weight = m.base.weight
    return weight.device, weight.is_cuda, weight.is_cpu, weight.get_device()


@_use
def asked_where_the_model_is(m: Model) -> Any:
    return [p.device for p in m.parameters()], [t.device for t in m.state_dict().values()]


@_use
def compared(m: Model) -> Any:
    classes = [tensor.__class__ for tensor in m.state_dict(keep_vars=True).values()]
    return torch.equal(m.first.weight, m.first.weight.clone()), classes


@_use
def printed(m: Model) -> Any:
    return repr(m), str(m.first), f"{m.scale[0]:.2f}"


@_use
def norms(m: Model) -> Any:
    plain = [p for n, p in m.named_parameters() if n != "base.weight"]
    return nn.utils.get_total_norm(plain), torch._foreach_mul(plain, 2.0)


@_use
def exchanged_by_dlpack(m: Model) -> Any:
    return torch.from_dlpack(m.first.weight.detach()), torch.from_dlpack(m.scale)


# Calls of another kind ----------------------------------------------------------------------------


@_use
def a_layer_called(m: Model) -> Any:
    return m.base(between(m)), m.first(x_of(m))


@_use
def a_bound_forward(m: Model) -> Any:
    return m.base.forward(between(m)), m.forward(x_of(m))


@_use
def a_layer_that_shares_the_weight(m: Model) -> Any:
    other = copy.copy(m.base)
    other.__dict__ = m.base.__dict__ | {"_parameters": dict(m.base._parameters)}
    return other(between(m)), m.base(between(m)), other(between(m))


@_use
def other_weights_for_a_call(m: Model) -> Any:
    others = {"first.bias": m.first.bias * 2, "scale": m.scale * 3}
    return torch.func.functional_call(m, others, x_of(m))


@_use
def vmap_over_calls(m: Model) -> Any:
    return torch.vmap(m)(x_of(m))


@_use
def gradients_of_the_input(m: Model) -> Any:
    x = x_of(m).requires_grad_()
    m(x).sum().backward()
    return x.grad


@_use
def grad_transform(m: Model) -> Any:
    return torch.func.grad(lambda x: m(x).sum())(x_of(m))


@_use
def checkpointed(m: Model) -> Any:
    from torch.utils.checkpoint import checkpoint

    x = x_of(m).requires_grad_()
    checkpoint(m, x, use_reentrant=False).sum().backward()
    return x.grad


@_use
def traced(m: Model) -> Any:
    return torch.jit.trace(m.base, between(m), check_trace=False)(between(m))


@_use
def symbolically_traced(m: Model) -> Any:
    return torch.fx.symbolic_trace(m)(x_of(m))


@_use
def autocast(m: Model) -> Any:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return m.first(x_of(m)), m.base(between(m)), x_of(m) @ m.first.weight


@_use
def inference_mode(m: Model) -> Any:
    with torch.inference_mode():
        return m(x_of(m)), m.first.weight * 2, dense(m.base)


@_use
def threads(m: Model) -> Any:
    x = x_of(m)
    return in_threads(lambda: m(x))


@_use
def hooked(m: Model) -> Any:
    hooks = [
        m.base.register_forward_pre_hook(lambda layer, x: (x[0] + dense(layer)[0, 0],)),
        m.base.register_forward_hook(lambda layer, _x, y: y * layer.weight.shape[0]),
    ]
    result = m(x_of(m))
    for hook in hooks:
        hook.remove()
    return result


# Copies and states --------------------------------------------------------------------------------


@_use
def a_deep_copy(m: Model) -> Any:
    return copy.deepcopy(m)(x_of(m)), copy.deepcopy(m.base)(between(m))


@_use
def pickled(m: Model) -> Any:
    """A file names the place of what it was saved from, which is the host's for a parked model."""
    other = pickle.loads(pickle.dumps(m.base))
    return {name: tensor.cuda() for name, tensor in other.state_dict().items()}


@_use
def saved_and_loaded(m: Model) -> Any:
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    return m.load_state_dict(torch.load(file, map_location="cuda", weights_only=False))


@_use
def loaded_again(m: Model) -> Any:
    return m.load_state_dict(m.state_dict())


@_use
def loaded_from_the_host(m: Model) -> Any:
    return m.load_state_dict({name: t.cpu() for name, t in m.state_dict().items()})


@_use
def a_state_assigned(m: Model) -> Any:
    state = {name: t.clone() for name, t in m.state_dict().items()}
    return m.load_state_dict(state, assign=True), m.base.weight.dtype


@_use
def a_state_kept(m: Model) -> Any:
    m.kept = {name: tensor.clone() for name, tensor in m.base.state_dict().items()}
    return m.kept


# Weights that change ------------------------------------------------------------------------------


@_use
def a_parameter_made_of_it(m: Model) -> Any:
    m.base.weight = nn.Parameter(m.base.weight, requires_grad=False)
    return m.base.weight.__class__, m.base(between(m))


@_use
def data_exchanged(m: Model) -> Any:
    m.base.weight.data = m.base.weight.data.clone()
    return m.base(between(m))


@_use
def swapped(m: Model) -> Any:
    torch.utils.swap_tensors(m.first.bias, nn.Parameter(torch.ones_like(m.first.bias)))
    torch.utils.swap_tensors(m.base.weight, copy.deepcopy(m.base.weight))
    return m.base(between(m))


@_use
def average_exchanged(m: Model) -> Any:
    own = [m.first.weight, m.first.bias, m.base.bias, m.last.bias]
    kept = [p.data for p in own]
    for parameter in own:
        parameter.data = parameter.detach() * 0.5
    result = m(x_of(m))
    for parameter, before in zip(own, kept, strict=True):
        parameter.data = before
    return result


@_use
def merged_and_unmerged(m: Model) -> Any:
    change = torch.ones_like(m.first.weight) * 0.5
    m.first.weight.data += change
    result = m(x_of(m))
    m.first.weight.data -= change
    return result


@_use
def trained_adapter(m: Model) -> Any:
    torch.manual_seed(5)
    adapter = nn.Linear(m.inside, m.last.in_features).to(m.first.weight)
    optimizer = torch.optim.SGD([*adapter.parameters(), m.scale], lr=0.1)
    y = m.base(between(m)) + adapter(between(m)) * m.scale[0]
    (y.square().mean() + m.last.bias.sum()).backward()
    optimizer.step()
    return [p.detach() for p in adapter.parameters()]


@_use
def trained_bias(m: Model) -> Any:
    m.first.bias.requires_grad_(True)
    optimizer = torch.optim.AdamW([m.first.bias], lr=0.01, eps=1e-3)
    m(x_of(m)).mean().backward()
    gradient = m.first.bias.grad
    optimizer.step()
    m.first.bias.requires_grad_(False).grad = None
    return gradient, m.first.bias.detach()


@_use
def parametrized(m: Model) -> Any:
    if not parametrize.is_parametrized(m.first):
        parametrizations.weight_norm(m.first)
    return m.first.weight.detach(), m(x_of(m)).detach()


@_use
def cast_and_cast_back(m: Model) -> Any:
    m.last.double()
    result = m.last.weight.device, m.last(x_of(m)[:, : m.last.in_features].double())
    m.last.to(m.dtype)
    return result


@_use
def cast_as_a_whole(m: Model) -> Any:
    m.to(torch.float16 if m.dtype is torch.float32 else torch.float32).to(m.dtype)
    return [p.device for p in m.last.parameters()]


@_use
def a_layer_to_the_host_and_back(m: Model) -> Any:
    m.base.to("cpu")
    m.base.to("cuda")
    return m.base(between(m))


@_use
def all_to_the_host_and_back(m: Model) -> Any:
    m.to("cpu")
    m.to("cuda")
    return m(x_of(m))


@_use
def all_to_the_device(m: Model) -> Any:
    m.to("cuda:0")
    m.cuda()
    return m.last.weight.device


@_use
def initialized(m: Model) -> Any:
    torch.manual_seed(5)
    nn.init.normal_(m.first.weight)
    m.last.reset_parameters()
    return torch.rand_like(m.first.weight)


@_use
def removed_and_put_back(m: Model) -> Any:
    weight = m.base.weight
    del m.base.weight
    m.base.register_parameter("weight", weight)
    return m.base(between(m))


@_use
def a_layer_put_elsewhere(m: Model) -> Any:
    other = nn.Sequential(m.base)
    m.base = nn.Identity()
    result = other(between(m))
    m.base = other[0]
    return result
