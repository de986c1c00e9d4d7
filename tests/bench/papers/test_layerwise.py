"""Layer-wise against entire-model compression: the command end to end, what it runs, and the rules of its table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bench.common.command_line import UsageError
from bench.common.learning_rate import rise_and_fall
from bench.common.statistics import Difference, holds, paired
from bench.drawing import page as figure_page
from bench.papers.layerwise.command import main, parse
from bench.papers.layerwise.findings import STATEMENTS, Statement, judge, judge_all
from bench.papers.layerwise.runs import run
from bench.papers.layerwise.sizes import (
    BASELINE,
    METHODS,
    PAPER,
    PAPER_RATIOS,
    SMALL,
    Network,
    Setting,
    Where,
    differences,
    specs,
)
from gradiveq.compressors import COMPRESSORS
from tests.support.images import write_images
from tests.support.redrawn import check_drawn_again

pytestmark = pytest.mark.slow

TINY = ["--width", "0.03125", "--batch-size", "8", "--epochs", "2", "--processes", "1"]


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels, in less time."""
    monkeypatch.setattr(figure_page, "DPI", 30)


# --- what is run -----------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_papers():
    """0 to 0.4 in 5 of 24 epochs, then linearly to 0, at 10 steps an epoch."""
    rate = rise_and_fall(0.4, 5 / 24, 240)
    assert rate(0) == pytest.approx(0.4 / 50)
    assert rate(24) == pytest.approx(0.2)
    assert rate(49) == pytest.approx(0.4)
    assert rate(144) == pytest.approx(0.2)
    assert rate(239) == 0


@pytest.mark.parametrize("size", [SMALL, PAPER])
def test_every_compressed_run_has_its_pair(size: Any):
    grid = specs(size, METHODS, Where())
    without = [
        json.dumps({key: value for key, value in spec.items() if key != "granularity"}, sort_keys=True)
        for spec in grid.values()
        if spec["method"] != BASELINE
    ]
    assert {without.count(one) for one in without} == {2}
    for spec in grid.values():
        assert (spec["granularity"] is None) == (spec["method"] == BASELINE)
        if spec["method"] != BASELINE:
            COMPRESSORS[spec["method"]](**spec["fields"])
    assert {spec["seed"] for spec in grid.values()} == set(range(size.seeds))


def test_the_papers_size():
    grid = specs(PAPER, METHODS, Where("cifar", "imagenet"))
    assert {spec["workers"] * spec["batch_size"] for spec in grid.values()} == {1024}
    assert {spec["value"] for spec in grid.values() if spec["method"] in ("topk", "randomk")} == set(PAPER_RATIOS)
    epochs = {(spec["method"], spec["network"]): spec["epochs"] for spec in grid.values()}
    assert epochs["topk", "resnet9"] == 24
    assert epochs["randomk", "alexnet"] == epochs["threshold", "resnet9"] == 40
    assert epochs["topk", "resnet50"] == 34
    assert {spec["data"] for spec in grid.values() if spec["network"] == "resnet50"} == {"imagenet"}
    assert {spec["data"] for spec in grid.values() if spec["network"] == "resnet9"} == {"cifar"}
    thresholds = sorted({spec["value"] for spec in grid.values() if spec["method"] == "threshold"})
    assert thresholds[-1] / thresholds[0] >= 999
    assert not differences(PAPER)
    assert "a global batch of 128 instead of 1,024" in differences(SMALL)
    assert not any(network.imagenet for network in parse(["--paper"]).size.networks)
    assert parse(["--paper"]).where.data == "cifar-10"
    assert parse([]).where.data is None
    assert any(network.imagenet for network in parse(["--paper", "--imagenet", "x"]).size.networks)


def spec_of(tmp_path: Path, method: str, value: float | None, granularity: str, seed: int = 0) -> dict[str, Any]:
    data = tmp_path / "images"
    options = parse([*TINY, "--data", str(data) if data.exists() else write_images(data)])
    grid = specs(options.size, METHODS, options.where).values()
    wanted = {"method": method, "granularity": granularity, "seed": seed, "optimiser": "sgd"}
    found = next(spec for spec in grid if all(spec[key] == wanted[key] for key in wanted))
    setting = Setting(method, value)
    return {**found, "value": value, "fields": setting.fields}


