"""The hard-threshold paper's experiments: the command end to end, what it runs, and the rules of its table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from bench.common.command_line import UsageError
from bench.data.ratings import Interactions, load_ratings
from bench.drawing import page as figure_page
from bench.experiments.findings import CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE, Finding, table
from bench.papers.hard_threshold import logistic_findings, network_findings
from bench.papers.hard_threshold.command import PARTS, main, parse
from bench.papers.hard_threshold.figures import by_fields, elements_per_iteration
from bench.papers.hard_threshold.runs import AccordionObserver, optimiser, problem_of, run, schedule, threshold_for
from bench.papers.hard_threshold.sizes import (
    MADELON,
    PAPER,
    RESNET18,
    SMALL,
    SMALL_IMAGES,
    SMALL_RATINGS,
    SMALL_TEXT,
    Given,
    HardThresholdSize,
    differences,
    specs,
)
from bench.papers.hard_threshold.tasks import make
from bench.simulated.training import CompressedMean, SimulatedTask, Step, simulate
from gradiveq import Aggregator
from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.threshold import Threshold
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.parts import Part, layer_parts
from gradiveq.flatten import Layout
from gradiveq.specs import parse as parse_method
from ring.handle import Ring
from ring.lockstep import run as run_in_lockstep
from tests.support.images import write_images
from tests.support.redrawn import check_drawn_again

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer pixels, in less time."""
    monkeypatch.setattr(figure_page, "DPI", 30)


# --- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [SMALL, PAPER])
def test_the_grid_names_runs_that_can_be(size: HardThresholdSize) -> None:
    grid = specs(size, {}, PARTS, "cpu")
    for spec in grid.values():
        assert json.loads(json.dumps(spec)) == spec
        assert spec["compressor"] in {*COMPRESSORS, "accordion"}
    every = [one for one in grid.values() if one["part"] == "networks"]
    assert {one["kind"] for one in every} == {"images", "text", "ratings"}
    assert len({json.dumps(one, sort_keys=True) for one in grid.values()}) == len(grid)
    for kind in ("images", "text", "ratings"):
        seeds = [one["seed"] for one in every if one["kind"] == kind and one["compressor"] == "identity"]
        assert sorted(seeds) == list(range(size.seeds))


def test_what_is_given_is_used_and_gisette_only_then() -> None:
    without = specs(SMALL, {}, ("logistic",), "cpu")
    assert {spec["problem"] for spec in without.values()} == {"generated"}
    given = specs(SMALL, {"madelon": Given("a", None), "gisette": Given("b", None)}, ("logistic",), "cpu")
    assert {(spec["problem"], spec["data"]) for spec in given.values()} == {("madelon", "a"), ("gisette", "b")}
    assert {spec["compressor"] for spec in given.values()} == {"identity", "topk", "threshold"}


def test_the_papers_hyper_parameters() -> None:
    """Tables 3 to 6."""
    grid = specs(PAPER, {}, ("networks",), "cpu")
    images = [spec for spec in grid.values() if spec["kind"] == "images"]
    assert {spec["network"] for spec in images} == {"resnet18", "googlenet", "senet18"}
    assert all(
        (spec["workers"], spec["batch_size"], spec["epochs"], spec["lr"]) == (8, 256, 300, 1.6) for spec in images
    )
    assert sum(spec["compressor"] == "accordion" for spec in images) == 3 * 6
    for parameters, expected in (
        (11_173_962, 4.73e-3),
        (11_220_132, 4.72e-3),
        (6_166_250, 6.37e-3),
        (6_258_500, 6.32e-3),
        (11_436_256, 4.68e-3),
    ):
        assert threshold_for(1e-3, parameters) == pytest.approx(expected, abs=1e-5)


def test_the_schedule_warms_up_and_decays() -> None:
    rate = schedule({"lr": 1.6, "lr_start": 0.1, "warmup_epochs": 5, "milestones": [150, 250]}, 10)
    assert rate(0) == pytest.approx(0.1)
    assert rate(25) == pytest.approx(0.85)
    assert rate(50) == rate(1499) == pytest.approx(1.6)
    assert rate(1500) == pytest.approx(0.16)
    assert rate(2999) == pytest.approx(0.016)


