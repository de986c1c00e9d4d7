"""PowerSGD, ACCORDION and thresholds from a warm-up as methods of an aggregator: bits, bytes, state."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bench.job.checkpoint import restored, storable
from bench.job.report import threshold_text
from gradiveq import Aggregator, NonFiniteGradient, Report
from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.identity import Identity
from gradiveq.exchange.critical_regimes import CriticalRegimes
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.families import make_family
from gradiveq.flatten import Layout
from gradiveq.here import Here
from gradiveq.methods import Accordion, AutoThreshold, Compressed, Method, applied
from gradiveq.noise import NoiseWindow, auto_threshold, simple_threshold
from gradiveq.powersgd import PowerSGD
from ring.handle import Ring
from ring.lockstep import run
from tests.support.aggregators import CONTROL_BYTES, assert_same_bits, collect, exact, noise, set_gradients, small_model
from tests.support.processes import Launch
from tests.support.workers_here import WorkersHere

Vector = npt.NDArray[np.float32]
FLAG_BYTES = 4
TOPK = COMPRESSORS["topk"]
FEEDBACK = ErrorFeedback()


def topk(ratio: float, **options: Any) -> Compressed:
    return Compressed(TOPK(ratio=ratio), **options)  # type: ignore[call-arg]


ACCORDION = Accordion(topk(0.5, feedback=FEEDBACK), topk(0.1, feedback=FEEDBACK), interval=4, window=2)
ACCORDION_RANKS = Accordion(PowerSGD(3), PowerSGD(1), interval=3, window=3)
AUTO = AutoThreshold(ratio=0.2, warmup=20, applied=topk(1.0, feedback=FEEDBACK))
SIMPLE = AutoThreshold("simple", count=30, applied=topk(1.0, granularity="model"))
METHODS: dict[str, Method] = {
    "powersgd": PowerSGD(2),
    "powersgd, cold and without memory": PowerSGD(1, error_feedback=False, warm_start=False),
    "accordion": ACCORDION,
    "accordion, ranks": ACCORDION_RANKS,
    "accordion, model": Accordion(
        Compressed(Identity(), "model"), topk(0.1, granularity="model"), interval=5, window=1
    ),
    "auto": AUTO,
    "simple": SIMPLE,
}


def rate(iteration: int) -> float:
    return 0.1 if iteration < 14 else 0.01


def train(
    ring: Ring, method: Method, iterations: int, stop: int | None = None, gradients: Any = noise, **options: Any
) -> tuple[Aggregator, list[Report], list[dict[str, Vector]]]:
    """`stop`: store the state before that iteration as a checkpoint does, and go on with another aggregator."""
    model = small_model()
    aggregator = Aggregator(model, ring, method, seed=5, **options)
    reports, results = [], []
    for iteration in range(iterations):
        if iteration == stop:
            stored = io.BytesIO()
            torch.save(storable(aggregator.state_dict()), stored)
            model = small_model()
            aggregator = Aggregator(model, ring, method, seed=5, **options)
            stored.seek(0)
            aggregator.load_state_dict(restored(torch.load(stored, weights_only=True)))
        set_gradients(model, gradients, ring.rank, iteration)
        reports.append(aggregator.aggregate(rate(iteration)))
        results.append(collect(model))
    return aggregator, reports, results


def vectors(size: int, iteration: int) -> list[Vector]:
    """Each rank's gradient, as the layout has it."""
    model, packed = small_model(), []
    layout = Layout(model)
    for rank in range(size):
        set_gradients(model, noise, rank, iteration)
        packed.append(np.empty(layout.length, np.float32))
        layout.pack(packed[-1])
    return packed


def unpacked(vector: Vector) -> dict[str, Vector]:
    model = small_model()
    Layout(model).unpack(vector)
    return collect(model)


