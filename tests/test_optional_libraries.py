"""qmove needs PyTorch and little else: every quantization, loading and drawing library is optional."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
for name in ("accelerate", "bitsandbytes", "diffusers", "matplotlib", "optimum", "torchao", "transformers"):
    sys.modules[name] = None  # importing it fails
import torch
import qmove_core as qmove

model = torch.nn.Linear(3, 3)
before = model.weight.clone()
qmove.park(model)
qmove.restore(model)
qmove.enable_to(model).to("cpu")
qmove.disable_to(model)
assert qmove.materialize_meta_tensors(model) is model
assert torch.equal(model.weight, before)
assert "parameter" in str(qmove.inventory(model))
print("all of it works")
"""


def test_without_any_of_them_the_core_works() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "all of it works"