def test_momentum_is_the_workers_with_update_compression() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    spec = {"optimiser": "nesterov", "momentum": 0.9, "weight_decay": 1e-4, "lr": 0.1, "feedback": "gradient"}
    made = optimiser(model, spec)
    others, norms = made.param_groups
    assert (others["momentum"], others["nesterov"], others["weight_decay"]) == (0.9, True, 1e-4)
    assert norms["weight_decay"] == 0
    assert [id(p) for p in norms["params"]] == [id(p) for p in model[1].parameters()]
    others, _ = optimiser(model, spec | {"feedback": "update"}).param_groups
    assert (others["momentum"], others["nesterov"]) == (0, False)
    assert others["weight_decay"] == pytest.approx(1e-3)
    assert isinstance(optimiser(model, spec | {"optimiser": "adam"}), torch.optim.Adam)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "madelon"], "KIND=PATH"),
        (["--data", "music=x"], "KIND=PATH"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--epochs", "0"], "--epochs must be"),
        (["--kinds", "music"], "images, text, ratings"),
        (["--part", "music"], "music"),
    ],
)
def test_what_can_not_be_asked_for(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(words)


def test_options_change_the_size() -> None:
    options = parse(["--epochs", "3", "--seeds", "2", "--gdstar-epochs", "7", "--kinds", "images"])
    (benchmark,) = options.size.benchmarks
    assert benchmark.epochs == 3
    assert benchmark.milestones == pytest.approx([m * 3 / SMALL_IMAGES.epochs for m in SMALL_IMAGES.milestones])
    assert options.size.seeds == options.size.accordion_seeds == 2
    assert {epochs for problem in options.size.problems for _, _, epochs in problem.gdstar} == {7}
    assert parse(["--paper", "--data", "images=cifar-100"]).size.benchmarks[0].accordion[0][1] == 2e-2
    assert parse(["--paper"]).size.benchmarks[0].accordion == RESNET18.accordion


def test_differences_from_the_paper_are_told() -> None:
    small, full = differences(SMALL, {}, PARTS), differences(PAPER, {"madelon": Given("a", None)}, PARTS)
    assert "madelon: points by its generator, not its own." in small
    assert "images: alexnet (width 0.25) instead of resnet18; epochs 4 instead of 300;" in " ".join(small)
    assert "examples a worker 256 instead of 131,072" in " ".join(small)
    assert "ACCORDION on alexnet only" in " ".join(small)
    assert not any(" instead of " in line or "madelon" in line for line in full)
    for lines in (small, full):
        assert any(line.startswith("ratings: a global batch is drawn from all examples") for line in lines)
        assert any("1/(1 - momentum)" in line for line in lines)
        assert all(line.endswith(".") for line in lines)
    assert all("ratings" not in line and "ACCORDION" not in line for line in differences(SMALL, {}, ("logistic",)))
    assert any(line.startswith("gisette: k = ") for line in differences(SMALL, {"gisette": Given("b", None)}, PARTS))


# --- ACCORDION -------------------------------------------------------------------------------------------------------


def test_accordion_gives_each_layer_its_regimes_compressor() -> None:
    """One layer's gradients stay as they are, the other's change; then the learning rate decays."""
    layers = [Part("a", 0, 3, Identity()), Part("b", 3, 5, Identity())]
    low, high = TopK(ratio=1.0), TopK(ratio=0.1)

    def rate(iteration: int) -> float:
        return 0.1 if iteration < 9 else 0.01

    def follow(start: int, stop: int, accordion: AccordionObserver, aggregation: CompressedMean) -> list[list[Any]]:
        chosen = []
        for iteration in range(start, stop):
            mean = np.array([1, 1, 1, *([1.0, 1.0] if iteration < 3 else [5.0, 5.0])], np.float32)
            columns = accordion(Step(iteration, 0.0, rate(iteration), 0.0, [], mean, aggregation))
            chosen.append([part.compressor for part in aggregation.parts])
            assert columns["critical"] == sum(compressor is low for compressor in chosen[-1]) / 2
        return chosen

    def fresh() -> tuple[CompressedMean, AccordionObserver]:
        aggregation = CompressedMean([part._replace(compressor=low) for part in layers], 2)
        return aggregation, AccordionObserver(aggregation, layers, low, high, rate, interval=3)

    aggregation, accordion = fresh()
    chosen = follow(0, 12, accordion, aggregation)
    assert chosen[:3] == [[low, low]] * 3
    assert chosen[3:6] == [[high, low]] * 3
    assert chosen[6:8] == [[high, high]] * 2
    assert chosen[8] == [low, low]  # for iteration 9, the first with another learning rate
    again, resumed = fresh()
    before, stopped = fresh()
    follow(0, 5, stopped, before)
    resumed.load_state_dict(stopped.state_dict())
    assert [part.compressor for part in again.parts] == chosen[4]
    assert follow(5, 12, resumed, again) == chosen[5:]


# --- tasks -----------------------------------------------------------------------------------------------------------


def write_text(folder: Path) -> str:
    folder.mkdir()
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], 3000)
    for name, part in (("train", words[:2400]), ("valid", words[2400:])):
        (folder / f"wiki.{name}.tokens").write_text(" ".join(part) + "\n")
    return str(folder)


