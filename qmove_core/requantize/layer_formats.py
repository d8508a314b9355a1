"""How each kind of quantized layer becomes a plain one, and is quantized again."""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from ..class_variants import own_class
from ..model.kinds.bitsandbytes import PACKED
from ..model.kinds.bitsandbytes_layout import is_packed_for_cpu, quant_state_of, row_scales_of
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
        order: of all attributes of the quantized layer.
    """

    format: LayerFormat
    cls: type[nn.Module]
    dtype: torch.dtype
    options: Mapping[str, Any] = field(default_factory=dict)
    attributes: Mapping[str, Any] = field(default_factory=dict)
    order: tuple[str, ...] = ()


class LayerFormat:
    """One way in which layers are quantized. `made` has the new weights that layers share."""

    bitsandbytes_classes: ClassVar[tuple[str, ...]] = ()
    own_attributes: ClassVar[tuple[str, ...]] = ()  # what a plain layer does without
    weight_options: ClassVar[tuple[str, ...]] = ()  # how a weight was quantized
    weight_state: ClassVar[tuple[str, ...]] = ()  # what else the library keeps on a weight

    def is_format_of(self, module: nn.Module) -> bool:
        package = sys.modules.get("bitsandbytes")
        return package is not None and isinstance(
            module, tuple(getattr(package.nn, name) for name in self.bitsandbytes_classes)
        )

    def weights(self, module: nn.Module) -> dict[str, Any]:
        """The quantized parameters of a layer, by name."""
        return {"weight": module.weight}

    def holders(self, module: nn.Module) -> list[object]:
        """The objects of a layer that hold its quantized weights; a plain layer has none."""
        return [*self.weights(module).values(), *self.attributes_of(module).values()]

    def attributes_of(self, module: nn.Module) -> dict[str, Any]:
        return {
            name: module.__dict__[name] for name in self.own_attributes if name in module.__dict__
        }

    def obstacle(self, module: nn.Module) -> str:
        """Why the layer cannot be dequantized; empty if it can."""
        return ""

    def irreversible(self, recipe: Recipe) -> str:
        """Why a layer cannot be quantized again; empty if it can."""
        return ""

    def numel(self, module: nn.Module) -> int:
        """The number of weights of a quantized layer."""
        return sum(weight.numel() for weight in self.weights(module).values())

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        """About how many bytes that many weights take when they are quantized."""
        raise NotImplementedError

    def recipe(self, module: nn.Module) -> Recipe:
        attributes = self.attributes_of(module)
        attributes.pop("quant_state", None)  # a new one comes with the weight
        if "state" in attributes:  # its tensors come back with the first forward
            attributes["state"] = state = copy.copy(attributes["state"])
            tensors = [name for name, v in vars(state).items() if isinstance(v, torch.Tensor)]
            vars(state).update(dict.fromkeys(tensors))
        weight = next(iter(self.weights(module).values()))
        dtype, options = self.options(module, weight)
        order = tuple(module.__dict__)
        return Recipe(self, own_class(module), dtype, options, attributes, order)

    def options(self, module: nn.Module, weight: Any) -> tuple[torch.dtype, dict[str, Any]]:
        """The dtype that a weight was quantized from, and how."""
        raise NotImplementedError

    def librarys_attributes(self, weight: Any) -> Iterable[str]:
        """What the library keeps in the `__dict__` of a weight; the rest is the user's."""
        return (*self.weight_options, *self.weight_state)

    def dequantize(
        self,
        module: nn.Module,
        device: torch.device,
        dtype: torch.dtype,
        made: dict[int, nn.Parameter],
    ) -> Change:
        """The layer with plain weights in `dtype` on `device`."""
        parameters = {}
        for name, weight in self.weights(module).items():
            if id(weight) not in made:
                trains = weight.requires_grad and weight.is_floating_point()
                made[id(weight)] = nn.Parameter(
                    self.values(module, weight, device, dtype),
                    requires_grad=trains and not is_quantizing_wrapper(weight),
                )
                _hand_on(weight, made[id(weight)], self.librarys_attributes(weight))
            parameters[name] = made[id(weight)]
        cls = self.plain_class(own_class(module))
        return Change(module, cls, parameters, dropped=self.own_attributes)

    def quantize(
        self, module: nn.Module, recipe: Recipe, device: torch.device, made: dict[int, nn.Parameter]
    ) -> Change:
        """The layer as its recipe says, on `device`."""
        weight: Any = module.weight
        if id(weight) not in made:
            values = weight.data.to(device, recipe.dtype)
            made[id(weight)] = self.quantized(module, recipe, values)
            _hand_on(weight, made[id(weight)])
        attributes = {**recipe.attributes, **self.attributes_with(made[id(weight)])}
        return Change(
            module, recipe.cls, {"weight": made[id(weight)]}, attributes, order=recipe.order
        )

    def plain_class(self, cls: type) -> type[nn.Module]:
        """PyTorch's own layer below a quantized class: `nn.Linear` for `Linear4bit`."""
        return next(base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules."))

    def values(
        self, module: nn.Module, weight: Any, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        raise NotImplementedError

    def quantized(self, module: nn.Module, recipe: Recipe, values: torch.Tensor) -> nn.Parameter:
        raise NotImplementedError

    def attributes_with(self, weight: Any) -> dict[str, Any]:
        """The attributes of a layer that come from its quantized weight."""
        return {}


class FourBit(LayerFormat):
    """`Linear4bit` and `Embedding4bit`. What is not quantized yet counts as its own values."""

    bitsandbytes_classes = ("Linear4bit", "Embedding4bit")
    own_attributes = (
        "quant_state",
        "compute_dtype",
        "compute_type_is_set",
        "quant_storage",
        "support_avx512bf16_for_cpu",
        "dtype",
    )
    weight_options = (
        "blocksize",
        "compress_statistics",
        "quant_type",
        "quant_storage",
        "requires_grad",
    )
    weight_state = ("quant_state", "bnb_quantized", "module", "data")

    def obstacle(self, module: nn.Module) -> str:
        if is_packed_for_cpu(module.weight):
            return PACKED
        quantized = getattr(module.weight, "bnb_quantized", True)
        return "its quant state is lost" if quantized and quant_state_of(module) is None else ""

    def numel(self, module: nn.Module) -> int:
        state = quant_state_of(module)
        return super().numel(module) if state is None else state.shape.numel()

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        scale = 1 if recipe.options["compress_statistics"] else 4
        return numel // 2 + numel // recipe.options["blocksize"] * scale + 2048

    def values(
        self, module: nn.Module, weight: Any, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        original = quant_state_of(module)
        if original is None:
            return weight.data.to(device, dtype)
        state = copy.copy(original)  # QuantState.to() changes the state in place
        state.state2 = copy.copy(original.state2)
        state.to(device)
        if dtype in (torch.float16, torch.bfloat16, torch.float32):
            state.dtype = dtype  # the kernel then rounds once
        return dequantize_4bit(weight.data.to(device), state).to(dtype)

    def options(self, module: nn.Module, weight: Any) -> tuple[torch.dtype, dict[str, Any]]:
        state = quant_state_of(module)
        options = {name: getattr(weight, name) for name in self.weight_options}
        if state is None:
            return weight.dtype, options
        return state.dtype, options | {"code": state.code.tolist()}

    def quantized(self, module: nn.Module, recipe: Recipe, values: torch.Tensor) -> nn.Parameter:
        from bitsandbytes.functional import quantize_4bit
        from bitsandbytes.nn import Params4bit

        options = {
            name: recipe.options[name] for name in ("blocksize", "quant_type", "quant_storage")
        }
        nested = bool(recipe.options["compress_statistics"])
        packed, state = quantize_4bit(values.contiguous(), compress_statistics=nested, **options)
        if state.code.dtype != torch.float32:  # it was made in PyTorch's default dtype
            code = recipe.options["code"]
            state.code = torch.tensor(code, dtype=torch.float32, device=packed.device)
        given = {name: recipe.options[name] for name in self.weight_options}
        return Params4bit(packed, quant_state=state, module=module, bnb_quantized=True, **given)

    def attributes_with(self, weight: Any) -> dict[str, Any]:
        return {"quant_state": weight.quant_state}


class EightBit(LayerFormat):
    """`Linear8bitLt` and `Embedding8bit`. What is not quantized yet counts as its own values."""

    bitsandbytes_classes = ("Linear8bitLt", "Embedding8bit")
    own_attributes = ("state", "index", "dtype")
    weight_options = ("has_fp16_weights", "requires_grad")
    weight_state = ("CB", "SCB", "data")

    def obstacle(self, module: nn.Module) -> str:
        if module.weight.dtype == torch.int8 and row_scales_of(module, module.weight) is None:
            return (
                "its row scales (SCB) are lost: an offload hook or its parent's .to() dropped them"
            )
        return ""

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        if recipe.options["has_fp16_weights"]:
            return numel * recipe.dtype.itemsize
        return numel + numel // 16 + 2048

    def values(
        self, module: nn.Module, weight: Any, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        if weight.dtype != torch.int8:
            return weight.data.to(device, dtype)
        scales = row_scales_of(module, weight).to(device).view(-1, 1)
        return weight.data.to(device, torch.float32).mul_(scales).div_(127).to(dtype)

    def options(self, module: nn.Module, weight: Any) -> tuple[torch.dtype, dict[str, Any]]:
        # bitsandbytes quantizes from float16 always
        dtype = weight.dtype if weight.has_fp16_weights else torch.float16
        return dtype, {name: getattr(weight, name) for name in self.weight_options}

    def quantized(self, module: nn.Module, recipe: Recipe, values: torch.Tensor) -> nn.Parameter:
        from bitsandbytes.functional import int8_vectorwise_quant
        from bitsandbytes.nn import Int8Params

        values, codes, scales = values.contiguous(), None, None
        if not recipe.options["has_fp16_weights"]:
            values, scales, _outliers = int8_vectorwise_quant(values)
            codes = values
        return Int8Params(values, CB=codes, SCB=scales, **recipe.options)


class Wrapped(LayerFormat):
    """Layers of torchao and optimum-quanto, whose weights can dequantize themselves."""

    def is_format_of(self, module: nn.Module) -> bool:
        return bool(self.weights(module))

    def weights(self, module: nn.Module) -> dict[str, Any]:
        return {
            name: p
            for name, p in module._parameters.items()
            if p is not None and is_quantizing_wrapper(p)
        }

    def obstacle(self, module: nn.Module) -> str:
        if getattr(module, "activation_qtype", None) is not None:
            return (
                "its activations are quantized as well, so a plain layer would not compute the same"
            )
        for weight in self.weights(module).values():
            if not callable(getattr(weight, "dequantize", None)):
                return f"{type(weight).__qualname__} has no dequantize()"
        return ""

    def irreversible(self, recipe: Recipe) -> str:
        if _is_of_quanto(recipe.cls):
            return ""
        return (
            "its library does not keep the config that it was quantized with; quantize it again "
            "with that library"
        )

    def nbytes(self, recipe: Recipe, numel: int) -> int:
        return numel * recipe.options["bits"] // 8 + numel // 8 + 2048

    def options(self, module: nn.Module, weight: Any) -> tuple[torch.dtype, dict[str, Any]]:
        # quanto's; the rest stays among the attributes
        bits = getattr(module.__dict__.get("weight_qtype"), "bits", 8)
        return weight.dtype, {"bits": bits, "requires_grad": weight.requires_grad}

    def librarys_attributes(self, weight: Any) -> Iterable[str]:
        inner, context = weight.__tensor_flatten__()
        parts = {name: getattr(weight, name) for name in inner}
        try:
            cls, size, stride = type(weight), weight.size(), weight.stride()
            fresh = cls.__tensor_unflatten__(parts, context, size, stride)
        except Exception:  # the library's own code: then nothing is known to be the user's
            fresh = weight
        return (*vars(fresh), "_is_param")  # the latter is nn.Parameter's mark on a subclass

    def values(
        self, module: nn.Module, weight: Any, device: torch.device, dtype: torch.dtype
    ) -> torch.Tensor:
        return weight.dequantize().to(device, dtype)  # type: ignore[no-any-return]

    def plain_class(self, cls: type) -> type[nn.Module]:
        return _plain_class_over(cls) if _is_of_quanto(cls) else cls

    def quantized(self, module: nn.Module, recipe: Recipe, values: torch.Tensor) -> nn.Parameter:
        like = copy.copy(module)  # its qweight is what freeze() makes the weight of
        like.__dict__["_parameters"] = {**module._parameters, "weight": values}
        like.__class__ = recipe.cls
        qweight: Any = like.qweight
        return nn.Parameter(qweight, requires_grad=recipe.options["requires_grad"])


def _hand_on(weight: Any, to: Any, without: Iterable[str] = ()) -> None:
    """Gives a new weight what was set on the old one, such as a trainer's note."""
    given, has = vars(weight), vars(to)
    has.update({name: given[name] for name in given.keys() - {*without, *has}})


_FORMATS: tuple[LayerFormat, ...] = (FourBit(), EightBit(), Wrapped())


def format_of(module: nn.Module) -> LayerFormat | None:
    """The format of a quantized layer, None for a module that is not quantized itself."""
    return next((known for known in _FORMATS if known.is_format_of(module)), None)


@functools.cache
def _plain_class_over(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass that computes like the plain layer, which Python does not allow as their class."""
    metaclass: Any = type(cls)
    forward = LayerFormat().plain_class(cls).forward
    plain: type[nn.Module] = metaclass(f"Dequantized{cls.__name__}", (cls,), {"forward": forward})
    return plain


def _is_of_quanto(cls: type) -> bool:
    return any(base.__name__ == "QModuleMixin" for base in cls.__mro__)
