"""A diffusers pipeline whose components wait parked, by diffusers' own ComponentsManager.

    python examples/diffusers_components.py PIPELINE --prompt "a cat" --reserve 3GB

A component comes onto the GPU when it is used, and as much leaves as it lacks room: first what is
used again last. Quantized components leave no byte behind and come back bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import ComponentsManager, DiffusionPipeline

import qmove_core as qmove


def main(arguments: Sequence[str] | None = None) -> Any:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pipeline", help="a folder, or a name")
    parser.add_argument("--prompt", default="a cat")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--images", type=int, default=2, help="one after the other")
    parser.add_argument("--reserve", default="3GB", help="what stays free for the computation")
    args = parser.parse_args(arguments)

    pipe = DiffusionPipeline.from_pretrained(args.pipeline)
    manager = ComponentsManager()  # a ModularPipeline takes it as components_manager=
    for name, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            manager.add(name, component)
    manager.enable_auto_cpu_offload(
        "cuda:0",
        offload_strategy=qmove.diffusers.offload_strategy(
            args.reserve, order=("text_encoder", "text_encoder_2", "unet", "transformer", "vae")
        ),
    )

    images = []
    for seed in range(args.images):
        generator = torch.Generator("cuda:0").manual_seed(seed)
        result = pipe(
            args.prompt, num_inference_steps=args.steps, generator=generator, output_type="np"
        )
        images.append(result.images)
    manager.disable_auto_cpu_offload()  # all of it is parked now, and wakes by itself
    print(f"{len(images)} images; {qmove.stats().copied_bytes / 2**20:.1f} MiB were copied")
    return images


if __name__ == "__main__":
    main()
