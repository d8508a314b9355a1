"""The programs in `examples/`, run on tiny models."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import qmove_core as qmove
from tests.builders.device import GPU
from tests.builders.models import tiny_stable_diffusion
from tests.builders.text_models import save_text_model

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RUN_HERE = {"script.py", "transformers_parked.py", "diffusers_components.py", "accelerate_chain.py"}
ELSEWHERE = {"ray_serve.py"}


def main_of(name: str) -> Any:
    return runpy.run_path(str(EXAMPLES / name), run_name="example")["main"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three folders with language models and their tokenizers."""
    folders = [tmp_path_factory.mktemp(f"model{seed}") for seed in range(3)]
    return [str(save_text_model(folder, seed)) for seed, folder in enumerate(folders)]


def test_every_example_is_run_and_listed() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files <= RUN_HERE | ELSEWHERE and files >= RUN_HERE
    listed = re.findall(r"^\| \[(.+?)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert RUN_HERE | {"comfyui_pack/"} <= set(listed)


def test_one_script(texts: list[str], gpu: GPU) -> None:
    before = gpu.allocated()
    written = main_of("script.py")([*texts[:2], "--prompt", "a cat", "--rounds", "2"])
    assert len(written) == 4 and written[:2] == written[2:], "the second round is as the first"
    assert gpu.allocated() == before


@pytest.mark.parametrize("quantize", ["no", "int8", "nf4"])
def test_transformers_parked(quantize: str, texts: list[str], gpu: GPU) -> None:
    answers = main_of("transformers_parked.py")(
        [*texts, "--quantize", quantize, "--prompt", "a cat"]
    )
    assert len(answers) == 3 and all(answer.startswith("a cat") for answer in answers)


def test_diffusers_components(tmp_path: Path, gpu: GPU) -> None:
    tiny_stable_diffusion("cpu").save_pretrained(tmp_path)
    main = main_of("diffusers_components.py")
    arguments = [str(tmp_path), "--steps", "2", "--reserve"]
    apart = main([*arguments, "4GiB"])  # never room for two
    together = main([*arguments, "0GB"])
    assert len(apart) == 2 and all((a == b).all() for a, b in zip(apart, together, strict=True))


def test_an_accelerate_chain(texts: list[str], gpu: GPU) -> None:
    text = main_of("accelerate_chain.py")([*texts, "--prompt", "a cat"])
    assert text.startswith("a cat")


@pytest.mark.parametrize("with_qmove", [True, False])
def test_a_pack_for_comfyui(with_qmove: bool, texts: list[str], gpu: GPU) -> None:
    pack = runpy.run_path(str(EXAMPLES / "comfyui_pack" / "__init__.py"), run_name="pack")
    nodes = pack["NODE_CLASS_MAPPINGS"]
    assert nodes.keys() == pack["NODE_DISPLAY_NAME_MAPPINGS"].keys()
    loader, writer = nodes["LoadLanguageModel"](), nodes["WriteText"]()
    if not with_qmove:
        loader.load.__func__.__globals__["qmove"] = None
    before = gpu.allocated()
    (loaded,) = loader.load(texts[0])
    assert (gpu.allocated() == before) == with_qmove
    (text,) = writer.write(loaded, "a cat", park_after=True)
    assert text.startswith("a cat")
    assert qmove.is_parked(loaded["model"]) == with_qmove
    for node in nodes.values():
        assert set(node.INPUT_TYPES()["required"]) == set(
            list(getattr(node, node.FUNCTION).__annotations__)[:-1]
        )
