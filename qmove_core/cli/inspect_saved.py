"""What a saved model holds, read from headers: of a file, a folder, or a package with weights."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import QMoveError
from ..model.kinds.bitsandbytes_layout import PACKED_STATE, QUANT_STATE
from ..saved_tensors import NotSafetensors, read_header

TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
SUFFIXES = (".safetensors", *TORCH_SUFFIXES)

# The last part of a tensor's name, by which the formats call what belongs to a quantized weight.
_STATE_NAMES = (
    *(re.escape(name) for name in (*QUANT_STATE, *PACKED_STATE.values())),
    *("SCB", "weight_format", "scales?", "zeros?", "qzeros", "g_idx", "weight_scale(_inv|_2)?"),
    *("scale_(weight|input)", "input_scale", "scaled_fp8", "comfy_quant"),
)
QUANTIZATION_STATE = re.compile(rf"(\.|^)({'|'.join(_STATE_NAMES)})$")


class CannotInspect(QMoveError, ValueError):
    """There is no saved model there, or it cannot be read."""


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor in a file; `nbytes` is what it takes on disk and, loaded as it is, in memory."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    file: str

    @property
    def kind(self) -> str:
        """ "weight", or "quantization state": scales, codebooks and the like."""
        return "quantization state" if QUANTIZATION_STATE.search(self.name) else "weight"


@dataclass
class SavedModel:
    """What `qmove inspect` shows.

    Attributes:
        source: the file or folder that was read.
        tensors: all tensors, in the order of the files.
        quantization: one sentence for each component ("" is the model itself) that is quantized.
        notes: what was left out, and why.
    """

    source: str
    tensors: list[SavedTensor]
    quantization: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors: what the model takes in VRAM, and in RAM while it is parked."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def groups(self) -> dict[tuple[str, str, str], list[SavedTensor]]:
        """The tensors by (file, kind, dtype), the largest group first."""
        grouped: dict[tuple[str, str, str], list[SavedTensor]] = defaultdict(list)
        for tensor in self.tensors:
            grouped[tensor.file, tensor.kind, tensor.dtype].append(tensor)
        largest = sorted(grouped, key=lambda key: -sum(tensor.nbytes for tensor in grouped[key]))
        return {key: grouped[key] for key in largest}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"nbytes": self.nbytes, **asdict(self)}


def inspect_saved(path_or_package: str | Path) -> SavedModel:
    """Reads the headers of a saved model. No weight is loaded and no pickled code runs.

    Args:
        path_or_package: a .safetensors or torch file; a folder of them, as transformers and
            diffusers save it; or the name of an installed package that ships weights.

    Raises:
        CannotInspect: nothing is there, nothing in it is a saved model, or a file is broken.
    """
    path = Path(path_or_package).expanduser()
    try:
        is_file, is_there = path.is_file(), path.exists()
    except (OSError, ValueError) as error:  # a name too long, or with a NUL in it
        raise CannotInspect(f"{str(path)!r} cannot be a file here: {error}.") from error
    if is_file:
        return _inspect_files(path, path.parent, [path])
    folders = [path] if is_there else _package_folders(str(path_or_package))
    for folder in folders:
        files = sorted(f for f in folder.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if files:
            return _inspect_files(folder, folder, files)
    if not folders:
        raise CannotInspect(
            f"{str(path_or_package)!r} is no file or folder here and no installed package. Give a "
            ".safetensors or torch file, a model's folder, or the name of a package that ships "
            "weights."
        )
    where = f"No weights in the folder {path}"
    if not is_there:
        where = f"The installed package {str(path_or_package)!r} ships no weights"
    raise CannotInspect(f"{where}: no file in it ends in {', '.join(SUFFIXES)}.")


def _package_folders(name: str) -> list[Path]:
    """The folders of an installed package, given by its name on the index or by its import name."""
    wanted = re.sub(r"[-_.]+", "_", name).lower()
    modules = {
        module
        for module, distributions in importlib.metadata.packages_distributions().items()
        if any(wanted == re.sub(r"[-_.]+", "_", known).lower() for known in distributions)
    }
    folders: list[Path] = []
    for module in sorted(filter(str.isidentifier, modules | {name.replace("-", "_")})):
        with contextlib.suppress(ValueError):  # one that was made by hand, such as `__main__`
            spec = importlib.util.find_spec(module)
            locations = (spec and spec.submodule_search_locations) or ()
            folders += [Path(location) for location in locations]
    return folders


def _inspect_files(source: Path, root: Path, files: Sequence[Path]) -> SavedModel:
    model = SavedModel(str(source), [])
    safe = {path.parent for path in files if path.suffix == ".safetensors"}
    inside: dict[Path, list[SavedTensor]] = defaultdict(list)
    for path in files:
        label = path.relative_to(root).as_posix()
        if path.suffix == ".safetensors":
            tensors = _read_safetensors(path, label)
        elif path.parent in safe and path.suffix in TORCH_SUFFIXES:  # the same weights once more
            model.notes.append(f"{label} was left out: there are safetensors beside it.")
            continue
        else:
            tensors = _read_torch(path, label, model.notes)
        model.tensors += tensors
        inside[path.parent] += tensors
    for folder, tensors in inside.items():
        if found := _quantization_of(folder, tensors):
            component = folder.relative_to(root).as_posix()
            model.quantization["" if component == "." else component] = found
    return model


def _read_safetensors(path: Path, label: str) -> list[SavedTensor]:
    try:
        header = read_header(path)
    except NotSafetensors as error:
        raise CannotInspect(f"{error} Download or save it again.") from error
    return [
        SavedTensor(name, saved.saved_dtype, saved.shape, saved.end - saved.start, label)
        for name, saved in header.items()
    ]


def _read_torch(path: Path, label: str, notes: list[str]) -> list[SavedTensor]:
    if not zipfile.is_zipfile(path):
        why = "is no file of torch's zip format (torch >= 1.6): broken, or older, and then it "
        why += "cannot be read without loading it. Save it again with torch.save, or better as "
        why += "safetensors"
        if path.suffix not in SUFFIXES:
            why = f"is of no kind that is read here; these are: {', '.join(SUFFIXES)}"
        raise CannotInspect(f"{path} {why}.")
    try:
        content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
    except Exception as error:  # torch raises pickle's, its own and RuntimeErrors here
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        notes.append(
            f"{label} holds pickled objects ({reason}) and was not unpickled, "
            "which could run code: only the sizes of its storages are known."
        )
        return _torch_storages(path, label)
    return [
        SavedTensor(
            name,
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.nbytes,
            label,
        )
        for name, tensor in _tensors_in(content)
    ]


def _tensors_in(content: object) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of nested containers, which may contain themselves."""
    pending, seen = [("", content)], set[int]()
    while pending:
        name, item = pending.pop(0)
        if isinstance(item, torch.Tensor):
            yield name, item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            items = item.items() if isinstance(item, dict) else enumerate(item)
            pending += [(f"{name}.{key}" if name else str(key), value) for key, value in items]