def test_a_threshold_is_the_same_at_both_granularities_to_the_bit(tmp_path: Path):
    by_layer, by_model = (
        run(spec_of(tmp_path, "threshold", 0.003, granularity), tmp_path / "x") for granularity in ("layer", "model")
    )
    assert by_layer["evaluations"] == by_model["evaluations"]
    assert by_layer["steps"]["loss"] == by_model["steps"]["loss"]
    assert 0.05 < np.mean(by_layer["steps"]["density"]) < 0.95
    other = run(spec_of(tmp_path, "threshold", 0.01, "layer"), tmp_path / "x")
    assert other["steps"]["loss"] != by_layer["steps"]["loss"]


@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_entire_model_top_k_is_never_worse_at_equal_k(tmp_path: Path, granularity: str):
    """All layers have an even number of elements, so half of each is half of all."""
    steps = run(spec_of(tmp_path, "topk", 0.5, granularity), tmp_path / "x")["steps"]
    by_layer, by_model = (np.array(steps[f"{name}_error"]) for name in ("layer", "model"))
    assert (by_model <= by_layer * (1 + 1e-6)).all()
    assert (by_model < 0.99 * by_layer).any()
    assert steps["density"] == [0.5] * len(steps["density"])
    own = np.array(steps["relative_error"])  # of both workers; the first one's are measured
    np.testing.assert_allclose(own, by_layer if granularity == "layer" else by_model, rtol=0.5)


@pytest.mark.parametrize("method", ["terngrad", "qsgd-gather"])
def test_unbiased_moments_are_one_plus_the_error_and_within_their_bounds(tmp_path: Path, method: str):
    result = run(spec_of(tmp_path, method, None, "layer"), tmp_path / "x")
    steps = {name: np.mean(values) for name, values in result["steps"].items()}
    for name in ("layer", "model"):
        assert steps[f"{name}_moment"] == pytest.approx(1 + steps[f"{name}_error"], rel=0.25)
        assert steps[f"{name}_moment"] <= steps[f"{name}_bound"]
    assert result["noise"]["layer_wise"] < result["noise"]["entire_model"]
    assert result["layers"] == 16


def test_seeds_differ_and_repeat(tmp_path: Path):
    first = run(spec_of(tmp_path, "terngrad", None, "layer"), tmp_path / "x")
    again = run(spec_of(tmp_path, "terngrad", None, "layer"), tmp_path / "x")
    other = run(spec_of(tmp_path, "terngrad", None, "layer", seed=1), tmp_path / "x")
    assert first == again
    assert first["steps"]["loss"] != other["steps"]["loss"]


# --- the rules -------------------------------------------------------------------------------------------------------


def test_paired_differences():
    difference = paired([2.0, 5.0, 8.0], [1.0, 3.0, 5.0])
    assert difference.mean == pytest.approx(2)
    assert difference.half_width == pytest.approx(
        4.302653 / math.sqrt(3), rel=1e-6
    )  # t of 2 degrees of freedom, 97.5 %
    assert paired([2.0, 5.0], [1.0, 3.0]).half_width == math.inf


@pytest.mark.parametrize(
    ("relation", "mean", "half_width", "expected"),
    [
        ("better", 5, 4, True),
        ("better", 0.5, 0.4, True),
        ("better", 5, 6, None),
        ("better", 0, 1.9, False),
        ("better", -5, 1, False),
        ("better", 5, math.inf, None),
        ("same", 0.5, 1, True),
        ("same", 0.5, 1.6, None),
        ("same", 3, 2, False),
        ("same", 1.5, 1, None),
        ("same", -3, 2, False),
        ("same", 3, 4, None),
        ("not worse", 5, 1, True),
        ("not worse", 5, 8, None),
        ("not worse", -1, 0.9, True),
        ("not worse", -3, 2, False),
        ("not worse", -3, 4, None),
        ("not worse", -1.5, 1, None),
    ],
)
def test_rules(relation: Any, mean: float, half_width: float, expected: bool | None):
    assert holds(relation, Difference(mean, half_width), 2.0) is expected


