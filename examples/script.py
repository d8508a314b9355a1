"""One script, several models that don't fit together: each is loaded once, and they take turns.

    python examples/script.py WRITER CRITIC --prompt "A poem about the sea" --rounds 3

WRITER and CRITIC are folders (or names) of two causal language models of transformers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qmove_core as qmove


def answer(model: Any, tokenizer: Any, prompt: str) -> str:
    """What the model adds to a prompt. A parked model wakes here, by being used."""
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def main(arguments: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("writer")
    parser.add_argument("critic")
    parser.add_argument("--prompt", default="A poem about the sea")
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args(arguments)

    writer = AutoModelForCausalLM.from_pretrained(args.writer, device_map={"": 0})
    writes = AutoTokenizer.from_pretrained(args.writer)
    qmove.park(writer)  # all of its VRAM is free for the second model
    critic = AutoModelForCausalLM.from_pretrained(args.critic, device_map={"": 0})
    reads = AutoTokenizer.from_pretrained(args.critic)

    texts = []
    for _ in range(args.rounds):
        qmove.swap(critic, writer)  # the one leaves while the other comes
        text = answer(writer, writes, args.prompt)
        qmove.swap(writer, critic)
        texts += [text, answer(critic, reads, text or args.prompt)]

    with qmove.parked(critic):  # neither is in VRAM inside
        print(f"{torch.cuda.mem_get_info()[0] / 2**30:.2f} GiB of VRAM are free")
    print(*texts, sep="\n")
    return texts


if __name__ == "__main__":
    main()
