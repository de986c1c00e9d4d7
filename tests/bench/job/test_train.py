"""The training loop in lockstep: it learns, all ranks keep the same bits, and it can be stopped anywhere."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.data import Dataset
from bench.job.record import GROUPS, KINDS, grouped
from bench.job.train import (
    LEAST,
    PAPER_ITERATIONS,
    Settings,
    Trainer,
    WindowLengths,
    average_statistics,
    learning_rate,
    scaled_schedule,
    train,
    weights_digest,
)
from bench.models import resnet_cifar
from gradiveq.methods import GradiVeQ, Method, Plain, QSGDRing
from gradiveq.over_ring.aggregator import NonFiniteGradient
from gradiveq.running_noise import RunningNoise, estimate_here
from gradiveq.specs import parse
from ring.cluster import Cluster, Link, Node
from ring.handle import Ring
from ring.lockstep import run
from ring.virtual import VirtualRing

CLASSES = 3
GRADIVEQ = GradiVeQ(warmup=2, sample=4, compress=5, n_components=3, fit_slices="all", holdout_every=2)
TOP_K, SWITCHED = parse("topk:0.3+ef-scaled"), parse("accordion:interval=3:window=2:topk:0.5|topk:0.2+ef")
EVERY_METHOD = pytest.mark.parametrize(
    "method", [Plain(), QSGDRing(), GRADIVEQ, TOP_K, SWITCHED], ids=lambda method: method.name
)


def stripes(count: int, seed: int) -> tuple[Any, Any]:
    """Images of three kinds that a network tells apart at once: bright above, in the middle, below."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    images = rng.integers(0, 60, (count, 3, 32, 32))
    for image, label in zip(images, labels, strict=True):
        image[:, 11 * label : 11 * label + 9] += 150
    return images.astype(np.uint8), labels.astype(np.int64)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    train_images, train_labels = stripes(48, 0)
    test_images, test_labels = stripes(25, 1)
    mean = tuple(float(train_images[:, c].mean() / 255) for c in range(3))
    std = tuple(float(train_images[:, c].std() / 255) for c in range(3))
    return Dataset(
        "stripes",
        "48 + 25 stripes",
        train_images,
        train_labels,
        test_images,
        test_labels,
        CLASSES,
        (mean[0], mean[1], mean[2]),
        (std[0], std[1], std[2]),
    )


def settings(iterations: int = 12, **other: Any) -> Settings:
    return Settings(iterations, batch_size=4, **{"lr": 0.05, "seed": 7, **other})


def trainer(ring: Ring, dataset: Dataset, method: Method, options: Settings, **other: Any) -> Trainer:
    return Trainer(ring, resnet_cifar(8, CLASSES, seed=options.seed), dataset, method, options, **other)


def all_of(job: Trainer, eval_every: int = 100) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    assert train(job, lines.append, lambda: None, eval_every=eval_every, checkpoint_every=0)
    return lines


@EVERY_METHOD
def test_loss_falls_and_all_ranks_have_the_same_weights(dataset: Dataset, method: Method) -> None:
    def work(ring: Ring) -> tuple[list[dict[str, Any]], str, dict[str, Any]]:
        job = trainer(ring, dataset, method, settings(24))
        lines = all_of(job, 12)
        return lines, weights_digest(job.model), job.result()

    results = run(3, work)
    lines, digest, result = results[0]
    assert {other for _, other, _ in results} == {digest}
    losses = [line["loss"] for line in lines if line["type"] == "iteration"]
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])
    evaluations = [line for line in lines if line["type"] == "evaluation"]
    assert [line["iteration"] for line in evaluations] == [12, 24]
    assert evaluations[-1]["test_accuracy"] > 0.6
    assert result["weights_sha256"] == digest
    assert result["test_accuracy"] == evaluations[-1]["test_accuracy"]
    # What all ranks know is the same on all; accuracy is a number of whole images.
    for other, _, other_result in results:
        assert [line.get("loss") for line in other] == [line.get("loss") for line in lines]
        assert other_result == result
    assert (25 * evaluations[-1]["test_accuracy"]) == pytest.approx(round(25 * evaluations[-1]["test_accuracy"]))