def test_rules_of_errors_have_no_margin():
    assert holds("better", Difference(0.01, 0.005), 0.0) is True
    assert holds("better", Difference(-0.01, 0.005), 0.0) is False
    assert holds("better", Difference(0.001, 0.005), 0.0) is None
    assert holds("better", Difference(0.0, 0.0), 0.0) is False


NETWORK = Network("alexnet", width=0.125)


def fake(
    setting: Setting, granularity: str | None, accuracies: list[float], errors: Any = (0.5, 0.7)
) -> dict[str, Any]:
    """Records as `run_grid` gives them, one for each seed."""
    return {
        f"{setting}-{granularity}-{seed}": {
            "spec": {
                "network": "alexnet",
                "method": setting.method,
                "value": setting.value,
                "granularity": granularity,
                "optimiser": setting.optimiser,
                "seed": seed,
            },
            "result": {
                "source": "made up",
                "guessing": 0.1,
                "evaluations": [{"accuracy": 0.05}, {"accuracy": accuracy / 100}],
                "steps": {"layer_error": [errors[0], None], "model_error": [errors[1] + 0.001 * seed, None]},
            },
            "seconds": 1.0,
        }
        for seed, accuracy in enumerate(accuracies)
    }


TOPK = Statement("Fig. 7", "entire-model better", "topk", "better", most=0.1, first="model", second="layer")


def test_a_statement_is_judged_in_all_its_settings():
    clear = fake(Setting("topk", 0.01), "layer", [50, 52, 51]) | fake(Setting("topk", 0.01), "model", [61, 63, 61])
    above = fake(Setting("topk", 0.5), "layer", [90, 91, 92]) | fake(Setting("topk", 0.5), "model", [50, 51, 52])
    nesterov = Setting("topk", 0.01, "nesterov")
    other = fake(nesterov, "layer", [90, 91, 92]) | fake(nesterov, "model", [50, 51, 52])
    finding = judge(TOPK, clear | above | other, NETWORK)
    assert finding.verdict == "confirmed"
    assert finding.ours == "1 %: +10.67 ± 1.43 points"
    assert finding.data == "alexnet (width 0.125)"

    against = fake(Setting("topk", 0.1), "layer", [80, 81, 82]) | fake(Setting("topk", 0.1), "model", [70, 71, 72])
    assert judge(TOPK, clear | against, NETWORK).verdict == "not confirmed"

    unclear = fake(Setting("topk", 0.1), "layer", [80, 81, 82]) | fake(Setting("topk", 0.1), "model", [70, 99, 82])
    assert judge(TOPK, clear | unclear, NETWORK).verdict == "not testable here"
    assert "open" in judge(TOPK, clear | unclear, NETWORK).ours


def test_what_cannot_be_judged():
    low = fake(Setting("topk", 0.01), "layer", [10, 10, 10]) | fake(Setting("topk", 0.01), "model", [14, 14, 14])
    finding = judge(TOPK, low, NETWORK)
    assert finding.holds is None
    assert "neither learns" in finding.ours
    clear = fake(Setting("topk", 0.1), "layer", [50, 52, 51]) | fake(Setting("topk", 0.1), "model", [61, 63, 61])
    finding = judge(TOPK, low | clear, NETWORK)
    assert finding.holds is True
    assert finding.ours.startswith("1 %: +4.00 ± 0.00 points (neither learns); 10 %: ")
    for one in clear.values():
        one["result"]["guessing"] = 0.45  # of its data
    assert judge(TOPK, clear, NETWORK).holds is None
    two = fake(Setting("topk", 0.01), "layer", [50, 51]) | fake(Setting("topk", 0.01), "model", [80, 81])
    assert judge(TOPK, two, NETWORK).holds is None
    assert judge(TOPK, fake(Setting("topk", 0.01), "layer", [50, 51, 52]), NETWORK).ours == "not run"
    findings = judge_all(low, [NETWORK])
    assert len(findings) == len(STATEMENTS)
    assert sum("ImageNet" in finding.ours for finding in findings) == 3
    assert {finding.verdict for finding in findings} == {"not testable here"}


