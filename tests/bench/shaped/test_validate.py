"""Validation of virtual time: the fit, the verdict, and a short run between shaped hosts where that is possible."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bench.common.statistics import mean_error
from bench.shaped import validation as validate
from bench.shaped.hosts import why_not
from bench.shaped.validation import Cell, Model, compare, main, report

TRUE = (0.9, 0.6, 0.8, 200.0, 150.0, 50.0, 300.0)
RATES = {
    "add": 5e9,
    "scale": 5e9,
    "qsgd.encode": 6e8,
    "qsgd.recode": 5e8,
    "qsgd.decode": 2e9,
    "pca.encode": 1.5e10,
    "pca.decode": 2e10,
}


def made_cells(noise: float = 0.0) -> dict[str, Any]:
    """What `measure` would find on a machine that is as the model says."""
    model = Model(RATES, {100: 12_500, 300: 37_500, 1000: 125_000}, 2)
    model.parameters = TRUE
    cells = []
    for hosts in (2, 3, 6):
        for rate_mbps in (100, 300, 1000):
            for size_bytes in validate.SIZES[:3]:
                for method in ("rar", "qsgd", "linear"):
                    cell = Cell(method, size_bytes, rate_mbps, hosts, (1.0,), size_bytes * 2 * (hosts - 1) / hosts)
                    time_s = model.time_s(cell)
                    times_s = [time_s * (1 - noise), time_s, time_s * (1 + noise)]
                    amounts_s = {name: [rate, 1.0] for name, rate in RATES.items()}
                    cells.append({**vars(cell), "times_s": times_s, "amounts_s": amounts_s})
    shaping = {str(rate): {"burst_bytes": rate * 125} for rate in (100, 300, 1000)}
    return {"cells": cells, "shaping": shaping, "cores": 2}


def test_the_fit_finds_the_machine_that_made_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validate, "MOST_FITS", 120)
    result = compare(made_cells())
    # The other parameters are hard to tell apart.
    assert result["parameters"]["share of the rate"] == pytest.approx(TRUE[0], rel=0.1)
    assert result["mean_error"] < 0.05
    assert result["mean_error"] < result["naive_mean_error"] / 2
    assert result["met"]
    assert result["naive_mean_error"] > 0.1
    assert result["within"] == result["predicted"] == sum(not row["fitted"] for row in result["rows"])
    assert 0 < result["predicted"] < len(result["rows"])


def test_only_calibrating_cells_are_fitted_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others twice as long: a fit that begins at the truth stays there, and all are beyond their bounds."""
    monkeypatch.setattr(Model, "BEGIN", TRUE)
    monkeypatch.setattr(validate, "MOST_FITS", 12)  # more than one along each parameter
    found = made_cells()
    for cell in found["cells"]:
        if not validate.as_cell(cell).calibrates:
            cell["times_s"] = [2 * time_s for time_s in cell["times_s"]]
    changed = compare(found)
    assert tuple(changed["parameters"].values()) == pytest.approx(TRUE, rel=1e-12)
    assert changed["within"] == 0
    assert not changed["met"]
    assert changed["mean_error"] == pytest.approx(1.0, abs=1e-6)
    for cell in found["cells"]:  # and leaves it where those are fitted to that tell another story
        cell["times_s"] = [2 * time_s for time_s in cell["times_s"]]
    assert compare(found)["parameters"] != changed["parameters"]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parameters are found at once."""
    monkeypatch.setattr(Model, "fit", lambda model, cells: setattr(model, "parameters", TRUE))


@pytest.mark.usefixtures("known")
def test_a_cell_that_varies_may_be_missed_by_twice_its_spread() -> None:
    cell = Cell("rar", 65_536, 100, 3, (0.8, 1.0, 1.2), 1.0)
    assert cell.time_s == 1.0
    assert cell.spread == pytest.approx(0.2)
    result = compare(made_cells(noise=0.3))
    assert {round(row["bound"], 9) for row in result["rows"]} == {0.6}


def test_mean_error_counts_too_long_and_too_short_alike() -> None:
    assert mean_error([1.0, -0.5]) == pytest.approx(1.0)
    assert mean_error([0.1, 0.1]) == pytest.approx(0.1)
    assert mean_error([]) == 0.0


@pytest.mark.usefixtures("known")
def test_the_report_names_what_is_beyond() -> None:
    found = made_cells()
    late = next(cell for cell in found["cells"] if not validate.as_cell(cell).calibrates)
    late["times_s"] = [3 * time_s for time_s in late["times_s"]]
    text = report(compare(found))
    assert text.count("beyond 15%") == 1
    assert "latency of links is not shaped" in text
    assert "| fitted" in text


@pytest.mark.usefixtures("known")
def test_a_bad_prediction_is_no_success(tmp_path: Path) -> None:
    found = made_cells()
    for cell in found["cells"]:
        cell["times_s"] = [2 * time_s for time_s in cell["times_s"]]
    (tmp_path / "cells.json").write_text(json.dumps(found))
    assert main(["--again", "--out", str(tmp_path)]) == 1
    assert "within its bound: not met" in (tmp_path / "table.md").read_text()


@pytest.mark.usefixtures("known")
def test_predicting_again_what_was_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cells.json").write_text(json.dumps(made_cells()))
    assert main(["--again", "--out", str(tmp_path)]) == 0
    assert "Geometric-mean error 0.0%" in capsys.readouterr().out
    assert (tmp_path / "table.md").read_text().startswith("| method")


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--again", "--out", str(tmp_path / "none")]) == 2
    assert "cells.json" in capsys.readouterr().err
    for content in ("{}", "[]", "no"):
        (tmp_path / "cells.json").write_text(content)
        assert main(["--again", "--out", str(tmp_path)]) == 2
        assert "not what a validation has measured" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["--quick", "--out", str(tmp_path / "file" / "out")]) == (0 if why_not() else 2)
    for arguments in (["--repeats", "0"], ["--seconds", "-1"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2


def test_where_hosts_can_not_be_made_it_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(validate, "why_not", lambda: "this is not Linux")
    assert main(["--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "validate is skipped: this is not Linux\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_a_short_validation_between_real_hosts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All of it works, and times are at least what the links allow; how good predictions are is for a quiet machine."""

    def namespaces() -> set[str]:
        return set(subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split())

    measured = validate.measure

    def fewer(hosts: Sequence[int], rates_mbps: Sequence[int], *plan: Any) -> dict[str, Any]:
        """2 hosts at one rate and 3 at the other, instead of both at both."""
        parts = [measured([number], [rate], *plan) for number, rate in zip(hosts, rates_mbps, strict=True)]
        return {
            "cells": [cell for part in parts for cell in part["cells"]],
            "shaping": {rate: shaping for part in parts for rate, shaping in part["shaping"].items()},
        }

    monkeypatch.setattr(validate, "measure", fewer)
    before = namespaces()
    status = main(["--quick", "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert status == 0, said.err
    result = json.loads((tmp_path / "out" / "validate.json").read_text())
    assert {(row["hosts"], row["rate_mbps"]) for row in result["rows"]} == {(2, 100), (3, 300)}
    assert len(result["rows"]) == 2 * 3 * 3
    for row in result["rows"]:
        assert row["predicted_s"] > 0
        if row["size_bytes"] >= 1 << 20:
            assert row["measured_s"] >= 0.95 * row["naive_s"]
    assert "latency of links is not shaped" in said.out
    assert not namespaces() - before
