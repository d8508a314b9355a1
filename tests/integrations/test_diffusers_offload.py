"""diffusers' own offloaders: model, sequential and group offload undone, parked, and put back; a
ComponentsManager."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qmove_core as qmove
from qmove_core.errors import ChangesNotKept, MetaTensorsPresent, OffloadedDataError
from qmove_core.integrations.diffusers_offload import groups_of
from tests.builders.device import GPU
from tests.builders.dispatched_models import change_everything, state, tower

diffusers = pytest.importorskip("diffusers")


def pipeline() -> Any:
    """A tiny diffusion transformer with its autoencoder, on the CPU."""
    torch.manual_seed(0)
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2, norm_num_groups=4,
        sample_size=4, patch_size=2, num_embeds_ada_norm=1000, activation_fn="gelu-approximate", norm_type="ada_norm_zero",
        attention_bias=True, norm_elementwise_affine=False,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
    )  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    for module in (transformer, vae):
        module.requires_grad_(False).eval()
    return pipe


def image(pipe: Any) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    result = pipe(class_labels=[1], generator=generator, num_inference_steps=2, output_type="np")
    return torch.from_numpy(result.images)


def hooks_of(pipe: Any) -> list[Any]:
    modules = [
        module for component in (pipe.transformer, pipe.vae) for module in component.modules()
    ]
    names = ("_hf_hook", "_old_forward", "forward", "_diffusers_hook")
    kept = [id(module.__dict__.get(name)) for module in modules for name in names]
    chains = [
        (
            {name: id(hook) for name, hook in registry.hooks.items()},
            list(registry._hook_order),
            list(map(id, registry._fn_refs)),
        )
        for module in modules
        if (registry := module.__dict__.get("_diffusers_hook")) is not None
    ]
    return [kept, chains, list(map(id, getattr(pipe, "_all_hooks", [])))]


def objects_of(pipe: Any) -> dict[str, Any]:
    found = {}
    for component in ("transformer", "vae"):
        module = getattr(pipe, component)
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            found[f"{component}.{name}"] = (id(tensor), tensor.device, tensor.dtype, tensor.shape)
    return found


def needs(name: str) -> None:
    """Skips the test where diffusers is older than what it asks for."""
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")


OFFLOADERS = {
    "model": lambda pipe, folder: pipe.enable_model_cpu_offload(device="cuda:0"),
    "sequential": lambda pipe, folder: pipe.enable_sequential_cpu_offload(device="cuda:0"),
    "group": lambda pipe, folder: group_offload(pipe),
    "group, stream": lambda pipe, folder: group_offload(pipe, use_stream=True),
    "group, disk": lambda pipe, folder: group_offload(pipe, offload_to_disk_path=str(folder)),
    "group, disk, stream": lambda pipe, folder: group_offload(
        pipe, offload_to_disk_path=str(folder), use_stream=True
    ),
}
GROUP = [name for name in OFFLOADERS if name.startswith("group")]


def group_offload(pipe: Any, offload_to_disk_path: str | None = None, **options: Any) -> None:
    needs("hooks")
    for name in ("transformer", "vae"):  # both would use the same file names in one folder
        folder = (
            {"offload_to_disk_path": f"{offload_to_disk_path}/{name}"}
            if offload_to_disk_path
            else {}
        )
        diffusers.hooks.apply_group_offloading(
            getattr(pipe, name),
            torch.device("cuda:0"),
            offload_type="leaf_level",
            **options,
            **folder,
        )


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    return image(pipeline().to("cuda:0"))


@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a run"])
@pytest.mark.parametrize("offloader", OFFLOADERS)
def test_an_offloader_is_undone(
    tmp_path: Path, gpu: GPU, offloader: str, ran_before: bool, expected: torch.Tensor
) -> None:
    pipe = pipeline()
    truth = [state(pipe.transformer), state(pipe.vae)]
    OFFLOADERS[offloader](pipe, tmp_path)
    if ran_before:
        assert torch.equal(image(pipe), expected)
    objects = {name: entry[0] for name, entry in objects_of(pipe).items()}

    assert qmove.materialize_meta_tensors(pipe) is pipe

    assert {name: entry[0] for name, entry in objects_of(pipe).items()} == objects, (
        "other objects than before"
    )
    for before, now in zip(truth, [state(pipe.transformer), state(pipe.vae)], strict=True):
        assert all(torch.equal(before[name], now[name]) for name in before)
    for module in [*pipe.transformer.modules(), *pipe.vae.modules()]:
        assert not {"_hf_hook", "forward"} & module.__dict__.keys()
    assert not groups_of([*pipe.transformer.modules(), *pipe.vae.modules()])
    pipe.to("cpu")
    assert gpu.allocated() == 0
    pipe.to("cuda:0")
    assert torch.equal(image(pipe), expected)
    assert pipe.vae.device == gpu.device, "the call enabled the offloader again"
    qmove.park(pipe)
    assert gpu.allocated() == 0
    assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("ran_before", [False, True], ids=["fresh", "after a run"])
@pytest.mark.parametrize("offloader", OFFLOADERS)
def test_the_same_offloader_comes_back(
    tmp_path: Path, gpu: GPU, offloader: str, ran_before: bool, expected: torch.Tensor
) -> None:
    pipe = pipeline()
    OFFLOADERS[offloader](pipe, tmp_path)
    if ran_before:
        image(pipe)
    hooks, objects = hooks_of(pipe), objects_of(pipe)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}

    with qmove.materialized(pipe):
        pipe.to("cuda:0")
        assert torch.equal(image(pipe), expected)
        pipe.to("cpu")

    assert hooks_of(pipe) == hooks
    assert objects_of(pipe) == objects
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")} == files
    for _ in range(2):
        assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("offloader", OFFLOADERS)
def test_a_pipeline_with_an_offloader_is_parked_and_wakes(
    tmp_path: Path, gpu: GPU, offloader: str, expected: torch.Tensor
) -> None:
    pipe = pipeline()
    OFFLOADERS[offloader](pipe, tmp_path)
    image(pipe)
    if offloader == "model":
        pipe.transformer(
            torch.ones(1, 4, 4, 4), torch.tensor([1]), torch.tensor([1])
        )  # left on the GPU
        assert pipe.transformer.device == gpu.device
    hooks, objects = hooks_of(pipe), objects_of(pipe)
    parked = qmove.park(pipe)
    assert gpu.allocated() == 0 and not parked.stragglers
    qmove.restore(pipe)
    assert (hooks_of(pipe), objects_of(pipe)) == (hooks, objects)
    qmove.park(pipe)
    for _ in range(2):
        assert torch.equal(image(pipe), expected)


@pytest.mark.parametrize("moved_to", [None, "cuda:0"])
@pytest.mark.parametrize("offloader", OFFLOADERS)
def test_changed_weights_are_kept(
    tmp_path: Path, gpu: GPU, offloader: str, moved_to: str | None
) -> None:
    pipe = pipeline()
    OFFLOADERS[offloader](pipe, tmp_path)
    image(pipe)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.safetensors")}
    with qmove.materialized(pipe):
        if moved_to is not None:
            pipe.to(moved_to)
        change_everything(pipe.transformer)
    changed = pipeline()
    change_everything(changed.transformer)
    expected = image(changed.to("cuda:0"))

    for _ in range(2):
        assert torch.equal(image(pipe), expected)
    assert {file: file.read_bytes() for file in files} == files, (
        "a file that other pipelines use was written"
    )


def test_group_offload_from_the_disk_is_uninitialized_memory_and_does_not_move(
    tmp_path: Path, gpu: GPU
) -> None:
    pipe = pipeline()
    OFFLOADERS["group, disk"](pipe, tmp_path)
    with pytest.raises(
        MetaTensorsPresent,
        match=r"on the disk only, the first in .*group_.*materialize_meta_tensors",
    ):
        qmove.move(pipe, "cuda:0")
    assert torch.equal(image(qmove.enable_to(pipe).to("cuda:0")), image(pipeline().to("cuda:0")))


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_group_file_is_named_and_nothing_is_changed(
    tmp_path: Path, gpu: GPU, damage: str
) -> None:
    pipe = pipeline()
    OFFLOADERS["group, disk"](pipe, tmp_path)
    group = groups_of(pipe.transformer.transformer_blocks[0].ff.net[2].modules())[0]
    file = Path(group.safetensors_file_path)
    content = file.read_bytes()
    file.write_bytes(content[:-1]) if damage == "truncated" else file.unlink()
    hooks, objects = hooks_of(pipe), objects_of(pipe)

    with pytest.raises(OffloadedDataError, match=f"{file.name} is {damage}") as caught:
        qmove.materialize_meta_tensors(pipe)

    assert "transformer.transformer_blocks.0.ff.net.2.weight" in [
        name for name, _ in caught.value.problems
    ]
    assert (hooks_of(pipe), objects_of(pipe)) == (hooks, objects)
    file.write_bytes(content)
    assert torch.equal(image(pipe), image(pipeline().to("cuda:0")))


def test_a_cast_that_pinned_copies_cannot_hold_is_refused(tmp_path: Path, gpu: GPU) -> None:
    pipe = pipeline()
    OFFLOADERS["group, stream"](pipe, tmp_path)
    with (
        pytest.raises(ChangesNotKept, match=r"pos_embed.*float16.*float32"),
        qmove.materialized(pipe),
    ):
        pipe.transformer.half()
    assert not groups_of(pipe.transformer.modules())


def test_an_error_in_the_commit_leaves_group_offload_as_it_was(
    tmp_path: Path, gpu: GPU, monkeypatch: pytest.MonkeyPatch, expected: torch.Tensor
) -> None:
    pipe = pipeline()
    OFFLOADERS["group, disk, stream"](pipe, tmp_path)
    image(pipe)
    hooks, objects = hooks_of(pipe), objects_of(pipe)

    def fail(_inventory: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("qmove_core.model.kinds.refresh", fail)
        qmove.materialize_meta_tensors(pipe)

    assert (hooks_of(pipe), objects_of(pipe)) == (hooks, objects)
    assert torch.equal(image(pipe), expected)


def managed(models: dict[str, nn.Module]) -> Any:
    """A ComponentsManager with automatic offload, whose hooks refer to all of its models."""
    needs("ComponentsManager")
    manager = diffusers.ComponentsManager()
    for name, model in models.items():
        manager.add(name, model)
    manager.enable_auto_cpu_offload(device="cuda:0", memory_reserve_margin="1GB")
    return manager


def test_a_component_of_a_manager_leaves_the_other_models_alone(gpu: GPU) -> None:
    first, second = pipeline(), pipeline()
    models = {"first": first.transformer, "second": second.transformer}
    managed(models)
    inputs = (torch.ones(1, 4, 4, 4), torch.tensor([1]), torch.tensor([1]))
    expected = [model(*inputs).sample.cpu() for model in models.values()]
    assert {model.device for model in models.values()} == {gpu.device}
    other = {
        name: (id(p), p.data_ptr(), p.device) for name, p in models["second"].named_parameters()
    }
    bytes_of_one = gpu.allocated() // 2

    parked = qmove.park(models["first"])

    assert {
        name: (id(p), p.data_ptr(), p.device) for name, p in models["second"].named_parameters()
    } == other
    assert parked.nbytes == bytes_of_one == gpu.allocated()
    assert not qmove.is_parked(models["second"])
    assert torch.equal(models["first"](*inputs).sample.cpu(), expected[0])

    qmove.materialize_meta_tensors(models["first"])

    assert "_hf_hook" not in models["first"].__dict__ and "_hf_hook" in models["second"].__dict__
    assert {
        name: (id(p), p.data_ptr(), p.device) for name, p in models["second"].named_parameters()
    } == other
    assert torch.equal(models["second"](*inputs).sample.cpu(), expected[1])


def test_a_managed_component_gets_its_hook_back(gpu: GPU) -> None:
    pipe = pipeline()
    managed({"only": pipe.transformer})
    hook = pipe.transformer._hf_hook
    with qmove.materialized(pipe.transformer):
        assert "_hf_hook" not in pipe.transformer.__dict__
    assert pipe.transformer._hf_hook is hook
    inputs = (torch.ones(1, 4, 4, 4), torch.tensor([1]), torch.tensor([1]))
    assert pipe.transformer(*inputs).sample.device == gpu.device


def test_group_offload_of_any_module_by_blocks(tmp_path: Path, gpu: GPU) -> None:
    from tests.builders.dispatched_models import tokens

    needs("hooks")
    expected = tower().to(gpu.device)(tokens()).cpu()
    model = tower()
    diffusers.hooks.apply_group_offloading(
        model, torch.device("cuda:0"), offload_type="block_level", num_blocks_per_group=2,
        offload_to_disk_path=str(tmp_path),
    )  # fmt: skip
    qmove.materialize_meta_tensors(model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.to(gpu.device)(tokens()).cpu(), expected)