@EVERY_METHOD
def test_noise_is_in_every_line(dataset: Dataset, method: Method) -> None:
    """The same on all ranks, from the gradients that each had, whatever the method makes of them."""
    iterations = 21

    def work(ring: Ring) -> tuple[list[Any], list[Any], str, str]:
        job = trainer(ring, dataset, method, settings(iterations))
        seen: list[Any] = []
        watch = job.aggregator.watch
        assert watch is not None

        def remember(gradient: Any) -> None:
            seen.append(gradient.copy())
            watch(gradient)

        job.aggregator.watch = remember
        lines = [line for line in all_of(job) if line["type"] == "iteration"]
        # 10 sketches of 509 and three squares, by halves and there and back
        assert [line["measure_bytes"] >= 8 * (10 * 509 + 3) for line in lines[9::10]] == [True] * 2
        unwatched = trainer(ring, dataset, method, settings(iterations))
        unwatched.aggregator.watch = None
        unwatched.noise.accept = lambda: None  # type: ignore[method-assign]
        all_of(unwatched)
        assert job.result()["noise"] == lines[-1]["noise"]
        return [line["noise"] for line in lines], seen, weights_digest(job.model), weights_digest(unwatched.model)

    results = run(2, work)
    noises = [RunningNoise(2, seed=7) for _ in range(2)]
    for iteration in range(iterations):
        estimate = estimate_here(noises, [seen[iteration] for _, seen, _, _ in results])
        for said, _, _, _ in results:
            if iteration < 9:
                assert said[iteration] is None
            else:
                assert estimate is not None
                known = {name: value for name, value in estimate.as_dict().items() if value is not None}
                assert {name: said[iteration][name] for name in known} == pytest.approx(known, rel=1e-9)
    assert results[0][0] == results[1][0]
    assert len({digest for result in results for digest in result[2:]}) == 1


@EVERY_METHOD
def test_seconds_and_bytes_add_up(dataset: Dataset, method: Method) -> None:
    def work(ring: Ring) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        job = trainer(ring, dataset, method, settings(14))
        lines = [line for line in all_of(job) if line["type"] == "iteration"]
        return lines, job.result()

    (lines, result), (other_lines, _) = run(2, work)
    elapsed = 0.0
    for line in lines:
        assert set(line["seconds"]) <= set(KINDS)
        assert sum(line["seconds"].values()) == pytest.approx(line["iteration_s"])
        assert min(line["seconds"].values()) >= -1e-9
        elapsed += line["iteration_s"] - line["seconds"].get("measure", 0.0)
        assert line["time_s"] == pytest.approx(elapsed)
        assert line["bytes_sent"] < line["dense_bytes"] * 1.01
    sent = [sum(line["bytes_sent"] for line in one) for one in (lines, other_lines)]
    assert 14 * result["bytes_per_iteration"] == pytest.approx(sum(sent) / 2)
    assert sum(part["iterations"] for part in result["phases"].values()) == 14
    assert sum(result["groups"].values()) == pytest.approx(sum(result["seconds"].values()))
    for kind in KINDS:
        parts = sum(part["seconds"][kind] for part in result["phases"].values())
        assert result["seconds"][kind] == pytest.approx(parts, abs=1e-12)
    measured = [line["compression"] for line in lines if "compression" in line]
    if method in (TOP_K, SWITCHED):
        assert len(measured) == 14
        assert set(result["phases"]) == {"compressed"}
        for name, value in result["compression"].items():
            theirs = [line["compression"][name] for line in other_lines]
            assert value == pytest.approx(np.mean([line[name] for line in measured] + theirs))
        assert 0.2 < result["compression"]["density"] < 0.6
        assert measured[-1]["total_error"] == pytest.approx(sum(line["error"] for line in measured))
    else:
        assert not measured
        assert result["compression"] is None
    if method.name == "gradiveq":
        assert {name: part["iterations"] for name, part in result["phases"].items()} == {
            "warm-up": 2,
            "sample": 7,
            "compress": 5,
        }


