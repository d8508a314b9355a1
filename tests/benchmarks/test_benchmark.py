"""The benchmark counts right and hides nothing: bytes, copies and peaks are exact, and what fails,
leaks or changes is shown.

Its tasks run here in this process instead of one each, which is the same code and takes seconds;
times are not looked at.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import qmove_core as qmove
from benchmarks.compare import __main__ as compare
from benchmarks.compare import child, contenders, kernels, meter, page, rows, targets, workloads
from benchmarks.compare.contenders import Contender, PlainTo
from simcuda import link
from tests.builders.device import GPU

pytestmark = pytest.mark.simulated

FP16 = workloads.Workload("fp16", "fp16", 256, 6)
INT8 = workloads.Workload("int8", "int8", 256, 6)
NF4 = workloads.Workload("nf4", "nf4", 512, 6)
PEERS_WITHOUT_MMGP = [kind for kind in contenders.ALL if kind.name != "mmgp, pinned"]


@pytest.fixture(autouse=True)
def _the_process_as_it_was() -> Iterator[None]:
    yield
    link.use("pcie4")
    qmove.configure(keep_mirrors=True)


def figures_of(name: str, workload: workloads.Workload, folder: Path) -> dict[str, Any]:
    """What the benchmark finds out about a contender."""
    request = {"workload": asdict(workload), "folder": str(folder)}
    child.TASKS["prepare"](request)
    return child.TASKS["swaps"]({**request, "contender": name})


def test_plain_to_moves_every_byte_both_ways(tmp_path: Path) -> None:
    """Given two models of 6 layers, when they take turns ten times, then each turn is a model out
    and a model in."""
    found = figures_of("plain .to()", FP16, tmp_path)
    nbytes, tensors = workloads.nbytes(FP16, tmp_path), 2 * FP16.layers
    for which, number in (("swaps pcie4", 10), ("swaps pcie5", 2)):
        swaps = found[which]
        assert swaps["number"] == number
        assert (swaps["h2d_bytes"], swaps["h2d_copies"]) == (number * nbytes, number * tensors)
        assert (swaps["d2h_bytes"], swaps["d2h_copies"]) == (number * nbytes, number * tensors)
    assert found["peak_vram"] == nbytes
    assert found["left"] == 0
    assert (
        found["stage"] == "done"
        and found["same_output"]
        and found["same_bytes"]
        and found["keeps_changes"]
    )


@pytest.mark.parametrize("name", ["qmove", "qmove, streaming"])
@pytest.mark.parametrize("workload", [FP16, INT8, NF4], ids=lambda workload: workload.name)
def test_qmove_copies_unchanged_weights_one_way_only(
    name: str, workload: workloads.Workload, tmp_path: Path
) -> None:
    """Only digests cross to the host, less than a hundredth even of a model as small as this."""
    found = figures_of(name, workload, tmp_path)
    assert "error" not in found, found["traceback"]
    ten = found["swaps pcie4"]
    with torch.no_grad():
        model = workloads.load(workload, tmp_path, 0, "cuda:0")
        model(workloads.inputs(workload, "cuda:0"))
    held = qmove.inventory(model)
    nbytes = sum(holding.nbytes for holding in held.holdings if holding.device.type == "cuda")
    assert (
        10 * nbytes <= ten["h2d_bytes"] <= 1.001 * 10 * nbytes
    )  # small storages travel together, on multiples of 64 bytes
    assert ten["d2h_bytes"] < 0.01 * 10 * nbytes
    assert found["left"] == 0
    assert found["same_output"] and found["same_bytes"] and found["keeps_changes"]


@pytest.mark.parametrize("kind", PEERS_WITHOUT_MMGP, ids=lambda kind: kind.name)
def test_every_contender_brings_the_same_bytes_back(kind: type[Contender], tmp_path: Path) -> None:
    found = figures_of(kind.name, FP16, tmp_path)
    assert "error" not in found, found["traceback"]
    assert found["same_output"] and found["same_bytes"] and found["left"] == 0


def test_a_stream_prefetches_from_copies_that_stay_on_the_host(tmp_path: Path) -> None:
    """Group offload moves the weights again at each forward, and never back."""
    found = figures_of("diffusers group offload, streams", FP16, tmp_path)
    nbytes = workloads.nbytes(FP16, tmp_path)
    assert found["swaps pcie4"]["h2d_bytes"] == 10 * nbytes
    assert found["swaps pcie4"]["d2h_bytes"] == 0
    assert found["again"]["h2d_bytes"] == nbytes
    assert found["peak_vram"] < nbytes


def test_int8_that_stays_in_vram_is_shown(tmp_path: Path) -> None:
    """`.to("cpu")` of a model with `Linear8bitLt` layers leaves what they hold in their state."""
    found = figures_of("plain .to()", INT8, tmp_path)
    assert found["left"] > workloads.nbytes(INT8, tmp_path)  # of both models
    assert any("leaves" in remark and "in VRAM" in remark for remark in remarks_about(found))


class Careless(PlainTo):
    """Loses a weight on the way."""

    name = "careless"

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        output = super().use(index, x)
        self.models[0].layers[2].weight.data.zero_()
        return output


class Refusing(PlainTo):
    name = "refusing"

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if index == 1:
            raise RuntimeError("not that one\nand a second line")
        return super().use(index, x)


class Unwarned(PlainTo):
    """Has no words for what is wrong."""

    name = "unwarned"

    def use(self, index: int, x: torch.Tensor) -> torch.Tensor:
        if index == 1:
            raise AssertionError
        return super().use(index, x)


@pytest.fixture
def bad_contenders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "ALL", (Careless, Refusing, Unwarned))


def remarks_about(found: dict[str, Any]) -> list[str]:
    return rows.remarks({"contenders": {"it": found}})


def test_changed_bytes_are_shown(bad_contenders: None, tmp_path: Path) -> None:
    found = figures_of("careless", FP16, tmp_path)
    assert found["same_bytes"] is False and found["same_output"] is False
    assert found["wrong"] == ["model 0: layers.2.weight"]
    assert any("layers.2.weight" in remark for remark in remarks_about(found))
    assert "**no**" in rows.row({"links": ["pcie4", "pcie5"]}, "careless", found)


def test_a_failure_is_a_result_with_its_reason(bad_contenders: None, tmp_path: Path) -> None:
    found = figures_of("refusing", FP16, tmp_path)
    assert (found["stage"], found["error"]) == ("first swaps", "RuntimeError: not that one")
    assert remarks_about(found) == ["it, first swaps: RuntimeError: not that one"]
    assert "swaps pcie4" not in found


def test_an_assertion_without_words_is_shown_by_its_code(
    bad_contenders: None, tmp_path: Path
) -> None:
    assert figures_of("unwarned", FP16, tmp_path)["error"] == "AssertionError: raise AssertionError"


def test_a_process_that_cannot_start_is_a_result() -> None:
    run = compare.Run(Console(quiet=True), options())
    assert "KeyError: 'no such task'" in run._child("no such task", {}, "")["error"]


@pytest.mark.parametrize("workload", [FP16, INT8, NF4], ids=lambda workload: workload.name)
def test_both_models_of_a_workload_differ_in_every_layer(
    workload: workloads.Workload, tmp_path: Path
) -> None:
    workloads.save(workload, tmp_path)
    model = workloads.load(workload, tmp_path, 0, "cuda:0")
    assert workloads.differing(model, workload, tmp_path, 0) == []
    others = workloads.differing(model, workload, tmp_path, 1)
    assert {f"layers.{number}.weight" for number in range(workload.layers)} <= set(others)


def test_copies_counted_by_dispatch_are_those_of_the_simulator(gpu: GPU, tmp_path: Path) -> None:
    """What is counted on a real GPU."""
    workloads.save(FP16, tmp_path)
    model = workloads.load(FP16, tmp_path, 0, gpu.device)
    counter = meter.DispatchCounter()
    with meter.measured() as expected, counter:
        model.to("cpu")
        model.to(gpu.device)
    found = meter.Reading()
    counter.write(found)
    ways = ("h2d_bytes", "h2d_copies", "d2h_bytes", "d2h_copies")
    assert [getattr(found, way) for way in ways] == [getattr(expected, way) for way in ways]
    assert found.h2d_bytes == workloads.nbytes(FP16, tmp_path)


@pytest.mark.parametrize("workload", [FP16, INT8, NF4], ids=lambda workload: workload.name)
def test_virtual_kernels_take_their_time_and_want_their_weights(
    gpu: GPU, workload: workloads.Workload, tmp_path: Path
) -> None:
    workloads.save(workload, tmp_path)
    model, x = (
        workloads.load(workload, tmp_path, 0, gpu.device),
        workloads.inputs(workload, gpu.device),
    )
    with kernels.virtual_kernels(0.25), meter.measured() as reading:
        model(x)
    assert (
        reading.link is not None
        and 0.25 * workload.layers <= reading.link < 0.25 * workload.layers + 0.01
    )
    model.layers[3].bias.data = model.layers[3].bias.data.cpu()
    with kernels.virtual_kernels(0.25), pytest.raises(RuntimeError, match="same device"):
        model(x)


def options(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{
            "quick": True,
            "large": False,
            "only": ["plain .to()", "qmove"],
            "scratch": None,
            "scale": 1.0,
        }
        | changes
    )


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: compare.Run, task: str, request: dict[str, Any], what: str) -> dict[str, Any]:
        return child.TASKS[task](request)

    monkeypatch.setattr(compare.Run, "_child", run)
    monkeypatch.setattr(
        compare, "ThreadPoolExecutor", lambda _workers: ThreadPoolExecutor(1)
    )  # they share the counters
    monkeypatch.setattr(workloads, "workloads", lambda quick: [FP16, INT8])


def test_the_whole_run_writes_figures_page_and_plots(in_this_process: None, tmp_path: Path) -> None:
    results = compare.Run(Console(quiet=True), options()).all()
    compare.write(results, tmp_path)
    text = (tmp_path / "docs" / "benchmark.md").read_text(encoding="utf-8")
    assert "**The GPU is a simulated one.**" in text
    assert "plain .to() leaves" in text
    for name in ("benchmark.svg", "benchmark-growth.svg"):
        assert f"({name})" in text and (tmp_path / "docs" / name).stat().st_size > 1000
    [kept] = (tmp_path / "benchmarks" / "results").iterdir()
    kept_results = json.loads(kept.read_text(encoding="utf-8"))
    assert kept_results == json.loads(json.dumps(compare.without_tracebacks(results)))
    assert kept.name == f"{results['machine']['date']}-simulated.json"
    judged = {
        target.what: target
        for target in targets.in_the_link_model(results)
        if target.where == "fp16, PCIe 4"
    }
    assert judged["second park, bytes"].figure == 0
    assert judged["ten swaps, bytes / .to()"].figure == pytest.approx(0.5, rel=0.01)


def test_a_model_that_would_take_too_much_ram_is_left_out_with_the_figures() -> None:
    point = compare.Run(Console(quiet=True), options())._size(
        {"tensors": 64, "nbytes": 10**15, "rounds": 1}
    )
    assert "needs 2100001.0 GB of RAM" in point["error"]
    assert "64 tensors" in page._missing({"by tensors": [], "by bytes": [point]})


def test_kept_results_name_no_folder_of_this_machine() -> None:
    kept = compare.without_tracebacks({"contenders": [{"error": "why", "traceback": "where"}]})
    assert kept == {"contenders": [{"error": "why"}]}


def test_a_target_is_reached_up_to_its_limit() -> None:
    reached = [targets.Target("", 1.05, figure).reached for figure in (1.05, 1.051, None)]
    assert reached == [True, False, None]


def test_swaps_in_little_room_show_what_a_park_first_has_no_room_for(gpu: GPU) -> None:
    """Given RAM for one model and VRAM for one, ten swaps move each byte once; a park is refused."""
    request = {"tensors": 40, "nbytes": 4_000_000, "case": "RAM for one, VRAM for one, no mirrors"}

    swapped = child.TASKS["little room"]({**request, "way": "swap"})

    assert swapped["out"] == 10 * swapped["nbytes"]
    assert 10 * swapped["nbytes"] <= swapped["h2d_bytes"] <= 10 * swapped["nbytes"] * 1.01
    assert swapped["peak_ram"] <= swapped["ram_limit"] < 2 * swapped["nbytes"]
    with pytest.raises(qmove.NotEnoughMemory) as refused:
        child.TASKS["little room"]({**request, "way": "park, then restore"})
    results = {
        "simulated": True,
        "little room": [
            request | {"way": "swap"} | swapped,
            request | {"way": "park, then restore", "error": f"NotEnoughMemory: {refused.value}"},
        ],
    }
    heading, first, second = rows.little_room(results)
    assert first[:2] == [request["case"], "swap"]
    assert "GB" not in second[2] and "needs 3." in second[2]
    assert len(heading) == len(first) == len(second)


def test_a_forward_after_a_restore_runs_the_operators_of_one_before(gpu: GPU) -> None:
    """The times are for the page: here only that they are measured, and what ran."""
    request = {"precision": "int8", "width": 64, "layers": 2, "rounds": 2, "pairs": 2}
    measured = request | child.TASKS["forward"](request)
    before, after = measured["operators"]
    assert before == after > 0 and measured["ratio"] > 0
    slow = measured | {"ratio": 1.5, "operators": [before, before + 1]}
    headings, fast, slower = rows.forwards({"forwards": [measured | {"ratio": 1.0}, slow]})
    assert len(headings) == len(fast) == len(slower)
    assert (fast[1], slower[1]) == ("1.000", "**1.500**")
    assert slower[-1].startswith("**")
