"""What is given back instead of loaded again, and what is not, on the fake host."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from qmove_pack.nodes.host import guard, settings
from qmove_pack.nodes.host.pool import provider
from qmove_pack.nodes.host.pool.keeping import pool
from torch import nn

import qmove_core as qmove
from tests.builders.device import GPU
from tests.nodes.builders.careless_nodes import ALL, Load, Use, forget_all, model_in, node, noted
from tests.nodes.builders.fake_host import FakeHost
from tests.nodes.builders.fake_management import ModelPatcher
from tests.nodes.builders.guarded import Guarded

pytestmark = pytest.mark.usefixtures("gpu")


@pytest.fixture(autouse=True)
def _nothing_noted() -> Iterator[None]:
    yield
    forget_all()


@pytest.fixture
def comfy(pool_host: FakeHost) -> FakeHost:
    pool_host.add(*ALL, FileLoader, Watched, Loose, Handed, Combined, Expanding)
    pool_host.add(*MUST_RUN)
    return pool_host


class FileLoader(Load):
    """Loads what a file is named for."""

    INPUTS: ClassVar[dict[str, Any]] = {"file": ("STRING", {})}

    def run(self, file: str) -> tuple[Any]:  # type: ignore[override]
        return super().run(4)


class Watched(Load):
    """Says itself when its inputs mean something else."""

    version: ClassVar[Any] = 1

    @classmethod
    def IS_CHANGED(cls, **inputs: Any) -> Any:
        return cls.version


class Output(Load):
    OUTPUT_NODE = True


class NotIdempotent(Load):
    NOT_IDEMPOTENT = True


class _Asking(Load):
    HIDDEN_KIND = ""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": cls.INPUTS, "hidden": {"asked": cls.HIDDEN_KIND}}


class AsksForItsId(_Asking):
    HIDDEN_KIND = "UNIQUE_ID"


class AsksForThePrompt(_Asking):
    HIDDEN_KIND = "PROMPT"


class AsksForItsIdAsNewerNodesDo(_Asking):
    HIDDEN_KIND = ("UNIQUE_ID",)  # type: ignore[assignment]


class Shows(Load):
    """Shows something with its model."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return {"ui": {"text": ["loaded"]}, "result": super().run(*args, **kwargs)}


class WithPictures(Load):
    """Gives pictures beside its model."""

    def run(self, *args: Any, **kwargs: Any) -> Any:
        return (*super().run(*args, **kwargs), torch.zeros(1, 1024, 1024, 3))


MUST_RUN = (
    Output,
    NotIdempotent,
    AsksForItsId,
    AsksForThePrompt,
    AsksForItsIdAsNewerNodesDo,
    Shows,
    WithPictures,
)


class Loose(Load):
    """Gives tensors without a module."""

    RETURN_TYPES = ("WEIGHTS",)

    def run(self, mib: int, **_: Any) -> tuple[Any]:  # type: ignore[override]
        super().run(mib)
        return ({"weights": torch.ones(mib << 18, device="cuda:0"), "mib": mib},)


class Handed:
    """Hands its model on."""

    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"model": ("*", {}), "strength": ("FLOAT", {})}}

    def run(self, model: Any, strength: float = 1) -> tuple[Any]:
        seen_by_handed.append(strength)
        return ([model],)


seen_by_handed: list[float] = []


class Combined(Handed):
    """Makes a new model of the one it is given."""

    def run(self, model: Any, strength: float = 1) -> tuple[Any]:
        seen_by_handed.append(strength)
        return (nn.Linear(1024, 1024, device="cuda:0"),)


class Expanding(Load):
    """Expands into the loader whose name it is given."""

    def run(self, kind: str, mib: int = 4) -> Any:  # type: ignore[override]
        return {"result": [["inner", 0]], "expand": {"inner": node(kind, mib=mib)}}


def workflow(name: str, load: dict[str, Any], seed: int) -> dict[str, Any]:
    return {f"{name} load": load, f"{name} use": node("Use", model=(f"{name} load", 0), seed=seed)}


