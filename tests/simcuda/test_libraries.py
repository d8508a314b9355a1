"""Libraries that look for CUDA find the simulated device, and those with kernels of their own do
without them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import simcuda


def test_bitsandbytes_runs_with_its_device_neutral_kernels():
    bnb = pytest.importorskip("bitsandbytes")
    x = torch.randn(2, 64, device="cuda", dtype=torch.float16)
    eight = bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False).cuda()
    assert eight.weight.dtype == torch.int8 and eight.weight.is_cuda and eight(x).isfinite().all()
    four = bnb.nn.Linear4bit(64, 64, compute_dtype=torch.float16, quant_type="nf4").cuda()
    assert four.weight.quant_state.absmax.is_cuda and four(x).isfinite().all()
    tokens = torch.tensor([1, 2], device="cuda")
    for embedding in (bnb.nn.Embedding8bit(64, 64), bnb.nn.Embedding4bit(64, 64)):
        assert embedding.cuda()(tokens).is_cuda
    assert torch.cuda.is_available(), "hidden only while the package is imported"


def test_transformers_generate_copies_no_weights():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    model = transformers.LlamaForCausalLM(config).half().cuda()
    tokens = torch.tensor([[1, 2, 3]], device="cuda")
    simcuda.reset_counters()
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False
    )
    moved = simcuda.counters().h2d_bytes + simcuda.counters().d2h_bytes
    assert out.is_cuda and moved < 1000 < sum(p.nbytes for p in model.parameters())


def test_accelerate_dispatches_over_both_devices_and_the_cpu():
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    wanted = model(torch.ones(1, 4))
    model = accelerate.dispatch_model(model, {"0": 0, "1": 1, "2": "cpu"}, main_device=0)
    torch.testing.assert_close(model(torch.ones(1, 4)).cpu(), wanted)


def test_quanto_and_torchao_weights_run():
    quanto = pytest.importorskip("optimum.quanto")
    torchao = pytest.importorskip("torchao.quantization")
    for weights in (quanto.qint8, quanto.qint4):
        model = nn.Sequential(nn.Linear(128, 128))
        quanto.quantize(model, weights=weights)
        quanto.freeze(model)
        assert model.cuda()(torch.randn(2, 128, device="cuda")).isfinite().all()
    model = nn.Sequential(nn.Linear(128, 128)).to(torch.bfloat16).cuda()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert model(torch.randn(2, 128, device="cuda", dtype=torch.bfloat16)).isfinite().all()
