"""How each kind of quantized layer becomes a plain one with the same values, and is quantized again."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..class_variants import own_class
from ..model.kinds.bitsandbytes import PACKED, is_packed_for_cpu
from ..model.quantized import is_quantizing_wrapper
from .layer_changes import Change


@dataclass(frozen=True)
class Recipe:
    """What it takes to quantize a layer again as it was. It holds no tensor.

    Attributes:
        cls: the class of the quantized layer.
        dtype: of the values that it was quantized from.
        options: how its weight was quantized.
        attributes: what the quantized layer has in its `__dict__` and a plain one has not.
    """

    format: LayerFormat
    cls: type[nn.Module]
    dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)


class LayerFormat:
    """One way in which layers are quantized."""

    def is_format_of(self, module: nn.Module) -> bool:
        raise NotImplementedError

    def holders(self, module: nn.Module) -> list[object]:
        """The objects of a layer that hold its quantized weights; a plain layer does without them."""
        return [module.weight]

    def obstacle(self, module: nn.Module) -> str:
        """Why the layer cannot be dequantized; empty if it can."""
        return ""

    def irreversible(self, recipe: Recipe) -> str:
        """Why a layer cannot be quantized again; empty if it can."""
        return ""

    def numel(self, module: nn.Module) -> int:
        """The number of weights of a quantized layer."""
        return module.weight.numel()  # type: ignore[operator, no-any-return]

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        """About how many bytes that many weights take when they are quantized."""
        return numel * recipe.dtype.itemsize

    def recipe(self, module: nn.Module) -> Recipe:
        raise NotImplementedError

    def dequantize(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        made: dict[int, nn.Parameter],
    ) -> Change:
        """The layer with plain weights in `dtype` on `device`. `made`: those made already, by the id of the old one."""
        raise NotImplementedError

    def quantize(
        self, module: nn.Module, recipe: Recipe, device: torch.device, made: dict[int, nn.Parameter]
    ) -> Change:
        """The layer as its recipe says, on `device`."""
        raise NotImplementedError


class BitsAndBytesFormat(LayerFormat):
    """What 4 and 8 bit have in common. Weights that bitsandbytes has not quantized yet count as their own values."""

    names: ClassVar[tuple[str, ...]]  # classes of bitsandbytes.nn
    state_names: ClassVar[tuple[str, ...]]  # attributes of the layer that hold tensors
    option_names: ClassVar[tuple[str, ...]]  # attributes of the layer that say how it computes

    def is_format_of(self, module: nn.Module) -> bool:
        package = sys.modules.get("bitsandbytes")
        return package is not None and isinstance(
            module, tuple(getattr(package.nn, name) for name in self.names)
        )

    def holders(self, module: nn.Module) -> list[object]:
        return [
            module.weight,
            *(module.__dict__[name] for name in self.state_names if name in module.__dict__),
        ]

    def dequantize(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        made: dict[int, nn.Parameter],
    ) -> Change:
        key = id(module.weight)
        if key not in made:
            requires_grad = module.weight.requires_grad and module.weight.is_floating_point()  # type: ignore[operator]
            made[key] = nn.Parameter(
                self.values(module, device, dtype), requires_grad=bool(requires_grad)
            )
        plain = plain_class(own_class(module))
        return Change(
            module, plain, {"weight": made[key]}, dropped=self.state_names + self.option_names
        )

    def values(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        raise NotImplementedError

    def attributes_of(self, module: nn.Module) -> dict[str, Any]:
        return {
            name: module.__dict__[name] for name in self.option_names if name in module.__dict__
        }


class FourBit(BitsAndBytesFormat):
    """`Linear4bit` and `Embedding4bit` with their subclasses."""

    names = ("Linear4bit", "Embedding4bit")
    state_names = ("quant_state",)
    option_names = (
        "compute_dtype",
        "compute_type_is_set",
        "quant_storage",
        "support_avx512bf16_for_cpu",
        "dtype",
    )

    def obstacle(self, module: nn.Module) -> str:
        if is_packed_for_cpu(module.weight):
            return PACKED
        weight: Any = module.weight
        quantized = getattr(weight, "bnb_quantized", True)
        return "its quant state is lost" if quantized and self._state(module) is None else ""

    def numel(self, module: nn.Module) -> int:
        state = self._state(module)
        return super().numel(module) if state is None else state.shape.numel()

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        scale = 1 if recipe.options["compress_statistics"] else 4
        return numel // 2 + numel // recipe.options["blocksize"] * scale + 2048

    def values(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        original = self._state(module)
        weight: Any = module.weight
        if original is None:
            return weight.data.to(device, dtype)
        state = copy.copy(original)  # QuantState.to() changes the state in place
        state.state2 = copy.copy(original.state2)
        state.to(device)
        if dtype in (torch.float16, torch.bfloat16, torch.float32):
            state.dtype = dtype  # the kernel then rounds once
        return dequantize_4bit(weight.data.to(device), state).to(dtype)

    def recipe(self, module: nn.Module) -> Recipe:
        weight: Any = module.weight
        state = self._state(module)
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        options = {name: getattr(weight, name) for name in names}
        dtype = weight.dtype if state is None else state.dtype
        return Recipe(self, own_class(module), dtype, options, self.attributes_of(module))

    def quantize(
        self, module: nn.Module, recipe: Recipe, device: torch.device, made: dict[int, nn.Parameter]
    ) -> Change:
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        weight: Any = module.weight
        if id(weight) not in made:
            values = weight.data.to(device, recipe.dtype).contiguous()
            options = {
                **recipe.options,
                "compress_statistics": bool(recipe.options["compress_statistics"]),
            }
            packed, state = quantize_4bit(values, **options)
            made[id(weight)] = Params4bit(
                packed,
                requires_grad=False,
                quant_state=state,
                module=module,
                bnb_quantized=True,
                **recipe.options,
            )
        quantized: Any = made[id(weight)]
        return Change(
            module,
            recipe.cls,
            {"weight": quantized},
            {**recipe.attributes, "quant_state": quantized.quant_state},
        )

    @staticmethod
    def _state(module: nn.Module) -> Any:
        on_weight = getattr(
            module.weight, "quant_state", None
        )  # FSDP leaves it on the module alone
        return module.__dict__.get("quant_state") if on_weight is None else on_weight


class EightBit(BitsAndBytesFormat):
    """`Linear8bitLt` and `Embedding8bit`."""

    names = ("Linear8bitLt", "Embedding8bit")
    state_names = ("state",)
    option_names = ("index", "dtype")

    def obstacle(self, module: nn.Module) -> str:
        weight: Any = module.weight
        lost = weight.dtype == torch.int8 and self._row_scales(module) is None
        return (
            "its row scales (SCB) are lost; an offload hook or a .to() of its parent dropped them"
            if lost
            else ""
        )

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        return (
            super().nbytes(recipe, numel)
            if recipe.options["has_fp16_weights"]
            else numel + numel // 16 + 2048
        )

    def values(self, module: nn.Module, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        weight: Any = module.weight
        if weight.dtype != torch.int8:
            return weight.data.to(device, dtype)
        scales = self._row_scales(module).to(device).view(-1, 1)
        return weight.data.to(device, torch.float32).mul_(scales).div_(127).to(dtype)

    def recipe(self, module: nn.Module) -> Recipe:
        weight: Any = module.weight
        state = vars(module.state) if "state" in module.__dict__ else {}
        options = {
            "has_fp16_weights": weight.has_fp16_weights,
            "requires_grad": weight.requires_grad,
            "state": {
                name: value
                for name, value in state.items()
                if isinstance(value, (bool, int, float))
            },
        }
        dtype = (
            weight.dtype if weight.has_fp16_weights else torch.float16
        )  # bitsandbytes quantizes from float16 always
        return Recipe(self, own_class(module), dtype, options, self.attributes_of(module))

    def quantize(
        self, module: nn.Module, recipe: Recipe, device: torch.device, made: dict[int, nn.Parameter]
    ) -> Change:
        import bitsandbytes
        from bitsandbytes.functional import int8_vectorwise_quant
        from bitsandbytes.nn import Int8Params

        weight: Any = module.weight
        options = recipe.options
        if id(weight) not in made:
            values = weight.data.to(device, recipe.dtype).contiguous()
            scales = None
            if not options["has_fp16_weights"]:
                values, scales, _outliers = int8_vectorwise_quant(values)
            codes = None if scales is None else values
            flags = {name: options[name] for name in ("has_fp16_weights", "requires_grad")}
            made[id(weight)] = Int8Params(values, **flags, CB=codes, SCB=scales)
        attributes = dict(recipe.attributes)
        if issubclass(recipe.cls, nn.Linear):
            attributes["state"] = state = bitsandbytes.MatmulLtState()
            vars(state).update(options["state"])
        return Change(module, recipe.cls, {"weight": made[id(weight)]}, attributes)

    @staticmethod
    def _row_scales(module: nn.Module) -> Any:
        on_weight = getattr(module.weight, "SCB", None)
        return (
            getattr(module.__dict__.get("state"), "SCB", None) if on_weight is None else on_weight
        )


class Wrapped(LayerFormat):
    """Layers of torchao and optimum-quanto: weights of a wrapper subclass that knows how to dequantize itself."""

    def is_format_of(self, module: nn.Module) -> bool:
        return bool(self._weights(module))

    def holders(self, module: nn.Module) -> list[object]:
        return list(self._weights(module).values())

    def numel(self, module: nn.Module) -> int:
        return sum(weight.numel() for weight in self._weights(module).values())

    def obstacle(self, module: nn.Module) -> str:
        if getattr(module, "activation_qtype", None) is not None:
            return "its activations are quantized as well, so that a plain layer would not compute the same"
        without = [
            w
            for w in self._weights(module).values()
            if not callable(getattr(w, "dequantize", None))
        ]
        return f"{type(without[0]).__qualname__} has no dequantize()" if without else ""

    def irreversible(self, recipe: Recipe) -> str:
        if _is_of_quanto(recipe.cls):
            return ""
        return "its library does not keep the config that it was quantized with; quantize it again with that library"

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        return numel * recipe.options["bits"] // 8 + numel // 8 + 2048

    def recipe(self, module: nn.Module) -> Recipe:
        bits = getattr(
            module.__dict__.get("weight_qtype"), "bits", 8
        )  # quanto's; the rest stays among the attributes
        dtype = next(iter(self._weights(module).values())).dtype
        return Recipe(self, own_class(module), dtype, {"bits": bits})

    def dequantize(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        made: dict[int, nn.Parameter],
    ) -> Change:
        weights = self._weights(module)
        for weight in weights.values():
            if id(weight) not in made:
                values = weight.dequantize().to(device, dtype)  # type: ignore[no-untyped-call]
                made[id(weight)] = nn.Parameter(values, requires_grad=False)
        own = own_class(module)
        plain = _plain_class_over(own) if _is_of_quanto(own) else own
        return Change(module, plain, {name: made[id(weight)] for name, weight in weights.items()})

    def quantize(
        self, module: nn.Module, recipe: Recipe, device: torch.device, made: dict[int, nn.Parameter]
    ) -> Change:
        weight: Any = module.weight
        if id(weight) not in made:
            like = copy.copy(module)  # its qweight is what freeze() makes the weight of
            like.__dict__["_parameters"] = {
                **module._parameters,
                "weight": weight.data.to(device, recipe.dtype),
            }
            like.__class__ = recipe.cls
            qweight: Any = like.qweight
            made[id(weight)] = nn.Parameter(qweight, requires_grad=False)
        return Change(module, recipe.cls, {"weight": made[id(weight)]})

    @staticmethod
    def _weights(module: nn.Module) -> dict[str, nn.Parameter]:
        return {
            name: p
            for name, p in module._parameters.items()
            if p is not None and is_quantizing_wrapper(p)
        }


FORMATS: tuple[LayerFormat, ...] = (FourBit(), EightBit(), Wrapped())


def format_of(module: nn.Module) -> LayerFormat | None:
    """The format of a quantized layer, None for a module that is not quantized itself."""
    return next(
        (layer_format for layer_format in FORMATS if layer_format.is_format_of(module)), None
    )


def plain_class(cls: type) -> type[nn.Module]:
    """PyTorch's own layer below a quantized class: `nn.Linear` for `Linear4bit`."""
    return next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules."))


@functools.cache
def _plain_class_over(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that computes like the plain layer below. (Python refuses quanto's layers the plain class itself.)"""
    return type(cls)(f"Dequantized{cls.__name__}", (cls,), {"forward": plain_class(cls).forward})  # type: ignore[misc,return-value]


def _is_of_quanto(cls: type) -> bool:
    return any(base.__name__ == "QModuleMixin" for base in cls.__mro__)
