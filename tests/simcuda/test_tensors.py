"""Tensors on a simulated device are real `cuda` tensors: operators, views, storages, randomness,
devices kept apart."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import simcuda

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.int8,
    torch.bool,
    torch.complex64,
]


def test_a_module_moves_and_its_parameters_stay_the_same_objects():
    model = nn.Linear(4, 4)
    weight = model.weight
    model.to("cuda")
    assert model.weight is weight and weight.is_cuda and weight.device == torch.device("cuda:0")
    loss = model(torch.randn(2, 4, device="cuda")).sum()
    loss.backward()
    assert weight.grad.is_cuda


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_survive_the_round_trip_in_every_dtype(dtype):
    raw = torch.randint(0, 2 if dtype == torch.bool else 255, (64,), dtype=torch.uint8)
    host = raw.view(dtype)
    back = host.to("cuda").to("cuda:1").cpu()
    assert back.dtype == dtype and torch.equal(back.view(torch.uint8), raw)


OPERATORS = {
    "matmul": lambda x: x @ x.T,
    "softmax_half": lambda x: x.half().softmax(-1, dtype=torch.float32),
    "layer_norm": lambda x: F.layer_norm(x, (8,)),
    "group_norm": lambda x: F.group_norm(x.view(1, 4, 2, 4), 2),
    "conv": lambda x: F.conv2d(x.view(1, 4, 2, 4), torch.ones(4, 4, 1, 1, device=x.device)),
    "depthwise_conv": lambda x: F.conv2d(
        x.view(1, 4, 2, 4), torch.ones(4, 1, 1, 1, device=x.device), groups=4
    ),
    "attention": lambda x: F.scaled_dot_product_attention(
        *[x.view(1, 2, 2, 8)] * 3, is_causal=True
    ),
    "interpolate": lambda x: F.interpolate(x.view(1, 4, 2, 4), scale_factor=2),
    "embedding": lambda x: F.embedding(torch.tensor([0, 2], device=x.device), x),
    "sort": lambda x: x.sort(),
    "topk": lambda x: x.topk(3),
    "nonzero": lambda x: (x > 0).nonzero(),
    "mask": lambda x: x[x > 0],
    "gather": lambda x: x[:, [1, 2]],
    "cumsum": lambda x: x.cumsum(0),
    "cat": lambda x: torch.cat([x, x]),
    "where": lambda x: torch.where(x > 0, x, 0.0),
    "foreach": lambda x: torch._foreach_mul([x, x], 2.0),
    "complex": lambda x: (x.to(torch.complex64) * 1j).conj().resolve_conj(),
    "arange": lambda x: torch.arange(5, device=x.device),
    "tril_indices": lambda x: torch.tril_indices(3, 3, device=x.device),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_give_what_the_cpu_gives_and_stay_on_the_device(name):
    host = torch.randn(4, 8)
    wanted, got = OPERATORS[name](host), OPERATORS[name](host.cuda())
    for want, have in zip(
        *[r if isinstance(r, (tuple, list)) else [r] for r in (wanted, got)], strict=True
    ):
        assert have.is_cuda
        torch.testing.assert_close(have.cpu(), want, rtol=1e-3, atol=1e-4)


def test_a_forward_is_no_transfer_and_allocates_only_its_outputs():
    weight, x = torch.randn(64, 64, device="cuda"), torch.randn(2, 64, device="cuda")
    simcuda.reset_counters()
    before = simcuda.counters()
    out = F.linear(x, weight)
    after = simcuda.counters()
    assert after.allocated - before.allocated == out.nbytes
    assert after.peak - before.allocated == out.nbytes
    assert (after.h2d_copies, after.d2h_copies, after.d2d_copies) == (0, 0, 0)


def test_in_place_and_out_operators_keep_the_memory_and_may_resize():
    x = torch.zeros(3, device="cuda")
    address = x.data_ptr()
    x.add_(1)
    assert x.data_ptr() == address and x.tolist() == [1, 1, 1]
    out = torch.empty(0, device="cuda")
    torch.add(x, x, out=out)
    assert out.tolist() == [2, 2, 2] and simcuda.counters().allocated >= out.nbytes
    x.resize_(100)
    assert x[:3].tolist() == [1, 1, 1]
    view = x[10:20]
    view.fill_(5)
    assert x[15].item() == 5


@pytest.mark.parametrize(
    "mix",
    [
        lambda x: x + torch.ones(3),
        lambda x: torch.ones(3) + x,
        lambda x: torch.ones(3).mul(x),
        lambda x: F.linear(x, torch.ones(3, 3)),
        lambda x: torch.cat([x, torch.ones(3)]),
        lambda x: F.layer_norm(x, (3,), torch.ones(3)),
        lambda x: torch.where(x > 0, x, torch.ones(3)),
        lambda x: x + torch.ones(3, device="cuda:1"),
        lambda x: torch.cat([torch.ones(3, device="cuda:1"), x]),
    ],
)
def test_operands_on_two_devices_raise_pytorchs_own_error(mix):
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        mix(torch.ones(3, device="cuda"))


def test_what_pytorch_allows_across_devices_is_allowed():
    x = torch.ones(3, device="cuda")
    assert (x + torch.tensor(1.0)).tolist() == [2, 2, 2]
    assert x[torch.tensor([0, 1])].is_cuda
    x[torch.tensor([1])] = 7.0
    assert x.tolist() == [1, 7, 1]
    with pytest.raises(RuntimeError, match="indices should be either on"):
        torch.ones(3)[torch.tensor([0], device="cuda")]


def test_storages_live_on_the_device():
    storage = torch.UntypedStorage(16, device="cuda:1")
    storage.fill_(3)
    assert storage.device == torch.device("cuda:1") and list(storage.cpu()) == [3] * 16
    clone = storage.clone()
    clone.resize_(32)
    assert clone.nbytes() == 32 and clone[15] == 3 and storage.nbytes() == 16
    before = simcuda.counters(1).allocated
    clone.resize_(0)
    assert simcuda.counters(1).allocated == before - 32
    storage.copy_(torch.UntypedStorage(list(range(16))))
    assert storage.tolist() == list(range(16)) and storage.cpu().cuda().device.type == "cuda"


def test_data_can_be_exchanged_with_the_hosts_also_for_inference_tensors():
    model = nn.Linear(8, 8).cuda()
    weight, before = model.weight, simcuda.counters().allocated
    weight.data = weight.data.cpu()
    assert not model.weight.is_cuda and simcuda.counters().allocated == before - 256
    weight.data = weight.data.cuda()
    assert model.weight is weight and weight.is_cuda
    with torch.inference_mode():
        x = torch.ones(3, device="cuda")
        x.data = x.data.cpu()
        x.data = x.data.cuda()
        assert x.is_inference() and (x * 2).tolist() == [2, 2, 2]


def test_saving_loading_copying_pickling():
    model = nn.Linear(3, 3).to("cuda:1")
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for where, index in ((None, 1), ("cpu", -1), ("cuda:0", 0)):
        buffer.seek(0)
        weight = torch.load(buffer, map_location=where)["weight"]
        assert weight.get_device() == index and torch.equal(weight.cpu(), model.weight.cpu())
    assert copy.deepcopy(model).weight.get_device() == 1
    assert pickle.loads(pickle.dumps(model.weight)).get_device() == 1


def test_random_numbers_follow_the_devices_own_generator():
    torch.manual_seed(1)
    first, host = torch.randn(3, device="cuda"), torch.randn(3)
    torch.manual_seed(1)
    assert torch.equal(torch.randn(3), host), (
        "the device's draw must not use up the host's generator"
    )
    assert torch.equal(torch.randn(3, device="cuda"), first)
    generator = torch.Generator("cuda").manual_seed(3)
    draw = torch.rand(3, device="cuda", generator=generator)
    assert torch.equal(draw, torch.rand(3, device="cuda", generator=generator.manual_seed(3)))
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())


def test_training_and_autocast():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    ).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    before = model[0].weight.detach().clone()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = model(torch.randn(2, 3, 4, 4, device="cuda"))
    assert out.dtype == torch.bfloat16
    out.float().pow(2).mean().backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)


def test_recurrent_layers_run_forward():
    for layer in (nn.LSTM(4, 5, 2), nn.GRU(4, 5)):
        x = torch.randn(3, 2, 4)
        with torch.no_grad():
            wanted = layer(x)[0]
            torch.testing.assert_close(layer.cuda()(x.cuda())[0].cpu(), wanted)


def test_two_devices_are_apart():
    with torch.cuda.device(1):
        assert torch.empty(8, device="cuda").get_device() == 1 and torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 0
    before = [simcuda.counters(i).allocated for i in range(2)]
    x = torch.ones(1000, device="cuda:1")
    assert [simcuda.counters(i).allocated - b for i, b in enumerate(before)] == [0, 4000]
    assert (x * 2).get_device() == 1
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device="cuda:7")