def another(comfy: FakeHost) -> None:
    """Another workflow runs: ComfyUI drops what it had."""
    comfy.run({"text": node("Text", text="")})
    assert set(comfy.cache.entries) == {"text"}


def runs_again(
    comfy: FakeHost, load: dict[str, Any], change: Callable[[], Any] = lambda: None
) -> bool:
    """Whether a loader runs again where its workflow comes back after another one, under new ids."""
    comfy.run(workflow("a", load, 1))
    assert not comfy.errors
    another(comfy)
    change()
    comfy.ran.clear()
    comfy.run(workflow("b", load, 2))
    assert not comfy.errors
    assert "b use" in comfy.ran
    return "b load" in comfy.ran


@pytest.mark.parametrize("parked", [False, True])
@pytest.mark.parametrize("how", ["in place", "through data"])
def test_a_weight_that_was_changed_in_place_comes_back_changed(
    comfy: FakeHost, how: str, parked: bool
) -> None:
    """As from ComfyUI's own cache: the same live object, with what a node has done to it."""
    load = node("Load", mib=4)
    comfy.run(workflow("a", load, 1))
    model = model_in(comfy, "a load")
    weight = next(model.parameters())
    with torch.inference_mode():  # as in a node
        (weight if how == "in place" else weight.data).mul_(3).add_(1)
    expected = weight.detach().cpu().clone()
    del weight
    another(comfy)
    if parked:
        qmove.park(model)

    comfy.run(workflow("b", load, 2))

    assert not comfy.errors and model_in(comfy, "b load") is model
    assert torch.equal(next(model.parameters()).detach().cpu(), expected)
    assert "b load" not in comfy.ran


@pytest.mark.parametrize("shape", ["plain", "list", "dict", "pipeline"])
def test_the_same_live_object_comes_back_under_other_ids_and_the_loader_does_not_run(
    comfy: FakeHost, shape: str
) -> None:
    load = node("Load", mib=4, shape=shape)
    comfy.run(workflow("a", load, 1))
    model = weakref.ref(model_in(comfy, "a load"))
    another(comfy)

    comfy.run(workflow("b", load, 1))

    assert "b load" not in comfy.ran
    assert model_in(comfy, "b load") is model()
    uses = [comfy.cache.entries["b use"].outputs]
    another(comfy)
    comfy.run(workflow("a", load, 1))
    assert comfy.cache.entries["a use"].outputs == uses[0]
    assert (pool.hits, pool.misses) == (2, 1)


def test_without_the_pool_the_loader_runs_again(comfy: FakeHost) -> None:
    settings.change({"qmove.keepLoaded": False})
    assert runs_again(comfy, node("Load", mib=4))
    assert pool.figures()["models"] == pool.figures()["limit"] == 0


def test_a_parked_model_comes_back_and_comes_home_for_its_node(comfy: FakeHost) -> None:
    def park() -> None:
        (model,) = (kept.models[0] for kept in pool.all())
        qmove.park(model)

    assert not runs_again(comfy, node("Load", mib=4), park)
    assert noted("use 2")[-1][0] == "cuda:0"


def test_it_comes_back_after_free_and_after_a_queue_of_other_prompts(comfy: FakeHost) -> None:
    def free() -> None:
        for mib in range(5, 10):
            comfy.run(workflow(f"other {mib}", node("Load", mib=mib), 1))
        comfy.management.unload_all_models()
        comfy.cache.entries.clear()
        gc.collect()

    assert not runs_again(comfy, node("Load", mib=4), free)


def test_other_inputs_are_a_miss(comfy: FakeHost) -> None:
    comfy.run(workflow("a", node("Load", mib=4), 1))
    comfy.ran.clear()
    comfy.run(workflow("a", node("Load", mib=5), 1))
    assert "a load" in comfy.ran and pool.misses == 2