def assert_close(results: dict[str, Vector], expected: Vector) -> None:
    for name, value in unpacked(expected).items():
        np.testing.assert_allclose(results[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_same_bits_on_all_ranks(name: str, size: int) -> None:
    results = run(size, lambda ring: train(ring, METHODS[name], 24))
    assert_same_bits([grads for _, _, grads in results])
    for aggregator, reports, _ in results:
        assert aggregator.window_log == results[0][0].window_log
        assert [report.ratio for report in reports] == [report.ratio for report in results[0][1]]
        assert all(report.measures is not None for report in reports if report.phase == "compressed")


@pytest.mark.parametrize("name", METHODS)
def test_resumes_bitwise(name: str) -> None:
    whole = run(2, lambda ring: train(ring, METHODS[name], 26))
    for stop in (1, 6, 15, 20, 23):
        resumed = run(2, lambda ring: train(ring, METHODS[name], 26, stop))  # noqa: B023
        for (ours, our_reports, grads), (theirs, their_reports, expected) in zip(resumed, whole, strict=True):
            assert_same_bits([grads, expected])
            assert ours.window_log == theirs.window_log
            for mine, other in zip(our_reports, their_reports, strict=True):
                assert dataclasses.replace(mine, seconds={}) == dataclasses.replace(other, seconds={})


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("method", [PowerSGD(2), PowerSGD(3, min_compression_rate=0), PowerSGD(1000)])
def test_powersgd_is_what_workers_in_one_process_get(method: PowerSGD, size: int) -> None:
    results = run(size, lambda ring: train(ring, method, 4))
    layout = Layout(small_model())
    workers = Here(lambda rank: make_family(method, layout.blocks, rank=rank, size=size, seed=5), layout.bucket, size)
    out = np.empty(layout.length, np.float32)
    payload = sum(method.payload_bytes(block.shape) for block in layout.blocks)
    for iteration in range(4):
        workers.aggregate(vectors(size, iteration), out, iteration)
        reports = [reports[iteration] for _, reports, _ in results]
        assert_close(results[0][2][iteration], out)
        assert sum(report.bytes_sent for report in reports) == 2 * (size - 1) * (payload + FLAG_BYTES)
        for report, measures in zip(reports, workers.measures, strict=True):
            assert report.phase == "compressed"
            assert report.ratio == 4 * layout.length / payload
            assert report.measures is not None
            assert measures is not None
            assert report.measures.norm == pytest.approx(measures.norm, rel=1e-4)
            assert report.measures.total_error == pytest.approx(measures.total_error, rel=1e-3, abs=1e-9)
            assert report.measures.payload_bytes == payload


def test_powersgd_of_high_rank_is_the_mean() -> None:
    results = run(3, lambda ring: train(ring, PowerSGD(1000, min_compression_rate=0), 2))
    for iteration in range(2):
        for name, value in exact(noise, 3, iteration).items():
            np.testing.assert_allclose(results[0][2][iteration][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_skipped_iteration_leaves_no_trace(name: str) -> None:
    """Gradients that aren't finite on one rank in two iterations: what follows is as if these had not been."""
    bad = (3, 19)

    def flawed(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        gradient = noise(name, shape, rank, iteration)
        if iteration in bad and rank == 1 and name == "2.weight":
            gradient.view(-1)[4] = float("nan")
        return gradient

    def work(ring: Ring, iterations: list[int]) -> tuple[list[bool], list[dict[str, Vector]], list[Any]]:
        model = small_model()
        aggregator = Aggregator(model, ring, METHODS[name], nonfinite="skip")
        skipped, results, log = [], [], []
        for iteration in iterations:
            set_gradients(model, flawed, ring.rank, iteration)
            # random numbers and decays follow the iteration, which counts skipped ones, too
            aggregator.iteration = iteration
            skipped.append(aggregator.aggregate(rate(iteration)).skipped)
            results.append(collect(model))
            log = aggregator.window_log
        return skipped, results, log

    every = list(range(25))
    good = [iteration for iteration in every if iteration not in bad]
    for (skipped, results, log), (_, expected, expected_log) in zip(
        run(3, lambda ring: work(ring, every)), run(3, lambda ring: work(ring, good)), strict=True
    ):
        assert [iteration for iteration in every if skipped[iteration]] == list(bad)
        assert_same_bits([[results[i] for i in good], expected])
        assert all((value == 0).all() for i in bad for value in results[i].values())
        # the count of what was accepted is the log's in ACCORDION, the aggregator's in the threshold's
        assert log == expected_log


@pytest.mark.parametrize("name", METHODS)
def test_who_is_flawed(name: str) -> None:
    def bad(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        value = float("inf") if rank == 2 and iteration == 1 and name == "0.weight" else 1.0
        return torch.full(shape, value)

    def work(ring: Ring) -> str:
        with pytest.raises(NonFiniteGradient) as error:
            train(ring, METHODS[name], 2, gradients=bad)
        return str(error.value)

    assert run(3, work) == ["non-finite gradient in iteration 1: 0.weight on rank 2"] * 3


def test_powersgd_with_sums_that_overflow() -> None:
    def huge(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return torch.full(shape, 3e38 if iteration == 1 and name == "2.weight" else 1.0)

    def work(ring: Ring) -> str:
        with pytest.raises(NonFiniteGradient) as error:
            train(ring, PowerSGD(2), 2, gradients=huge)
        return str(error.value)

    assert run(2, work) == ["the sum of finite gradients overflows float32 in iteration 1: 2.weight on all ranks"] * 2


def test_powersgd_with_a_memory_that_overflows() -> None:
    """Of two equal singular values rank 1 takes one, so half of one of two elements at least is remembered."""

    def huge(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        gradient = torch.zeros(shape)
        if name == "2.weight" and rank == 1:
            gradient[0, 0, 0, 0] = gradient[1, 1, 1, 1] = 2.5e38
        return gradient

    def work(ring: Ring) -> str:
        with pytest.raises(NonFiniteGradient) as error:
            train(ring, PowerSGD(1), 2, gradients=huge)
        return str(error.value)

    assert (
        run(2, work)
        == ["non-finite gradient in iteration 1: the sum of a gradient and what error feedback remembers on rank 1"] * 2
    )


def test_accordion_is_its_two_settings() -> None:
    """The same as workers in one process whose parts follow the critical regimes."""
    size, iterations = 3, 20
    results = run(size, lambda ring: train(ring, ACCORDION, iterations))
    layout = Layout(small_model())
    assert isinstance(ACCORDION.low, Compressed)
    assert isinstance(ACCORDION.high, Compressed)
    low, high = ACCORDION.low.parts(layout.blocks), ACCORDION.high.parts(layout.blocks)
    workers = WorkersHere(low, size, seed=5, feedback=ErrorFeedback())
    regimes = CriticalRegimes(layout.blocks, interval=4, window=2)
    out = np.empty(layout.length, np.float32)
    densities = set()
    for iteration in range(iterations):
        critical = regimes.critical_at(rate(iteration))
        workers.parts = [a if one else b for one, a, b in zip(critical, low, high, strict=True)]
        workers.aggregate(vectors(size, iteration), out, iteration)
        regimes.accept(out, rate(iteration))
        assert_close(results[0][2][iteration], out)
        measures = results[0][1][iteration].measures
        assert measures is not None
        assert workers.measures[0] is not None
        assert measures.num_sent == workers.measures[0].num_sent
        densities.add(measures.num_sent)
    assert len(densities) > 2
    log = results[0][0].window_log
    assert [entry["cause"] for entry in log] == [entry["cause"] for entry in regimes.log]
    assert [entry["critical"] for entry in log] == [entry["critical"] for entry in regimes.log]
    assert (14, "lr") in [(entry["iteration"], entry["cause"]) for entry in log]
    assert "first" in [entry["cause"] for entry in log]


def test_accordion_of_ranks() -> None:
    results = run(2, lambda ring: train(ring, ACCORDION_RANKS, 20))
    layout = Layout(small_model())
    sent = [report.measures.payload_bytes for report in results[0][1] if report.measures is not None]
    ends = [sum(PowerSGD(rank).payload_bytes(block.shape) for block in layout.blocks) for rank in (3, 1)]
    assert sent[0] == sent[14] == ends[0]
    assert ends[1] in sent
    assert all(ends[1] <= num_bytes <= ends[0] for num_bytes in sent)


@pytest.mark.parametrize("size", [1, 3])
def test_auto_threshold_is_the_formula(size: int) -> None:
    iterations = 23
    results = run(size, lambda ring: train(ring, AUTO, iterations))
    aggregator, reports, grads = results[0]
    assert [report.phase for report in reports] == ["warm-up"] * 20 + ["compressed"] * 3
    layout = Layout(small_model())
    windows = [NoiseWindow(layout.length, size, 20) for _ in range(size)]
    for iteration in range(20):
        ranks = vectors(size, iteration)
        mean = np.mean(ranks, axis=0, dtype=np.float64).astype(np.float32)
        assert_close(grads[iteration], mean)
        for window, gradient in zip(windows, ranks, strict=True):
            window.add(gradient, mean)
    estimate = windows[0].estimate(np.array([window.row() for window in windows]))
    (entry,) = aggregator.window_log
    kept = round(0.2 * layout.length)
    assert entry["iteration"] == 20
    assert entry["formula"] == "auto"
    assert entry["num_kept"] == kept
    assert entry["threshold"] == pytest.approx(auto_threshold(kept, layout.length, estimate), rel=1e-4)
    assert entry["estimate"]["noise"] == pytest.approx(estimate.noise, rel=1e-4)
    assert entry["estimate"]["heterogeneity"] == pytest.approx(estimate.heterogeneity, rel=1e-3, abs=1e-6)
    if size > 1:  # the noise is all there is: workers' means differ by no more than that
        assert entry["estimate"]["noise"] == pytest.approx(layout.length, rel=0.1)
        assert entry["estimate"]["heterogeneity"] < 0.2 * entry["estimate"]["noise"]
    # afterwards: hard-threshold with it
    method = AUTO.compressed(entry["threshold"])
    workers = WorkersHere(method.parts(layout.blocks), size, seed=5, feedback=FEEDBACK)
    out = np.empty(layout.length, np.float32)
    for iteration in range(20, iterations):
        workers.aggregate(vectors(size, iteration), out, iteration)
        assert_close(grads[iteration], out)
    # bytes: plain rings, and one small all-reduce of 2 + 2*2 float64 from everybody
    dense = 4 * layout.length + CONTROL_BYTES
    for iteration in range(20):
        ranks_reports = [reports[iteration] for _, reports, _ in results]
        extra = 2 * (size - 1) * size * 6 * 8 if iteration == 19 else 0
        assert sum(report.fit_bytes for report in ranks_reports) == extra
        assert sum(report.bytes_sent for report in ranks_reports) == 2 * (size - 1) * dense + extra


def test_simple_threshold_is_used_at_once() -> None:
    results = run(2, lambda ring: train(ring, SIMPLE, 2))
    layout = Layout(small_model())
    (entry,) = results[0][0].window_log
    assert entry == {
        "iteration": 0,
        "formula": "simple",
        "threshold": simple_threshold(30, layout.length),
        "num_kept": 30,
        "estimate": None,
    }
    mean = np.zeros(layout.length)
    for vector in vectors(2, 0):
        mean += np.where(np.abs(vector) >= entry["threshold"], vector, 0) / 2
    assert_close(results[0][2][0], mean.astype(np.float32))


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: Accordion(topk(0.1), PowerSGD(1)), TypeError, "both be Compressed or both PowerSGD"),
        (lambda: Accordion(PowerSGD(1), PowerSGD(2)), ValueError, "`low` must have the larger rank.*got 1 and 2"),
        (
            lambda: Accordion(PowerSGD(2), PowerSGD(1, error_feedback=False)),
            ValueError,
            "`error_feedback` must be the same in both settings",
        ),
        (
            lambda: Accordion(topk(0.1), topk(0.01, granularity="model")),
            ValueError,
            "`granularity` must be the same in both settings, got 'layer' and 'model'",
        ),
        (lambda: Accordion(topk(0.1, feedback=FEEDBACK), topk(0.01)), ValueError, "`feedback` must be the same"),
        (lambda: Accordion(topk(0.1), topk(0.01), interval=0), ValueError, "`interval` must be"),
        (lambda: Accordion(topk(0.1), topk(0.01), interval=5, window=6), ValueError, "`window` must be"),
        (lambda: AutoThreshold("other"), ValueError, "`formula` must be 'auto' or 'simple', got 'other'"),
        (lambda: AutoThreshold(ratio=0.1, count=3), ValueError, "`ratio` or `count`, not both"),
        (lambda: AutoThreshold(ratio=0.0), ValueError, "`ratio` must be above 0 and at most 1, got 0"),
        (lambda: AutoThreshold(count=0), ValueError, "`count` must be a whole number of at least 1, got 0"),
        (lambda: AutoThreshold(warmup=19), ValueError, "`warmup` must be .* at least 20 .two blocks of 10., got 19"),
    ],
)
def test_refused(make: Callable[[], object], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        make()


def test_more_than_the_model_has() -> None:
    with pytest.raises(ValueError, match="`count` must be at most"):
        run(1, lambda ring: Aggregator(small_model(), ring, AutoThreshold(count=10**6)))


OVER_MPI = """
    import pickle
    from ring.abort import end_together
    from ring.lockstep import run
    from ring.mpi import MPIRing
    from tests.gradiveq.test_switching import METHODS, train

    def compare(ring):
        for name, method in METHODS.items():
            aggregator, reports, results = train(ring, method, 23, stop=16)
            expected = None
            if ring.rank == 0:
                expected = [
                    (log.window_log, [report.bytes_sent for report in reports], pickle.dumps(grads))
                    for log, reports, grads in run(ring.size, lambda worker: train(worker, method, 23))
                ]
            log, sent, grads = ring.comm.scatter(expected)
            assert aggregator.window_log == log, name
            assert [report.bytes_sent for report in reports] == sent or ring.size == 2, name
            for mine, theirs in zip(results, pickle.loads(grads), strict=True):
                assert all(mine[key].tobytes() == theirs[key].tobytes() for key in theirs), name
        if ring.rank == 0:
            print("compared", len(METHODS), "on", ring.size)

    end_together()
    world = MPIRing(timeout_s=100)
    pair = world.comm.Split(world.rank < 2, world.rank)
    compare(world)
    if world.rank < 2:
        compare(MPIRing(pair, timeout_s=30))
    world.barrier()
"""


def test_over_mpi_the_same_bits(mpirun: Launch) -> None:
    """On 3 ranks and on 2, in one launch."""
    done = mpirun(3, OVER_MPI, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "".join(f"compared {len(METHODS)} on {ranks}\n" for ranks in (3, 2))
    assert done.stderr == ""


def test_how_a_method_applies_compressors() -> None:
    assert applied(ACCORDION) == ACCORDION.low
    assert applied(AUTO) == AUTO.applied
    assert applied(topk(0.1)) == topk(0.1)
    assert applied(PowerSGD()) is applied(ACCORDION_RANKS) is None
    with pytest.raises(ValueError, match="pattern 'nothing' matches no layer"):  # groups reach the layout
        run(1, lambda ring: Aggregator(small_model(), ring, AutoThreshold(applied=topk(0.1, granularity=("nothing",)))))


def test_groups_of_layers_are_switched_together() -> None:
    groups = ("0.*", "[12].*")
    method = Accordion(topk(0.5, granularity=groups), Compressed(Identity(), granularity=groups), interval=4, window=4)
    results = run(2, lambda ring: train(ring, method, 12))
    assert_same_bits([grads for _, _, grads in results])
    changes = [entry["changes"] for entry in results[0][0].window_log if entry["cause"] == "norms"]
    assert all(set(change) == {*groups, "3.weight", "3.bias"} for change in changes)
    assert changes


def test_what_a_report_says_of_a_threshold() -> None:
    log = run(1, lambda ring: train(ring, AUTO, 21))[0][0].window_log[0]
    text = threshold_text(log)
    assert f"threshold {log['threshold']:.3g} for {log['num_kept']} elements, from iteration 20 on" in text
    assert f"σ² {log['estimate']['noise']:.3g}" in text
    assert threshold_text(run(1, lambda ring: train(ring, SIMPLE, 1))[0][0].window_log[0]) == (
        "threshold 0.0913 for 30 elements, 1/(2√k)"
    )