TINY_TEXT = {"units": 8, "num_layers": 1, "dropout": 0.2, "max_vocabulary": 10, "length": 5}
TINY_RATINGS = {"factors": 2, "layers": [8, 4]}


def spec_of(kind: str, network: str, options: Mapping[str, Any], data: str | None = None, **more: Any) -> dict:
    return {
        "part": "networks",
        "kind": kind,
        "network": network,
        "data": data,
        "device": "cpu",
        "workers": 3,
        "batch_size": 4,
        "epochs": 0.2,
        "optimiser": "sgd",
        "momentum": 0.9,
        "lr": 0.5,
        "lr_start": 0.5,
        "warmup_epochs": 0,
        "milestones": [],
        "weight_decay": 0.0,
        "options": dict(options),
        "evaluations": 2,
        "granularity": "layer",
        "feedback": "gradient",
        "seed": 0,
        "compressor": "topk",
        "fields": {"ratio": 0.1},
        **more,
    }


def test_a_language_models_state_is_each_workers_own(tmp_path: Path) -> None:
    """Carried from batch to batch, none left at the beginning of an epoch; the loss is that of the plain formula."""
    task, source = make(spec_of("text", "lstm", {**TINY_TEXT, "dropout": 0.0}, write_text(tmp_path / "text")))
    assert "text" in source
    model: Any = task.model
    states = [model.initial_state(4) for _ in range(3)]
    for iteration in range(3):
        for rank in range(3):
            _, words, targets = task.batch(iteration, rank)
            logits, states[rank] = model(words, states[rank])
            expected = -logits.log_softmax(2).gather(2, targets[:, :, None]).mean()
            assert task.loss(task.batch(iteration, rank)).item() == pytest.approx(expected.item(), rel=1e-5)
    again = task.batch(task.iterations_per_epoch, 0)
    first = functional.cross_entropy(model(again[1], model.initial_state(4))[0].flatten(0, 1), again[2].flatten())
    assert task.loss(again).item() == pytest.approx(first.item(), rel=1e-6)
    with torch.no_grad():
        measured = task.evaluate()
    assert measured["perplexity"] == pytest.approx(math.exp(measured["loss"]))
    assert 3 < measured["perplexity"] < 12  # of about seven words, untrained


@pytest.mark.parametrize(
    ("kind", "network", "options"), [("text", "lstm", TINY_TEXT), ("ratings", "ncf", TINY_RATINGS)]
)
def test_a_run_that_is_stopped_goes_on_bitwise(
    tmp_path: Path, kind: str, network: str, options: dict[str, Any]
) -> None:
    path = write_text(tmp_path / "text") if kind == "text" else None
    spec = spec_of(kind, network, options, path)

    def trained(task: SimulatedTask, stop: int | None, checkpoint: Path | None) -> dict[str, Any]:
        blocks = Layout(task.model).blocks
        aggregation = CompressedMean(layer_parts(blocks, TopK(ratio=0.1)), 3, feedback=ErrorFeedback())
        opt = torch.optim.SGD(task.model.parameters(), lr=0.5)

        def rate(iteration: int) -> float:
            if iteration == stop:
                raise KeyboardInterrupt
            return 0.5

        return simulate(
            task, aggregation, opt, rate, workers=3, iterations=8, checkpoint=checkpoint, checkpoint_every=4
        )

    whole = trained(make(spec)[0], None, None)
    with pytest.raises(KeyboardInterrupt):
        trained(make(spec)[0], 6, tmp_path / "checkpoint")
    assert (tmp_path / "checkpoint").exists()
    assert trained(make(spec)[0], None, tmp_path / "checkpoint") == whole


