"""PEFT's adapters: LoRA and DoRA on plain, int8 and nf4 weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.kinds.formats.bitsandbytes import linear_4bit, linear_8bit
from tests.kinds.kind import WIDTH, Kind


def adapted(base: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from peft import LoraConfig, get_peft_model

        model = nn.Sequential(base(), nn.Linear(WIDTH, WIDTH).half().cuda())
        config = LoraConfig(
            r=8, target_modules=["0"], init_lora_weights=False, lora_dropout=0.0, **options
        )
        return get_peft_model(model, config).cuda()

    return build


def plain() -> nn.Module:
    return nn.Linear(WIDTH, WIDTH).half().cuda()


BASES = {
    "fp16": plain,
    "int8": lambda: linear_8bit(0.0),
    "nf4": lambda: linear_4bit("nf4", nested=True),
}

LOST = {"move to the CPU": "in a forward on a CPU PEFT's DoRA itself loses the scales of int8"}

KINDS = tuple(
    Kind(
        f"PEFT {adapter} on {name}",
        adapted(base, **options),
        dtype=torch.float16,
        package="peft",
        cpu="close",
        keeps_dtype=name != "fp16",
        is_whole=True,
        cannot=LOST if (name, adapter) == ("int8", "DoRA") else {},
    )
    for name, base in BASES.items()
    for adapter, options in (("LoRA", {}), ("DoRA", {"use_dora": True}))
)
