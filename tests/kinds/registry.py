"""The list of kinds: one file for each library, one line here."""

from __future__ import annotations

import importlib

from tests.kinds.kind import Kind

FORMATS = (
    "plain",
    "bitsandbytes",
    "torchao",
    "optimum_quanto",
    "hqq",
    "sdnq",
    "gguf",
    "comfy_kitchen",
    "diffusers_bfl",
    "transformers_layers",
    "compressed_tensors",
    "gptq_and_awq",
    "peft",
    "torch_modules",
    "wrappers",
    "opaque",
)

KINDS: tuple[Kind, ...] = tuple(
    kind
    for name in FORMATS
    for kind in importlib.import_module(f"tests.kinds.formats.{name}").KINDS
)
