"""Models of transformers straight into RAM: none is in VRAM before it is used.

    python examples/transformers_parked.py MODEL [MODEL ...] --quantize int8

With --quantize each weight goes to the GPU alone, is quantized there and leaves again, so that the
model need not fit unquantized. The first use brings the model home.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import qmove_core as qmove

QUANTIZED = {
    "no": None,
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
}


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--quantize", choices=QUANTIZED, default="no")
    parser.add_argument("--prompt", default="Once upon a time")
    args = parser.parse_args(arguments)

    loaded: dict[str, Any] = {}
    for name in args.models:
        loaded[name] = qmove.from_pretrained(
            AutoModelForCausalLM,
            name,
            parked=True,
            dtype=torch.float16,
            quantization_config=QUANTIZED[args.quantize],
        )
    figures = qmove.stats()
    print(f"{len(loaded)} models wait; {figures.file_bytes / 2**20:.0f} MiB of them in their files")

    answers = []
    for name, model in loaded.items():
        tokenizer = AutoTokenizer.from_pretrained(name)
        inputs = tokenizer(args.prompt, return_tensors="pt").to(model.device)
        with qmove.resident(model):  # home inside, parked again after it
            tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        answers.append(tokenizer.decode(tokens[0], skip_special_tokens=True))
    print(*answers, sep="\n")
    return answers


if __name__ == "__main__":
    main()