def written(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("change", "is_miss"),
    [
        (lambda file: None, False),
        (lambda file: written(file, "other size"), True),
        (lambda file: os.utime(file, ns=(1, 1)), True),
        (lambda file: file.unlink(), True),
    ],
    ids=["unchanged", "size", "time", "gone"],
)
@pytest.mark.parametrize(
    "named", ["path", "in a folder of ComfyUI", "folder", "of a pack", "repository"]
)
def test_a_file_that_has_changed_on_disk_is_a_miss(
    comfy: FakeHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    named: str, change: Callable[[Path], Any], is_miss: bool,
) -> None:  # fmt: skip
    checkpoints, models = tmp_path / "checkpoints", tmp_path / "models"
    models.mkdir()
    comfy.models_dir = str(models)
    paths = comfy.modules()["folder_paths"]
    paths.folder_names_and_paths = {"checkpoints": ([str(checkpoints)], set())}  # type: ignore[attr-defined]
    monkeypatch.setitem(__import__("sys").modules, "folder_paths", paths)
    file, name = {
        "path": (tmp_path / "weights.bin", str(tmp_path / "weights.bin")),
        "in a folder of ComfyUI": (checkpoints / "sub" / "weights.bin", "sub/weights.bin"),
        "folder": (tmp_path / "model" / "unet" / "weights.bin", str(tmp_path / "model")),
        "of a pack": (models / "LLM" / "Tagger" / "weights.bin", "Tagger"),
        "repository": (models / "LLM" / "Tagger" / "weights.bin", "owner/Tagger"),
    }[named]
    written(file, "weights")

    load = node("FileLoader", file=name)
    assert runs_again(comfy, load, lambda: change(file)) is is_miss


