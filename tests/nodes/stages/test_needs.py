"""What is learned of nodes: by what it is known, how long, and what a node that never ran is given."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from qmove_pack.nodes.host import comfy, graph
from qmove_pack.nodes.host.stages import needs
from qmove_pack.nodes.host.stages.needs import Needs, Signature

import simcuda
from tests.nodes.builders import careless_nodes
from tests.nodes.builders.careless_nodes import MIB, node
from tests.nodes.builders.fake_host import DynamicPrompt, FakeHost

CARD = torch.device("cuda:0")
OTHER = torch.device("cuda:1")


def taken(known: Needs, signature: Signature) -> int | None:
    """Bytes on the first card that a node is expected to take, without the headroom; None for a
    class that never ran."""
    found = known.known(signature)
    return None if found is None else round(found[0].get(CARD, 0) / needs.HEADROOM)


def upscale(size: int = 512, file: str = "a.pth", batch: int = 1, **more: Any) -> Signature:
    values = {"file": file, "size": size, **more}
    return Signature(
        "Upscale", tuple(sorted(values.items())), (f"{batch}x{size}x{size}x3 torch.float32",)
    )


class TestWhatCounts:
    def test_the_largest_run_counts_not_the_last(self) -> None:
        known = Needs()
        for nbytes in (5000, 9000, 7000):
            known.learn(upscale(), {CARD: nbytes}, {})
        assert taken(known, upscale()) == 9000

    def test_a_class_that_never_ran_is_unknown(self) -> None:
        assert Needs().known(upscale()) is None

    @pytest.mark.parametrize(
        "larger",
        [upscale(1024), upscale(batch=4), upscale(steps=30), upscale(file="b.pth")],
        ids=["size", "batch", "one number more", "file"],
    )
    def test_what_is_larger_or_other_takes_at_least_what_the_smaller_took(
        self, larger: Signature
    ) -> None:
        known = Needs()
        known.learn(upscale(), {CARD: 5000}, {})
        assert taken(known, larger) == 5000
        assert known.known(larger)[1] is False  # type: ignore[index]
        known.learn(larger, {CARD: 20_000}, {})
        assert taken(known, larger) == 20_000
        assert taken(known, upscale()) == 5000

    @pytest.mark.parametrize(
        "smaller",
        [upscale(256), upscale(batch=1), upscale(512, steps=3)],
        ids=["size", "batch", "n"],
    )
    def test_what_is_smaller_is_not_given_what_the_larger_took(self, smaller: Signature) -> None:
        known = Needs()
        known.learn(upscale(1024, batch=2, steps=9), {CARD: 20_000}, {})
        assert taken(known, smaller) == 0

    def test_the_run_most_like_it_counts(self) -> None:
        known = Needs()
        known.learn(upscale(256, file="b.pth"), {CARD: 1000}, {})
        known.learn(upscale(512, file="a.pth"), {CARD: 3000}, {})
        known.learn(upscale(256, file="a.pth"), {CARD: 2000}, {})
        assert taken(known, upscale(300, file="b.pth")) == 1000
        assert taken(known, upscale(900, file="a.pth")) == 2000  # the latest of those as like it

    def test_each_device_has_its_own_need(self) -> None:
        known = Needs()
        known.learn(upscale(), {CARD: 0, OTHER: 700}, {})
        assert known.known(upscale()) == ({CARD: 0, OTHER: 770}, True)

    def test_what_the_node_keeps_for_itself_is_needed_in_its_first_run_only(
        self, tmp_path: Path
    ) -> None:
        known = Needs(tmp_path / "needs.json")
        known.learn(upscale(), {CARD: 9000}, {CARD: 8000})
        assert taken(known, upscale()) == 1000
        known.save()
        assert taken(Needs(tmp_path / "needs.json"), upscale()) == 9000


class TestKept:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return tmp_path / "folder" / "needs.json"

    def test_across_a_restart(self, file: Path) -> None:
        before = Needs(file)
        signatures = [upscale(), upscale(1024, tile=True, ratio=1.5), Signature("Text")]
        for index, signature in enumerate(signatures):
            before.learn(signature, {CARD: 1000 * index, OTHER: index}, {})
        before.save()
        after = Needs(file)
        for signature in signatures:
            assert after.known(signature) == before.known(signature)
        assert [path.name for path in file.parent.iterdir()] == ["needs.json"]

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "{",
            "[]",
            "null",
            '{"format": 1}',
            '{"format": 1, "classes": []}',
            '{"format": 1, "classes": {"A": [{}]}}',
            '{"format": 1, "classes": {"A": [{"values": 3, "shapes": [], "first": {}, "again": {}}]}}',
            '{"format": 1, "classes": {"A": [{"values": [], "shapes": [], "first": {"gpu": 1}, "again": {}}]}}',
            "[" * 100_000,
            "\x00\ufffd",
        ],
    )
    def test_a_damaged_file_is_said_once_and_replaced(
        self, file: Path, text: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        file.parent.mkdir()
        file.write_text(text, encoding="utf-8")
        known = Needs(file)
        assert known.known(upscale()) is None
        assert known.known(upscale()) is None
        assert caplog.text.count("Needs are learned anew") == 1
        known.learn(upscale(), {CARD: 1000}, {})
        known.save()
        assert taken(Needs(file), upscale()) == 1000

    def test_a_file_of_another_format_is_left_out(self, file: Path) -> None:
        file.parent.mkdir()
        file.write_text('{"format": 99, "anything": 1}')
        assert Needs(file).known(upscale()) is None

    def test_nothing_is_written_where_nothing_was_learned(self, file: Path) -> None:
        known = Needs(file)
        known.learn(upscale(), {CARD: 1000}, {})
        known.save()
        written = file.stat().st_mtime_ns
        file.unlink()
        known.learn(upscale(), {CARD: 900}, {})
        known.save()
        assert written and not file.exists()

    def test_it_is_bounded(self, file: Path) -> None:
        known = Needs(file)
        for index in range(needs.MOST_OF_A_CLASS + 5):
            known.learn(upscale(file=f"{index}.pth"), {CARD: index}, {})
        for index in range(needs.MOST_CLASSES + 5):
            known.learn(Signature(f"Class{index}"), {CARD: 1}, {})
        known.save()
        classes = json.loads(file.read_text())["classes"]
        assert len(classes) == needs.MOST_CLASSES
        assert "Class4" not in classes
        assert all(len(of_class) <= needs.MOST_OF_A_CLASS for of_class in classes.values())

    def test_in_comfyuis_user_folder(self, host: FakeHost, tmp_path: Path) -> None:
        assert comfy.own_directory() is None
        host.user_directory = str(tmp_path)
        assert comfy.own_directory() == tmp_path / "__qmove"
        needs.use_file_of_host()
        needs.learned.learn(upscale(), {CARD: 1}, {})
        needs.save()
        assert (tmp_path / "__qmove" / "needs.json").is_file()


class Sampler(careless_nodes._Node):
    INPUTS: ClassVar[dict[str, Any]] = {
        "width": ("INT", {}),
        "seed": ("INT", {}),
        "noise_seed": ("INT", {}),
        "variation": ("INT", {"control_after_generate": True}),
        "tiled": ("BOOLEAN", {}),
        "cfg": ("FLOAT", {}),
        "text": ("STRING", {"multiline": True}),
        "title": ("STRING", {}),
        "file": (["a.safetensors", "b.safetensors"], {}),
        "repository": ("STRING", {}),
        "sampler": (["Euler a", "DPM++ 2M"], {}),
    }


class TestSignatures:
    @pytest.fixture(autouse=True)
    def _classes(self, host: FakeHost) -> Iterator[None]:
        host.add(Sampler)
        yield

    def values(self, host: FakeHost, **inputs: Any) -> dict[str, Any]:
        prompt = {"1": node("Sampler", **inputs)}
        return graph.values_of(
            host.list_class(DynamicPrompt(prompt), host.cache, host.classes), "1"
        )

    def test_sizes_files_switches_and_repositories_count(self, host: FakeHost) -> None:
        counts = {
            "width": 512,
            "tiled": True,
            "cfg": 7.5,
            "file": "a.safetensors",
            "repository": "org/model",
            "sampler": "Euler a",
        }
        assert self.values(host, **counts) == counts

    @pytest.mark.parametrize(
        "inputs",
        [
            {"seed": 3},
            {"noise_seed": 3},
            {"variation": 3},
            {"text": "cat"},
            {"title": "a cat"},
            {"title": "a cat on the mat, masterpiece"},
            {"title": "two\nlines"},
            {"title": "x" * 1000},
            {"width": ("other", 0)},
        ],
        ids=str,
    )
    def test_seeds_prose_and_links_do_not(self, host: FakeHost, inputs: dict[str, Any]) -> None:
        assert self.values(host, **inputs) == {}

    def test_shapes_of_tensors_on_wires_count(self) -> None:
        image = torch.zeros(2, 8, 8, 3)
        latent = {"samples": torch.zeros(1, 4, dtype=torch.float16), "type": "audio"}
        values = [image, latent, [torch.zeros(1)], "text", 3, None, object()]
        assert graph.shapes_of(values) == (
            "2x8x8x3 torch.float32",
            "1x4 torch.float16",
            "1 torch.float32",
        )

    def test_many_tensors_and_deep_lists_are_cut_short(self) -> None:
        many = [torch.zeros(1)] * 1000
        deep: list[Any] = [torch.zeros(1)]
        for _ in range(10):
            deep = [deep]
        assert len(graph.shapes_of([many])) == graph.MOST_TENSORS
        assert graph.shapes_of([deep]) == ()


@pytest.mark.simulated
class TestOfRuns:
    @pytest.fixture(autouse=True)
    def _card(self, host: FakeHost) -> None:
        careless_nodes.forget_all()
        simcuda.set_memory(128 * MIB)
        host.add(*careless_nodes.ALL)

    def test_a_prompts_text_and_seed_change_nothing(self, host: FakeHost) -> None:
        load = {"load": node("Load", mib=20, shape="plain")}
        host.run({**load, "s": node("Scratch", mib=30, seed=1)})
        found = needs.learned.known(Signature("Scratch", (("mib", 30),)))
        assert found is not None and found[1]
        host.run({**load, "s": node("Scratch", mib=30, seed=2)})
        assert needs.learned.known(Signature("Scratch", (("mib", 30),))) == found

    def test_a_loader_needs_its_model_again_when_it_runs_again(self, host: FakeHost) -> None:
        host.run({"load": node("Load", mib=20, shape="plain")})
        need, exactly = needs.learned.known(
            Signature("Load", (("mib", 20), ("shape", "plain")))
        ) or ({}, False)
        assert exactly and need[CARD] >= 20 * MIB

    def test_a_model_that_a_node_keeps_is_not_needed_again(self, host: FakeHost) -> None:
        class Caption(careless_nodes._Node):
            model: Any = None

            def run(self, after: Any = None) -> tuple[Any]:
                if self.model is None:
                    self.model = careless_nodes.model_of(20)
                torch.empty(5 * MIB, dtype=torch.uint8, device="cuda:0")
                return ("a cat",)

        host.add(Caption)
        load = {"load": node("Load", mib=8, shape="plain")}
        host.run({**load, "caption": node("Caption", after=("load", 0))})
        need, exactly = needs.learned.known(Signature("Caption")) or ({}, False)
        assert exactly and 5 * MIB <= need[CARD] < 8 * MIB
