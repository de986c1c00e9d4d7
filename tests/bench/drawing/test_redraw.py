"""What is in results/ is drawn again by `make figures`, all of it."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from bench import figures
from bench.drawing import page as figure_page
from bench.experiments import condensed_runs as kept
from tests.support.processes import ROOT

RESULTS = ROOT / "results"


def copied(folder: Path, *names: str) -> Path:
    """Records without figures."""
    for name in names:
        shutil.copytree(RESULTS / name, folder / name, ignore=shutil.ignore_patterns("*.png", "runs", "table.md"))
    return folder


def test_what_is_drawn_looks_as_it_does_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By pixels: the last digit of a coordinate may be another on another machine. A caption that changes is seen."""
    names = ("paper-timing", "busbw", "advise/resnet32-v100-10gbe-4")
    assert figures.main([str(copied(tmp_path, *names))]) == 0, capsys.readouterr().err
    for name in names:
        committed = sorted(path.name for path in (RESULTS / name).glob("*.png"))
        assert sorted(path.name for path in (tmp_path / name).glob("*.png")) == committed
        for png in committed:
            ours, theirs = (image.imread(folder / name / png) for folder in (tmp_path, RESULTS))
            assert ours.shape == theirs.shape, png
            assert np.abs(ours - theirs).mean() < 0.004, png


def test_every_figure_has_a_record_that_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All figures of results/, without their pixels; and the tables that are made with them, to the letter."""
    folders = [path.name for path in RESULTS.iterdir() if path.is_dir() and not path.name.startswith("20")]
    copied(tmp_path, *folders)
    monkeypatch.setattr(figure_page.Figure, "savefig", lambda self, file, **options: file.write(b"quickly"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    written, errors = figures.draw_all(tmp_path)
    assert errors == []
    assert {path.relative_to(tmp_path) for path in written if path.suffix == ".png"} == {
        path.relative_to(RESULTS) for folder in folders for path in (RESULTS / folder).rglob("*.png")
    }
    assert all(path.read_bytes() == content for path, content in before.items())  # records are left alone
    tables = [path.relative_to(tmp_path) for path in written if path.suffix == ".md"]
    assert len(tables) == 5
    for table in tables:
        assert (tmp_path / table).read_text() == (RESULTS / table).read_text()


def test_runs_are_kept_to_the_digit_and_in_their_types(tmp_path: Path) -> None:
    result = {"steps": {"error": [1 / 3, None, 2e-300], "iteration": [1, 2]}, "diverged": None, "left": "out"}
    runs = {"b": {"spec": {"seed": 1}, "seconds": 1.5, "result": result}, "a": {"spec": {}, "seconds": 2, "result": {}}}
    found = kept.keep(tmp_path, runs, lambda result: {key: result[key] for key in result if key != "left"})
    assert list(found) == ["b", "a"]
    assert found == kept.read(tmp_path)
    steps = {"error": [0.333333333, None, 2e-300], "iteration": [1, 2]}
    assert found["b"] == {"spec": {"seed": 1}, "seconds": 1.5, "result": {"steps": steps, "diverged": None}}
    before = (tmp_path / kept.FILE).read_bytes()
    kept.keep(tmp_path, found, lambda result: result)
    assert (tmp_path / kept.FILE).read_bytes() == before


@pytest.mark.parametrize(
    "content",
    [None, b"", b"no archive", gzip.compress(b"{")[:-9], gzip.compress(b"{")],
    ids=["missing", "empty", "no archive", "cut off", "no JSON"],  # what is compressed contains the time
)
def test_without_its_runs_an_experiment_says_so(
    content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "python -m bench.hard_threshold"
    (tmp_path / "hard-threshold.json").write_text(json.dumps({"environment": {"command": command}}))
    if content is not None:
        (tmp_path / kept.FILE).write_bytes(content)
    assert figures.main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / kept.FILE} is ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("name", [*figures.EXPERIMENTS, "record.json", "x.json"])
@pytest.mark.parametrize("record", [{}, {"environment": 3}, {"words": [], "panels": []}, {"cells": [1], "panels": [1]}])
def test_damaged_records_of_experiments(
    name: str, record: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_text(json.dumps(record))
    known = name in figures.EXPERIMENTS or (name == "record.json" and "environment" not in record and record != {})
    assert figures.main([str(tmp_path)]) == (2 if known or "panels" in record else 0)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/") == bool(error)
    assert error.count("\n") == (known or "panels" in record)
    assert list(tmp_path.iterdir()) == [tmp_path / name]
