"""The demo: a real model leaves and comes back, and the figures shown are the ones measured."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qmove_core.cli.demo import park_and_restore, picture, run
from qmove_core.cli.demo.picture import Timeline
from qmove_core.cli.demo.setting import Setting
from tests.builders.device import GPU


@pytest.fixture
def only_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(park_and_restore, "PRECISIONS", ("int8",))


def test_the_demo_on_a_real_model(gpu: GPU, only_int8: None, tmp_path: Path) -> None:
    output, picture = io.StringIO(), tmp_path / "folder" / "demo.png"
    succeeded = run.main(Console(file=output, width=100), picture) == 0
    shown = output.getvalue()
    assert succeeded, shown
    assert "all-MiniLM-L6-v2 out of VRAM and back" in shown
    assert "wakes" in shown and "NO" not in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert gpu.allocated() == 0


PERFECT = park_and_restore.Round(
    "nf4",
    "qmove",
    before=9,
    away=0,
    after=9,
    same_bytes=True,
    same_embeddings=True,
    same_after_use=True,
)


def test_a_demo_in_which_qmove_breaks_its_promise_fails(
    gpu: GPU, only_int8: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Setting, "load", lambda setting, *places, **options: None)
    monkeypatch.setattr(Setting, "embed", lambda setting, model: None)
    monkeypatch.setattr(run, "materialize_dispatched", lambda setting: True)
    monkeypatch.setattr(picture, "draw", lambda *arguments: None)
    monkeypatch.setattr(
        park_and_restore, "_by_to", lambda setting, precision: replace(PERFECT, way=".to()")
    )
    monkeypatch.setattr(
        park_and_restore, "_by_qmove", lambda setting, precision, line: replace(PERFECT, away=1)
    )
    output = io.StringIO()
    assert run.main(Console(file=output, width=100), tmp_path / "demo.png") == 1
    assert "nf4 qmove left 1 B of 9 B in VRAM (11%)" in output.getvalue()


@pytest.mark.parametrize(
    "flaw",
    [
        {"away": 1},
        {"away": None},
        {"after": 10},
        {"same_bytes": False},
        {"same_embeddings": False},
        {"same_after_use": None},
    ],
    ids=str,
)
def test_any_flaw_spoils_a_round(flaw: dict[str, object]) -> None:
    assert PERFECT.is_perfect
    assert not replace(PERFECT, **flaw).is_perfect  # type: ignore[arg-type]


class TestTimeline:
    def test_samples_are_what_was_measured_in_order(self) -> None:
        vram = iter([100, 60, 0, 0, 0])
        ram = iter([0, 100, 100, 100, 100])
        line = Timeline(lambda: next(vram), lambda: next(ram))
        with line.stage("park"):
            line.note()
        line.state("parked")
        assert [(s.stage, s.vram, s.ram) for s in line.samples] == [
            (0, 100, 0),
            (0, 60, 100),
            (0, 0, 100),
            (1, 0, 100),
            (1, 0, 100),
        ]
        shares = [sample.share for sample in line.samples]
        assert (shares[0], shares[2:]) == (0.0, [1.0, 0.0, 1.0])
        assert 0 < shares[1] < 1
        assert line.names == ["park", "parked"]
        assert line.seconds[0] is not None and line.seconds[1] is None

    def test_what_is_drawn_is_what_was_sampled(self, tmp_path: Path) -> None:
        from matplotlib.figure import Figure

        line = Timeline(lambda: 8 << 20, lambda: 3 << 20)
        line.state("parked")
        panel = Figure().subplots()
        picture._draw_panel(panel, "int8", line, left_by_to=2 << 20)
        (vram,) = panel.lines[:1]
        assert list(vram.get_ydata()) == [8, 8]
        assert "2.0 MiB" in [text.get_text() for text in panel.texts]
        picture.draw(tmp_path / "x.svg", {"int8": line}, {"int8": None}, "here")
        assert (tmp_path / "x.svg").read_text().count("<svg") == 1