def _torch_storages(path: Path, label: str) -> list[SavedTensor]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [
                SavedTensor(entry.filename, "bytes", (entry.file_size,), entry.file_size, label)
                for entry in archive.infolist()
                if re.search(r"(^|/)data/\d+$", entry.filename)
            ]
    except (zipfile.BadZipFile, ValueError) as error:
        raise CannotInspect(f"{path} is broken ({error}). Download or save it again.") from error


def _quantization_of(folder: Path, tensors: Sequence[SavedTensor]) -> str:
    """How the model in `folder` is quantized, by its config, else by names and dtypes; else ""."""
    config = folder / "config.json"
    if config.is_file():
        try:
            declared = json.loads(config.read_text("utf-8")).get("quantization_config")
            if declared:
                return _describe(declared)
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise CannotInspect(f"{config} is no config of a model: {error}.") from error
    names = {tensor.name for tensor in tensors}

    def any_ends(*endings: str) -> bool:
        return any(name.endswith(endings) for name in names)

    for kind, packed_state in PACKED_STATE.items():
        if any_ends(f".{packed_state}"):
            nested = ", double quantization" if any_ends(".nested_absmax") else ""
            return f"bitsandbytes {kind}{nested}"
    if any_ends(".SCB"):
        return "bitsandbytes int8"
    if any_ends(".comfy_quant"):
        return "ComfyUI (comfy-kitchen)"
    if any_ends(".qweight"):
        unknown = "packed weights (.qweight), format unknown"
        return "GPTQ" if any_ends(".g_idx") else "AWQ" if any_ends(".qzeros") else unknown
    if any_ends(".weight_scale_inv"):
        return "fp8, scaled in blocks"
    if any(tensor.dtype.upper().startswith(("F8", "FLOAT8")) for tensor in tensors):
        scaled = any_ends("scaled_fp8", ".scale_weight", ".weight_scale")
        return "fp8, scaled" if scaled else "fp8 weights, without scales"
    return ""


def _describe(declared: dict[str, Any]) -> str:
    """transformers' and diffusers' `quantization_config` in words."""
    if declared.get("load_in_8bit"):
        return "bitsandbytes int8"
    if declared.get("load_in_4bit"):
        nested = ", double quantization" if declared.get("bnb_4bit_use_double_quant") else ""
        return f"bitsandbytes {declared.get('bnb_4bit_quant_type', 'fp4')}{nested}"
    method = str(declared.get("quant_method", "unknown method"))
    bits = declared.get("bits", declared.get("weights"))
    if bits is None:
        return method
    return f"{method}, {bits} bit" if isinstance(bits, int) else f"{method}, {bits}"
