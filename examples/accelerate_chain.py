"""A chain of models that run one after the other, by accelerate's `cpu_offload_with_hook`.

    python examples/accelerate_chain.py FIRST SECOND THIRD --prompt "Tell me more"

The line that changes is the import. Each model leaves before the next one comes, and the second
time it leaves without a copy.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qmove_core.accelerate import cpu_offload_with_hook  # instead of: from accelerate import ...


def main(arguments: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--prompt", default="Tell me more")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(arguments)

    chain: list[tuple[Any, Any]] = []
    hook = None
    for name in args.models:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float16)
        model, hook = cpu_offload_with_hook(model, "cuda:0", prev_module_hook=hook)
        chain.append((model, AutoTokenizer.from_pretrained(name)))

    text = args.prompt
    for _ in range(args.rounds):
        for model, tokenizer in chain:
            inputs = tokenizer(text, return_tensors="pt").to("cuda:0")
            tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
            text = tokenizer.decode(tokens[0], skip_special_tokens=True)
        assert hook is not None
        hook.offload()  # the last one has no successor
    print(text)
    return text


if __name__ == "__main__":
    main()