def test_errors_and_baselines():
    adaptive = Setting("adaptive")
    runs = fake(adaptive, "layer", [60, 61, 62]) | fake(adaptive, "model", [40, 41, 42])
    runs |= fake(Setting(BASELINE), None, [80, 81, 82])
    by_claim = {finding.claim: finding for finding in judge_all(runs, [NETWORK])}
    error = next(finding for claim, finding in by_claim.items() if claim.startswith("adaptive threshold: per-layer"))
    assert error.holds is True
    assert error.ours.startswith("+0.20")
    slower = next(finding for claim, finding in by_claim.items() if "slower" in claim)
    assert slower.holds is True
    assert slower.ours == "+20.00 ± 0.00 points"


# --- the command -----------------------------------------------------------------------------------------------------


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "out"
    data = write_images(tmp_path / "images")
    command = [
        *TINY,
        "--methods",
        "topk,adaptive",
        "--ratios",
        "0.1",
        "--seeds",
        "3",
        "--data",
        data,
        "--out",
        str(out),
    ]
    assert main(command) == 0
    text = (out / "table.md").read_text()
    assert text in capsys.readouterr().out
    assert "Data: IDX images (48 + 20 images from images, not the published Fashion-MNIST), not CIFAR." in text
    assert "2 epochs instead of 24" in text
    assert "\n## Differences from the paper\n\n* Unlike the paper: 0.03125 of alexnet's channels" in text
    assert "\n* QSGD has the paper's 256 levels" in text
    record = json.loads((out / "layerwise.json").read_text())
    assert len(record["runs"]) == len(list((out / "runs").iterdir())) == 3 * (2 + 2 * 3)
    assert record["environment"]["command"].startswith("python -m bench.layerwise --width 0.03125")
    assert {finding["verdict"] for finding in record["findings"]} <= {"confirmed", "not confirmed", "not testable here"}
    one = record["runs"]["alexnet-topk-sgd-0.1-layer-s0"]
    assert [evaluation["epoch"] for evaluation in one["evaluations"]] == [1, 2]
    for name in ("fig7-topk.png", "fig5-adaptive.png"):
        with Image.open(out / name) as image:
            assert image.width > 200
    assert not (out / "fig2-randomk.png").exists()
    check_drawn_again(out)

    before = {path.name: path.read_bytes() for path in (out / "runs").iterdir()}
    assert main(command) == 2
    assert "is there already; resume" in capsys.readouterr().err
    repeated = "alexnet-topk-nesterov-0.1-model-s1.json"
    (out / "runs" / repeated).unlink()
    assert main([*command, "--resume"]) == 0
    after = {path.name: path.read_bytes() for path in (out / "runs").iterdir()}
    assert {name for name in before if before[name] != after[name]} <= {repeated}
    assert json.loads(before[repeated])["result"] == json.loads(after[repeated])["result"]
    assert main([*command, "--resume", "--epochs", "3"]) == 2
    assert "was run with epochs = 2.0, now it is 3.0" in capsys.readouterr().err


def test_imagenet_folder(tmp_path: Path):
    generator = np.random.default_rng(0)
    for part, count in (("train", 2), ("val", 1)):
        for label in range(2):
            folder = tmp_path / "photos" / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.jpeg")
    out = tmp_path / "out"
    command = ["--paper", "--imagenet", str(tmp_path / "photos"), "--networks", "resnet50", "--methods", "terngrad"]
    command += ["--width", "0.03", "--batch-size", "1", "--epochs", "1", "--processes", "1"]
    assert main([*command, "--out", str(out)]) == 0
    record = json.loads((out / "layerwise.json").read_text())
    assert len(record["runs"]) == 3
    assert all("top5_accuracy" in one["evaluations"][-1] for one in record["runs"].values())
    assert "photos (4 + 2 images of 2 classes; not ImageNet as published)" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "topk,pca"], "got 'pca'"),
        (["--networks", "resnet9"], "--networks must be of alexnet here, got 'resnet9'"),
        (["--seeds", "0"], "--seeds must be at least 1, got 0"),
        (["--epochs", "0"], "--epochs must be positive, got 0"),
        (["--width", "nan"], "--width must be positive, got nan"),
        (["--imagenet", "x"], "--imagenet is for --paper"),
    ],
)
def test_bad_options(arguments: list[str], message: str):
    with pytest.raises(UsageError, match=message):
        parse(arguments)


def test_missing_data_is_said_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: no such file or folder")