def test_what_a_node_before_the_loader_names_counts_too(comfy: FakeHost, tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    for run, text in enumerate(["one", "one", "another"]):
        file.write_text(text)
        os.utime(file, ns=(1, 1))
        comfy.ran.clear()
        comfy.run(
            {
                f"{run} text": node("Text", text=str(file)),
                f"{run} load": node("Load", mib=4, after=(f"{run} text", 0)),
                f"{run} use": node("Use", model=(f"{run} load", 0), seed=run),
            }
        )
        assert (f"{run} load" in comfy.ran) is (run != 1)


@pytest.mark.parametrize(("after", "is_miss"), [(1, False), (2, True), (float("nan"), True)])
def test_is_changed_decides(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch, after: Any, is_miss: bool
) -> None:
    change = lambda: monkeypatch.setattr(Watched, "version", after)  # noqa: E731
    assert runs_again(comfy, node("Watched", mib=4), change) is is_miss


@pytest.mark.parametrize("cls", MUST_RUN, ids=lambda cls: cls.__name__)
def test_nothing_is_given_back_that_must_run(comfy: FakeHost, cls: type) -> None:
    comfy.run(workflow("a", node(cls.__name__, mib=4), 1))
    another(comfy)
    comfy.ran.clear()
    comfy.run(workflow("a", node(cls.__name__, mib=4), 2))  # with the same ids
    assert "a load" in comfy.ran
    assert runs_again(comfy, node(cls.__name__, mib=4))
    assert pool.count == 0


@pytest.mark.parametrize("cls", MUST_RUN[:5], ids=lambda cls: cls.__name__)
def test_nor_what_comes_from_such_a_node(comfy: FakeHost, cls: type) -> None:
    for run in range(2):
        comfy.ran.clear()
        comfy.run(
            {
                "before": node(cls.__name__, mib=1),
                "load": node("Load", mib=4, after=("before", 0)),
                "use": node("Use", model=("load", 0), seed=run),
            }
        )
        assert "load" in comfy.ran
        another(comfy)


@pytest.mark.parametrize(
    ("inner", "is_miss"), [("Load", False), ("NotIdempotent", True), ("Output", True)]
)
def test_a_node_that_expands_is_given_back_unless_it_expands_into_such_a_node(
    comfy: FakeHost, inner: str, is_miss: bool
) -> None:
    assert runs_again(comfy, node("Expanding", kind=inner)) is is_miss


def test_tensors_without_a_module_come_back(comfy: FakeHost) -> None:
    load = {"a load": node("Loose", mib=4)}
    comfy.run(load)
    weights = comfy.cache.entries["a load"].outputs[0][0]["weights"]
    another(comfy)
    comfy.run({"b load": node("Loose", mib=4)})
    assert comfy.cache.entries["b load"].outputs[0][0]["weights"] is weights


def test_a_node_that_hands_a_model_on_runs_and_one_that_makes_another_does_not(
    comfy: FakeHost,
) -> None:
    for name, runs in (("Handed", 2), ("Combined", 1)):
        seen_by_handed.clear()
        for workflow_name in ("a", "b"):
            comfy.run(
                {
                    f"{workflow_name} load": node("Load", mib=4),
                    f"{workflow_name} next": node(name, model=(f"{workflow_name} load", 0)),
                }
            )
            another(comfy)
        assert len(seen_by_handed) == runs


def test_a_model_whose_layers_somebody_has_changed_is_loaded_again(comfy: FakeHost) -> None:
    def add_adapter() -> None:
        (model,) = (kept.models[0] for kept in pool.all())
        model[0] = nn.Sequential(model[0], nn.Identity())

    assert runs_again(comfy, node("Load", mib=4), add_adapter)


def test_a_model_whose_weights_somebody_has_emptied_is_loaded_again(comfy: FakeHost) -> None:
    def empty() -> None:
        (model,) = (kept.models[0] for kept in pool.all())
        model[0].weight.untyped_storage().resize_(0)

    assert runs_again(comfy, node("Load", mib=4), empty)


def test_a_node_whose_pack_was_loaded_anew_runs(comfy: FakeHost) -> None:
    def reload() -> None:
        comfy.add(type("Load", (Load,), {}))

    assert runs_again(comfy, node("Load", mib=4), reload)


@pytest.mark.parametrize("on", [False, True])
def test_comfyuis_own_models_stay_only_where_the_setting_says_so(comfy: FakeHost, on: bool) -> None:
    class LoadOwn(Load):
        def run(self, mib: int, **_: Any) -> tuple[Any]:  # type: ignore[override]
            return (ModelPatcher(nn.Linear(1024, 1024)),)

    comfy.add(LoadOwn)
    settings.change({"qmove.keepLoadedOwn": on})
    comfy.run({"a": node("LoadOwn", mib=1)})
    another(comfy)
    comfy.run({"b": node("LoadOwn", mib=1)})
    assert ("b" in comfy.ran) is not on
    settings.change({"qmove.keepLoadedOwn": False})
    assert pool.count == 0


def test_what_another_manager_moves_is_not_kept(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qmove_pack.nodes.host.models import managers

    monkeypatch.setattr(managers, "manager_of", lambda module: "accelerate")
    assert runs_again(comfy, node("Load", mib=4))


def test_saved_seconds_are_those_of_loaders_that_would_have_run(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    comfy.run(workflow("a", node("Load", mib=4), 1))
    (kept,) = pool.all()
    kept.seconds = 60.0
    another(comfy)
    comfy.run({"b load": node("Load", mib=4)})  # no node uses it
    assert (pool.hits, pool.seconds_saved) == (0, 0)
    another(comfy)
    comfy.run(
        workflow("c", node("Load", mib=4), 1) | {"more": node("Use", model=("c load", 0), seed=5)}
    )
    assert (pool.hits, pool.seconds_saved) == (1, 60)
    assert pool.figures()["seconds_saved"] == 60


def test_a_host_without_cache_providers_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import sys

    caplog.set_level("INFO", "qmove")
    old = FakeHost(old=True)
    for name, module in old.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "comfy_execution.cache_provider", raising=False)
    assert not provider.install() and not provider.is_installed()
    (line,) = [r.getMessage() for r in caplog.records]
    assert "asks no other caches" in line


def test_an_error_in_the_pool_fails_no_prompt(
    comfy: FakeHost, monkeypatch: pytest.MonkeyPatch, guarded: Guarded
) -> None:
    def fail(*args: Any) -> Any:
        raise RuntimeError("no")

    guarded.expect("give back a model that stays loaded")
    monkeypatch.setattr(pool, "give", fail)
    assert runs_again(comfy, node("Load", mib=4))
    assert guard._logged


def test_it_is_registered_once(comfy: FakeHost, gpu: GPU) -> None:
    assert provider.install() and len(comfy.providers.registered) == 1
    assert Use.__name__ in comfy.classes