def test_recommendation_learns_what_is_liked() -> None:
    task, source = make(spec_of("ratings", "ncf", TINY_RATINGS, batch_size=256))
    assert "made" in source
    for rank in range(3):
        own = Interactions(load_ratings(), 256, rank, 3, seed=0)
        for iteration in (0, 5, 0):
            for ours, theirs in zip(task.batch(iteration, rank), own.batch(iteration), strict=True):
                assert torch.equal(ours, theirs)
    users, items, labels = task.batch(0, 1)
    expected = functional.binary_cross_entropy(torch.sigmoid(task.model(users, items)), labels)
    torch.manual_seed(0)
    task.model.eval()
    assert task.loss((users, items, labels)).item() == pytest.approx(expected.item(), rel=0.2)
    with torch.no_grad():
        assert 0 <= task.evaluate()["hit_rate"] <= 1


# --- the same as in a ring -------------------------------------------------------------------------------------------


class Lines(SimulatedTask):
    """Linear regression, each worker with numbers of its own."""

    iterations_per_epoch = 4

    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def batch(self, iteration: int, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(10 * iteration + rank)
        x = torch.randn(7, 6, generator=generator)
        return x, x.sum(1, keepdim=True)

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return functional.mse_loss(self.model(batch[0]), batch[1])

    def evaluate(self) -> dict[str, float]:
        return {"loss": self.loss(self.batch(1000, 0)).item()}


@pytest.mark.parametrize(
    ("method", "compressor"), [("topk:0.2+ef", TopK(ratio=0.2)), ("threshold:0.3+ef", Threshold(0.3))]
)
def test_one_process_trains_as_the_ring_does(method: str, compressor: Any) -> None:
    """Models of n workers with an aggregator each, in lockstep: the same weights, bit by bit."""
    workers, iterations = 4, 6
    task = Lines()
    blocks = Layout(task.model).blocks
    aggregation = CompressedMean(layer_parts(blocks, compressor), workers, feedback=ErrorFeedback())
    opt = torch.optim.SGD(task.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    simulate(task, aggregation, opt, lambda iteration: 0.05, workers=workers, iterations=iterations)

    def work(ring: Ring) -> list[torch.Tensor]:
        own = Lines()
        aggregator = Aggregator(own.model, ring, parse_method(method))
        sgd = torch.optim.SGD(own.model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        for iteration in range(iterations):
            sgd.zero_grad()
            own.loss(own.batch(iteration, ring.rank)).backward()
            aggregator.aggregate(lr=0.05)
            sgd.step()
        return [parameter.detach().clone() for parameter in own.model.parameters()]

    for weights in run_in_lockstep(workers, work):
        for ours, theirs in zip(task.model.parameters(), weights, strict=True):
            assert torch.equal(ours, theirs)


# --- rules -----------------------------------------------------------------------------------------------------------


def trace(**more: Any) -> dict[str, Any]:
    points = 11
    made: dict[str, Any] = {
        "iteration": list(range(0, 10 * points, 10)),
        "epoch": list(range(points)),
        "suboptimality": [10.0**-n for n in range(points)],
        "elements": [float(n) for n in range(points)],
        "num_bytes": [4.0 * n for n in range(points)],
        "corrected": [0.0, *(2.0**-n for n in range(1, points))],
        "error": [0.0, *(2.0**-n for n in range(1, points))],
        "silent": [0] * points,
        "total_error": 1.0,
        "step": 0.1,
    }
    return made | more


def logistic_runs(hard: dict[str, Any], top: dict[str, Any], sgd: dict[str, Any]) -> dict[str, Any]:
    runs = {}
    for seed in range(2):
        for name, one in (("identity", sgd), ("topk", top), ("threshold", hard)):
            spec = {
                "part": "logistic",
                "problem": "generated",
                "algorithm": "ef-sgd",
                "workers": 20,
                "compressor": name,
                "seed": seed,
                "fields": {"precision": 1.25e-4} if name == "threshold" else {},
            }
            result = {
                "source": "made (x)",
                "fields": {"value": 2.0},
                "length": 25,
                "step": 0.1,
                "trace": trace(**one),
            }
            runs[f"{name}{seed}"] = {"spec": spec, "result": result, "seconds": 1.0}
    return runs


def verdicts(found: list[Finding]) -> dict[str, str]:
    return {finding.claim: finding.verdict for finding in found}


def test_rules_for_logistic_regression_confirm_and_refute() -> None:
    silent = [0, *(5 * n for n in range(1, 11))]
    good = logistic_findings.logistic(
        logistic_runs(
            {"total_error": 0.5, "silent": silent},
            {"suboptimality": [10.0 ** (-n / 2) for n in range(11)]},
            {"elements": [1000.0 * n for n in range(11)]},
        ),
        MADELON,
    )
    judged = verdicts(good)
    stated = [claim for claim in judged if "λ = 14881" in claim]
    assert judged.pop(stated[0]) == NOT_TESTABLE  # not madelon
    assert set(judged.values()) == {CONFIRMED}
    bad = logistic_findings.logistic(
        logistic_runs(
            {"total_error": 2.0, "suboptimality": [1.0] * 11, "error": [0.0, *[2.0] * 10]},
            {"error": [0.0, *(2.0**n for n in range(1, 11))]},
            {"elements": [float(n) for n in range(11)]},
        ),
        MADELON,
    )
    judged = verdicts(bad)
    assert judged.pop(stated[0]) == NOT_TESTABLE
    assert set(judged.values()) == {NOT_CONFIRMED}


def test_lambda_is_compared_where_the_data_are_madelon() -> None:
    runs = logistic_runs({}, {}, {})
    for one in runs.values():
        one["spec"]["problem"] = "madelon"
        one["result"]["source"] = "madelon (2,000 points)"
        one["result"]["fields"] = {"value": 14_900.0}
    claim = next(finding for finding in logistic_findings.logistic(runs, MADELON) if "14881" in finding.claim)
    assert claim.verdict == CONFIRMED
    for one in runs.values():
        one["result"]["fields"] = {"value": 15_100.0}
    claim = next(finding for finding in logistic_findings.logistic(runs, MADELON) if "14881" in finding.claim)
    assert claim.verdict == NOT_CONFIRMED


@pytest.mark.parametrize(("end", "verdict"), [(5e-12, CONFIRMED), (6e-12, NOT_CONFIRMED)])
def test_ef_gdstar_is_judged_by_its_end(end: float, verdict: str) -> None:
    runs = logistic_runs({}, {}, {})
    for one in list(runs.values()):
        star = {**one, "spec": one["spec"] | {"algorithm": "ef-gdstar"}}
        star["result"] = {**one["result"], "trace": trace(suboptimality=[1.0] * 10 + [end], error=[0.0] * 11)}
        runs[f"star{len(runs)}"] = star
    judged = verdicts(logistic_findings.logistic(runs, MADELON))
    assert judged["EF-GDstar with hard-threshold reaches f - f* <= 5e-12"] == verdict
    assert judged["its error stays below 5e-12"] == CONFIRMED
    assert judged["it sends 1.7x less data than top-k"] == NOT_CONFIRMED  # as many


def network_run(seed: int, metric: float, share: float, error: float = 1.0, **spec: Any) -> dict[str, Any]:
    fields = spec.pop("fields", {})
    return {
        "spec": {
            "part": "networks",
            "kind": "text",
            "network": "lstm",
            "compressor": "identity",
            "feedback": "gradient",
            "granularity": "layer",
            "seed": seed,
            "fields": fields,
            **spec,
        },
        "result": {
            "source": "a text (x)",
            "average_density": share,
            "diverged": None,
            "evaluations": [{"iteration": 9, "perplexity": metric}],
            "steps": {"iteration": [5, 9], "error": [error, error / 2], "total_error": [error, 1.5 * error]},
        },
        "seconds": 1.0,
    }


def network_runs(hard: float, hard_error: float = 0.5) -> dict[str, Any]:
    """Top-k's perplexity is 200 at the first density, 150 at the second; hard-threshold's `hard` between them."""
    runs = {}
    for seed in range(3):
        noise = 0.1 * seed
        runs[f"plain{seed}"] = network_run(seed, 100 + noise, 1.0)
        for ratio, threshold, level in zip(SMALL_TEXT.ratios, SMALL_TEXT.thresholds, (200.0, 150.0), strict=True):
            runs[f"top{ratio}{seed}"] = network_run(
                seed, level + noise, ratio, compressor="topk", fields={"ratio": ratio}
            )
            middle = math.sqrt(SMALL_TEXT.ratios[0] * SMALL_TEXT.ratios[1])
            share = middle if threshold == SMALL_TEXT.thresholds[1] else SMALL_TEXT.ratios[0]
            runs[f"hard{threshold}{seed}"] = network_run(
                seed, hard + 2 * noise, share, hard_error, compressor="threshold", fields={"value": threshold}
            )
    return runs


@pytest.mark.parametrize(("hard", "verdict"), [(140.0, CONFIRMED), (210.0, NOT_CONFIRMED)])
def test_metrics_are_compared_at_the_same_density(hard: float, verdict: str) -> None:
    """Lower perplexity is better."""
    judged = verdicts(network_findings.networks(network_runs(hard), SMALL_TEXT))
    assert judged["better than layer-wise top-k at the same average density"] == verdict
    assert judged["hard-threshold almost reaches what no compression does"] == NOT_CONFIRMED
    assert judged["smaller total error than top-k"] == CONFIRMED


def test_what_can_not_be_told_is_open() -> None:
    one_seed = {name: one for name, one in network_runs(140).items() if one["spec"]["seed"] == 0}
    judged = verdicts(network_findings.networks(one_seed, SMALL_TEXT))
    assert judged["better than layer-wise top-k at the same average density"] == NOT_TESTABLE
    far = network_runs(140, hard_error=0.5)
    for one in far.values():
        if one["spec"]["compressor"] == "threshold":
            one["result"]["average_density"] *= 100
    judged = verdicts(network_findings.networks(far, SMALL_TEXT))
    assert judged["better than layer-wise top-k at the same average density"] == NOT_TESTABLE
    assert judged["smaller total error than top-k"] == NOT_TESTABLE  # smaller, but with more sent
    assert network_findings.networks({}, SMALL_TEXT) == []


def test_between_densities_metrics_are_interpolated_by_their_logarithm() -> None:
    records = [network_run(0, 200.0, 1e-3), network_run(0, 100.0, 1e-1)]

    def value(record: Mapping[str, Any]) -> float:
        return float(record["result"]["evaluations"][-1]["perplexity"])

    assert network_findings.at_density(records, value, 1e-2) == pytest.approx(150)
    assert network_findings.at_density(records, value, 1e-1 * 1.4) == 100
    assert network_findings.at_density(records, value, 1e-1 * 1.6) is None
    assert network_findings.at_density(records, value, 1e-3 / 1.6) is None


def test_settings_and_elements() -> None:
    runs = network_runs(140)
    assert {len(group) for group in by_fields(list(runs.values())).values()} == {3}
    np.testing.assert_array_equal(
        elements_per_iteration({"elements": [0, 5, 5, 35], "iteration": [0, 10, 20, 30]}), [0.5, 0, 3]
    )


def test_the_table_lists_each_rule_once_and_none_for_what_is_not_here() -> None:
    made = [
        Finding("Fig. 1", "a", "data", "1 > 0", "above 0", True),
        Finding("Fig. 2", "b", "data", "-1 < 0", "above 0", False),
        Finding("Fig. 3", "c", "gisette", "not here", "-", None),
    ]
    text = table(made)
    assert text.count("above 0") == 1
    assert [word for word in (CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE) if f" {word} " in text] == [
        CONFIRMED,
        NOT_CONFIRMED,
        NOT_TESTABLE,
    ]
    assert "2. " not in text


# --- the command -----------------------------------------------------------------------------------------------------


def test_logistic_regression_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On a file that is smaller than madelon; then what is missing is run again, and nothing else."""
    rng = np.random.default_rng(0)
    path = tmp_path / "points.svm"
    lines = []
    for _ in range(120):
        label = rng.choice([-1, 1])
        values = np.round(rng.normal(480, 40, 500) + 3 * label).astype(int)
        lines.append(f"{label} " + " ".join(f"{i}:{v}" for i, v in enumerate(values, 1)))
    path.write_text("\n".join(lines) + "\n")
    out = tmp_path / "out"
    words = [
        "--part",
        "logistic",
        "--data",
        f"madelon={path}",
        "--seeds",
        "1",
        "--gdstar-epochs",
        "30",
        "--processes",
        "1",
        "--out",
        str(out),
    ]
    assert main(words) == 0
    names = {file.name for file in out.iterdir()}
    assert {
        "table.md",
        "hard-threshold.json",
        "fig1-madelon.png",
        "fig4-madelon.png",
        "fig7-madelon.png",
        "fig8-madelon.png",
        "fig9-madelon.png",
    } <= names
    check_drawn_again(out)
    runs = {file: file.read_bytes() for file in (out / "runs").iterdir()}
    assert all(file.suffix == ".json" for file in runs)
    gone = next(file for file in runs if "threshold" in file.name)
    gone.unlink()
    capsys.readouterr()
    assert main([*words, "--resume"]) == 0
    assert capsys.readouterr().out.count("runs\n") == 1
    for file, content in runs.items():
        if file == gone:
            assert json.loads(file.read_text())["result"] == json.loads(content)["result"]
        else:
            assert file.read_bytes() == content
    report = json.loads((out / "hard-threshold.json").read_text())
    assert any("gisette" in finding["data"] for finding in report["findings"])
    assert all(finding["rule"] for finding in report["findings"])
    assert "--resume" in report["environment"]["command"]
    assert main(words) == 2
    assert "resume" in capsys.readouterr().err
    path.write_text("\n".join(lines[1:]) + "\n")
    problem_of.cache_clear()
    assert main([*words, "--resume"]) == 2  # other points
    assert "digest" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["images", "text", "ratings"])
def test_networks_from_the_command_line(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One step or a few of each run: all figures and tables, with a diverged run among them or not."""
    from dataclasses import replace

    from bench.papers.hard_threshold import command as hard_threshold

    tiny = {
        "images": replace(SMALL_IMAGES, batch_size=4, options={"width": 0.03125}),
        "text": replace(SMALL_TEXT, batch_size=2, options=TINY_TEXT),
        "ratings": replace(SMALL_RATINGS, batch_size=64, options=TINY_RATINGS),
    }[kind]
    monkeypatch.setattr(hard_threshold, "SMALL", replace(SMALL, benchmarks=(tiny,), evaluations=2))
    paths = {
        "images": lambda: write_images(tmp_path / "images", num_train=96),
        "text": lambda: write_text(tmp_path / "t"),
    }
    data = ["--data", f"{kind}={paths[kind]()}"] if kind in paths else []
    out = tmp_path / "out"
    epochs = {"images": "2", "text": "0.5", "ratings": "0.03"}[kind]
    words = ["--part", "networks", "--seeds", "1", "--epochs", epochs, "--processes", "1", "--out", str(out), *data]
    assert main(words) == 0, capsys.readouterr().err
    names = {file.name for file in out.iterdir()}
    expected = {
        "images": {
            "fig2-volume.png",
            "fig3-images.png",
            "fig11-entire-model.png",
            "fig12-no-feedback.png",
            "fig13-update.png",
            "accordion-alexnet.png",
        },
        "text": {"fig2-volume.png", "fig5-text.png"},
        "ratings": {"fig2-volume.png", "fig6-ratings.png"},
    }[kind]
    assert expected <= names
    text = (out / "table.md").read_text()
    assert "Fig. 2" in text
    assert f"## Differences from the paper\n\n* {kind}: " in text
    assert ("ACCORDION (Tables 1 and 7)" in text) == (kind == "images")
    check_drawn_again(out)
    for file in (out / "runs").iterdir():
        result = json.loads(file.read_text())["result"]
        assert 0 < result["average_density"] <= 1
        assert len(result["evaluations"]) >= 2


def test_a_runs_record_says_what_it_was(tmp_path: Path) -> None:
    """The thresholds by the formula, and ACCORDION's detections."""
    path = write_images(tmp_path / "images", num_train=96)
    base = spec_of("images", "alexnet", {"width": 0.03125}, path, epochs=8.0, optimiser="nesterov")
    with_accordion = run(base | {"compressor": "accordion", "fields": {"most": 0.5, "least": 0.01}}, tmp_path / "c")
    assert with_accordion["detections"][0]
    assert 0.01 < with_accordion["average_density"] <= 0.6
    assert max(with_accordion["steps"]["critical"]) == 1
    hard = run(base | {"compressor": "threshold", "fields": {"least": 0.01}}, tmp_path / "c")
    length = hard["num_parameters"]
    bound = length * threshold_for(0.01, length) ** 2
    assert max(hard["steps"]["error"]) <= bound * (1 + 1e-5)
