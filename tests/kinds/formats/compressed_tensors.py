"""compressed-tensors: quantized and packed layers as its compressor leaves them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from tests.kinds.kind import WIDTH, Kind


def compressed(scheme: str, **arguments: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from compressed_tensors.compressors import compress_module
        from compressed_tensors.quantization import QuantizationStatus, apply_quantization_config
        from compressed_tensors.quantization.quant_config import QuantizationConfig

        model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
        config = QuantizationConfig(
            config_groups={scheme: ["Linear"]}, quantization_status=QuantizationStatus.INITIALIZED
        )
        apply_quantization_config(model, config)
        for name, parameter in model[0].named_parameters():
            if name.endswith("scale"):
                parameter.data.fill_(0.01)
        compress_module(model[0])
        return model.cuda()

    return build


KINDS = tuple(
    Kind(
        f"compressed-tensors {scheme}",
        compressed(scheme),
        package="compressed-tensors",
        kernels="a compressed layer computes in vLLM alone",
        cpu="bytes",
        is_whole=True,
    )
    for scheme in ("W8A16", "W4A16", "FP8", "W8A8", "NVFP4A16")
)