class Processor:
    """Processor time that passes when a test says so, for each worker's thread."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def __call__(self) -> float:
        return self._seconds.get(threading.get_ident(), 0.0)

    def compute(self, seconds: float) -> None:
        self._seconds[threading.get_ident()] = self() + seconds


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Processor:
    processor = Processor()
    monkeypatch.setattr("bench.job.train.VirtualRing", functools.partial(VirtualRing, processor_time=processor))
    return processor


def nodes(iteration_s: float | None = 0.3, other: float | None = None) -> Cluster:
    """Two nodes, between which a message takes half a second, whatever its size."""
    node = Node(iteration_s=iteration_s)
    others = {} if other is None else {1: dataclasses.replace(node, iteration_s=other)}
    return Cluster("pair", nodes=2, node=node, link=Link(latency_us=5e5, bandwidth_gbps=1e6), other_nodes=others)


def test_the_clusters_clock(dataset: Dataset, processor: Processor) -> None:
    """Hand-computed: an all-reduce between two takes two messages, and an iteration has two of them."""

    def work(ring: Ring, cluster: Cluster) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
        job = trainer(ring, dataset, Plain(), settings(3), cluster=cluster)
        load = job.batches.batch

        def batch(iteration: int) -> Any:
            processor.compute(0.125)
            return load(iteration)

        job.batches.batch = batch  # type: ignore[method-assign]
        lines = [line for line in all_of(job) if line["type"] == "iteration"]
        return lines, job.result(), weights_digest(job.model)

    results = run(2, lambda ring: work(ring, nodes()))
    for lines, result, _ in results:
        for line in lines:
            assert line["virtual_seconds"] == pytest.approx(
                {"data": 0.125, "forward": 0.1, "backward": 0.2, "wait": 1.0, "control": 1.0, "other": 0.0}, abs=1e-5
            )
        assert [line["virtual_s"] for line in lines] == pytest.approx([2.425, 4.85, 7.275], abs=1e-4)
        assert result["virtual"]["time_s"] == pytest.approx(7.275, abs=1e-4)
        assert result["virtual"]["groups"]["exposed communication"] == pytest.approx(3.0, abs=1e-4)
        assert result["phases"]["plain"]["virtual"]["groups"]["compute"] == pytest.approx(0.9, abs=1e-4)
    # Node 1 computes 1 s longer. By then node 0's first message has come; both of its own get there half a second
    # later, and then node 0's second one takes as long: so node 1 is half a second behind at the end, and stays it.
    slow = run(2, lambda ring: work(ring, nodes(other=1.3)))
    for (lines, _, _), own, waits in zip(slow, (0.3, 1.3), ([1.5, 2.0, 2.0], [1.0, 1.0, 1.0]), strict=True):
        for line in lines:
            assert line["virtual_seconds"]["forward"] == pytest.approx(own / 3)
        assert [line["virtual_seconds"]["wait"] for line in lines] == pytest.approx(waits, abs=1e-5)
    # Without `iteration_s` computing takes processor time, of which there is none but the data's.
    for lines, _, _ in run(2, lambda ring: work(ring, nodes(None))):
        assert [line["virtual_s"] for line in lines] == pytest.approx([2.125, 4.25, 6.375], abs=1e-4)
    plain = run(2, lambda ring: all_of(trainer(ring, dataset, Plain(), settings(3))))
    digests = {digest for _, _, digest in results}
    assert len(digests) == 1
    assert not any(line.keys() & {"virtual_s", "virtual_seconds"} for line in plain[0])
    assert [line["loss"] for line in plain[0][:3]] == [line["loss"] for line in results[0][0]]


@EVERY_METHOD
def test_what_is_not_training_takes_no_virtual_time(dataset: Dataset, processor: Processor, method: Method) -> None:
    """Evaluating, saving and writing cost rank 0 an hour each, before, between and after the iterations."""

    def work(ring: Ring, hour_s: float) -> tuple[list[dict[str, Any]], list[Any], dict[str, Any]]:
        def pass_time() -> None:
            processor.compute(hour_s * (1 + ring.rank))

        def save() -> None:
            states.append(copy.deepcopy(job.state_dict()))
            pass_time()

        def write(line: dict[str, Any]) -> None:
            lines.append(line)
            pass_time()

        job = trainer(ring, dataset, method, settings(13), cluster=nodes())
        lines: list[dict[str, Any]] = []
        states: list[Any] = []
        pass_time()
        train(job, write, save, eval_every=2 if hour_s else 0, checkpoint_every=3)
        pass_time()
        return lines, states, job.result()

    plain, busy = run(2, lambda ring: work(ring, 0.0)), run(2, lambda ring: work(ring, 3600.0))
    for (lines, _, result), (busy_lines, _, busy_result) in zip(plain, busy, strict=True):
        iterations = [line for line in busy_lines if line["type"] == "iteration"]
        assert len(iterations) == 13
        for line, other in zip((line for line in lines if line["type"] == "iteration"), iterations, strict=True):
            assert line["virtual_seconds"] == pytest.approx(other["virtual_seconds"], abs=1e-4)
            assert line["virtual_s"] == pytest.approx(other["virtual_s"], abs=1e-4)
        assert result["virtual"]["time_s"] == pytest.approx(busy_result["virtual"]["time_s"], abs=1e-4)
        measured_s = sum(line["virtual_seconds"].get("measure", 0.0) for line in iterations)
        assert (measured_s > 0.9) == (method.name == "gradiveq")
        elapsed_s = sum(sum(line["virtual_seconds"].values()) for line in iterations)
        assert iterations[-1]["virtual_s"] == pytest.approx(elapsed_s - measured_s)

    def resumed(ring: Ring) -> tuple[list[dict[str, Any]], float]:
        job = trainer(ring, dataset, method, settings(13), cluster=nodes())
        processor.compute(3600.0 * ring.rank)
        job.load_state_dict(busy[ring.rank][1][1])
        before_s = job.virtual_s
        return all_of(job), before_s

    for (lines, before_s), (expected, _, _) in zip(run(2, resumed), plain, strict=True):
        whole = [line for line in expected if line["type"] == "iteration"]
        assert before_s == pytest.approx(whole[5]["virtual_s"], abs=1e-4)
        # The two compare in which iteration they are, once: two messages.
        for line, other in zip((line for line in lines if line["type"] == "iteration"), whole[6:], strict=True):
            assert line["virtual_s"] == pytest.approx(other["virtual_s"] + 1.0, abs=1e-4)


@pytest.mark.parametrize("trace", [False, True])
def test_this_machines_clock_stands_still_while_the_cluster_is_emulated(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, trace: bool
) -> None:
    """But not in a trace, for which the clocks of all ranks have to agree."""

    class SlowClock(threading.local):
        """A million seconds pass whenever it is looked at."""

        now_s = 0.0

        def __call__(self) -> float:
            self.now_s += 1e6
            return self.now_s

    monkeypatch.setattr("ring.virtual.time", SimpleNamespace(perf_counter=SlowClock(), thread_time=time.thread_time))

    def work(ring: Ring) -> list[float]:
        job = trainer(ring, dataset, Plain(), settings(2), cluster=nodes(), trace=trace)
        return [job.step()[0]["iteration_s"] for _ in range(2)]

    for times in run(2, work):
        # Two collectives, with a look before and behind the emulation of each.
        assert times == ([pytest.approx(-2e6, rel=1e-3)] * 2 if not trace else [pytest.approx(0, abs=1e3)] * 2)


def test_methods_begin_with_the_same_weights_and_data(dataset: Dataset) -> None:
    def first_loss(method: Method) -> float:
        return run(2, lambda ring: trainer(ring, dataset, method, settings()).step()[0]["loss"])[0]

    assert first_loss(Plain()) == first_loss(QSGDRing()) == first_loss(GRADIVEQ)


def test_ranks_together_take_the_step_of_one_rank_with_all_images(dataset: Dataset) -> None:
    """Up to rounding, and to batch norm, which a network without it doesn't have."""

    def weights(size: int) -> torch.Tensor:
        def work(ring: Ring) -> torch.Tensor:
            model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 30 * 30, CLASSES))
            generator = torch.Generator().manual_seed(3)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.01, generator=generator)
            job = Trainer(ring, model, dataset, Plain(), Settings(5, batch_size=12 // size, lr=0.01))
            all_of(job)
            return nn.utils.parameters_to_vector(job.model.parameters()).detach()

        return run(size, work)[0]

    torch.testing.assert_close(weights(3), weights(1), rtol=1e-4, atol=1e-6)


@EVERY_METHOD
def test_resumed_at_any_iteration_is_not_interrupted(dataset: Dataset, method: Method) -> None:
    iterations = 13

    def uninterrupted(ring: Ring) -> tuple[str, list[Any], list[dict[str, Any]]]:
        job = trainer(ring, dataset, method, settings(iterations))
        states = []
        lines: list[dict[str, Any]] = []
        train(
            job, lines.append, lambda: states.append(copy.deepcopy(job.state_dict())), eval_every=5, checkpoint_every=1
        )
        return weights_digest(job.model), states, lines

    whole = run(2, uninterrupted)
    assert len(whole[0][1]) == iterations - 1

    for position in range(iterations - 1):

        def resumed(ring: Ring, position: int = position) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
            job = trainer(ring, dataset, method, settings(iterations))
            job.load_state_dict(whole[ring.rank][1][position])
            lines: list[dict[str, Any]] = []
            train(job, lines.append, lambda: None, eval_every=5, checkpoint_every=0)
            return weights_digest(job.model), lines, job.result()

        results = run(2, resumed)
        assert {digest for digest, _, _ in results} == {whole[0][0]}
        assert timeless(results[0][1]) == timeless(whole[0][2])[-len(results[0][1]) :]
        assert results[0][2]["iterations"] == iterations
        assert sum(part["iterations"] for part in results[0][2]["phases"].values()) == iterations


def timeless(lines: list[dict[str, Any]]) -> list[str]:
    """Lines without seconds; as text, so that NaN equals itself."""
    untimed = copy.deepcopy(lines)
    for line in untimed:
        line.get("window", {}).pop("fit_s", None)
    return [str({key: value for key, value in line.items() if not key.endswith(("_s", "seconds"))}) for line in untimed]


def test_a_rank_that_is_asked_to_stop_stops_all_in_the_same_iteration(dataset: Dataset) -> None:
    def work(ring: Ring) -> tuple[bool, int, list[int]]:
        job = trainer(ring, dataset, Plain(), settings())
        saved: list[int] = []
        complete = train(
            job,
            lambda line: None,
            lambda: saved.append(job.iteration),
            eval_every=100,
            checkpoint_every=4,
            stop=lambda: ring.rank == 1 and job.iteration == 5,
        )
        return complete, job.iteration, saved

    assert run(3, work) == [(False, 6, [4, 6])] * 3


def test_skipped_steps_leave_the_weights_alone(dataset: Dataset) -> None:
    """One rank's weights are spoilt for one iteration. With "skip" nobody steps; with "fail" all are told whose."""

    def work(ring: Ring, policy: str) -> tuple[str, str, bool, dict[str, Any]]:
        job = trainer(ring, dataset, Plain(), settings(2), nonfinite=policy)
        before = weights_digest(job.model)
        kept = job.model.fc.bias.detach().clone()
        if ring.rank == 1:
            job.model.fc.bias.data[0] = math.nan
        line, _ = job.step()
        with torch.no_grad():
            job.model.fc.bias.copy_(kept)
        after = weights_digest(job.model)
        job.step()
        return before, after, line["skipped"], job.result()

    for before, after, skipped, result in run(2, lambda ring: work(ring, "skip")):
        assert before == after
        assert skipped
        assert result["skipped"] == 1
        assert result["weights_sha256"] != after
    with pytest.raises(NonFiniteGradient, match=r"conv1\.weight, .* and 20 more on rank 1$"):
        run(2, lambda ring: work(ring, "fail"))


def test_a_skipped_step_leaves_batch_norm_alone(dataset: Dataset) -> None:
    """An image that isn't finite reaches the running statistics of its rank before anybody can know."""

    def work(ring: Ring, spoil: bool) -> tuple[bool, list[torch.Tensor], dict[str, Any], dict[str, Any]]:
        job = trainer(ring, dataset, Plain(), settings(2, lr=0.01), nonfinite="skip")
        job.step()
        before = [buffer.clone() for buffer in job.model.buffers()]
        images, labels = job.batches.batch(1)
        if spoil and ring.rank == 1:
            images[0, 0, 0, 0] = math.inf
        job.batches.batch = lambda iteration: (images, labels)  # type: ignore[method-assign]
        line, _ = job.step()
        assert line["skipped"] == spoil
        same = all(torch.equal(one, other) for one, other in zip(before, job.model.buffers(), strict=True))
        return same, before, job.evaluate(), job.result()

    for same, before, evaluation, result in run(2, lambda ring: work(ring, True)):
        assert same
        assert all(torch.isfinite(buffer).all() for buffer in before)
        assert math.isfinite(evaluation["test_loss"])
        assert result["skipped"] == 1
        assert result["train_loss"] is None  # the last tenth is the iteration that was skipped
    for same, _, _, result in run(2, lambda ring: work(ring, False)):
        assert not same
        assert math.isfinite(result["train_loss"])


class Algorithm3(torch.optim.SGD):
    """The update of Algorithm 3 of Sahu et al. 2021 without compression: x - γ(m + g), m = λm + g."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                m.mul_(group["momentum"]).add_(p.grad)
                p.sub_(group["lr"] * (m + p.grad))


def test_update_compression_has_its_momentum_at_the_workers(dataset: Dataset) -> None:
    """And the optimiser has none: where nothing is left out, it is momentum of the mean gradient."""

    def work(ring: Ring) -> list[torch.Tensor]:
        options = settings(5, momentum=0.8, weight_decay=0.0, lr=0.01)
        job = trainer(ring, dataset, parse("identity+ef-update", momentum=0.8), options)
        other = trainer(ring, dataset, Plain(), options)
        other.optimizer = Algorithm3(other.model.parameters(), lr=1.0, momentum=0.8)
        for one in (job, other):
            all_of(one)
        return [nn.utils.parameters_to_vector(one.model.parameters()).detach() for one in (job, other)]

    mine, theirs = run(2, work)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_scaled_feedback_knows_the_learning_rate(dataset: Dataset) -> None:
    """The rate falls after half the run; a memory in units of the update makes other weights from then on only."""

    def work(ring: Ring, spec: str) -> list[Any]:
        lines = all_of(trainer(ring, dataset, parse(spec), settings(12)))
        return [line["loss"] for line in lines if line["type"] == "iteration"]

    losses = [run(2, lambda ring, spec=spec: work(ring, spec))[0] for spec in ("topk:0.1+ef", "topk:0.1+ef-scaled")]  # type: ignore[misc]
    assert losses[0][:6] == pytest.approx(losses[1][:6], rel=1e-3)
    assert losses[0][8:] != pytest.approx(losses[1][8:], rel=1e-3)


def test_ranks_with_different_weights_are_found(dataset: Dataset) -> None:
    def work(ring: Ring) -> None:
        job = trainer(ring, dataset, Plain(), settings(1))
        all_of(job)
        if ring.rank == 2:
            job.model.fc.bias.data[0] += 1e-6
        job.result()

    with pytest.raises(RuntimeError, match=r"ranks \[2\] differ"):
        run(3, work)


def test_batch_norm_is_averaged_on_a_copy(dataset: Dataset) -> None:
    def work(ring: Ring) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        job = trainer(ring, dataset, Plain(), settings(1))
        job.step()
        own = job.model.bn1.running_mean.clone()
        job.evaluate()
        assert torch.equal(job.model.bn1.running_mean, own)
        assert job.model.training
        average_statistics(job.model, ring)
        return own, job.model.bn1.running_mean, job.model.layer3[0].bn2.running_var

    results = run(3, work)
    assert not torch.equal(results[0][0], results[1][0])
    mean = torch.stack([own for own, _, _ in results]).double().mean(0).float()
    torch.testing.assert_close(results[0][1], mean)
    assert all(torch.equal(result[1], results[0][1]) and torch.equal(result[2], results[0][2]) for result in results)


def test_learning_rate() -> None:
    options = settings(100, lr=0.4, lr_warmup=4)
    rates = [learning_rate(iteration, options) for iteration in range(100)]
    assert rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    assert rates[49] == pytest.approx(0.4)
    assert rates[50] == rates[74] == pytest.approx(0.04)
    assert rates[75] == rates[99] == pytest.approx(0.004)


def test_the_schedule_is_the_papers_and_shrinks_with_the_run() -> None:
    assert scaled_schedule(PAPER_ITERATIONS) == scaled_schedule(100_000) == WindowLengths(2_500, 100, 400)
    assert scaled_schedule(PAPER_ITERATIONS // 2) == WindowLengths(1_250, 50, 200)
    assert scaled_schedule(900) == WindowLengths(50, LEAST, 4 * LEAST)
    for iterations in (1, 5, 20, 57, 100, 200, 600, 9_999):
        windows = scaled_schedule(iterations)
        assert windows.sample >= 2  # PCA needs two
        assert windows.compress == 4 * windows.sample
        assert windows.warmup >= 2
        GradiVeQ(*windows)
    for iterations in (20, 57, 200, 600):  # all phases are seen
        windows = scaled_schedule(iterations)
        assert windows.warmup + windows.sample + windows.compress <= iterations


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("iterations", 0),
        ("iterations", -5),
        ("batch_size", 0),
        ("lr", 0.0),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr_warmup", -1),
        ("lr_warmup", 13),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -1e-4),
        ("seed", -1),
    ],
)
def test_settings_are_checked(name: str, value: float) -> None:
    values = {"iterations": 12, "batch_size": 4} | {name: value}
    with pytest.raises(ValueError, match=rf"`{name}` must be .* got {value}"):
        Settings(**values)  # type: ignore[arg-type]


def test_every_kind_is_in_one_group() -> None:
    assert sorted(kind for kinds in GROUPS.values() for kind in kinds) == sorted(KINDS)
    groups = grouped({"forward": 1, "backward": 2, "wait": 4, "new kind": 8})
    assert groups["compute"] == 3
    assert groups["exposed communication"] == 4
    assert groups["other"] == 8
