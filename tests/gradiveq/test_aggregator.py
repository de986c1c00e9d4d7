from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bench.models import resnet32
from gradiveq import Aggregator, FitError, GradiVeQ, NonFiniteGradient, Plain, QSGDRing, Report
from ring.cluster import Cluster, Link, Node
from ring.errors import RingMismatch
from ring.handle import Ring
from ring.lockstep import run
from ring.timeline import Timeline
from ring.virtual import VirtualRing
from tests.support.aggregators import (
    CONTROL_BYTES,
    Gradients,
    Vector,
    assert_same_bits,
    collect,
    exact,
    noise,
    set_gradients,
    small_model,
    spoilt,
    subspace,
    train,
)
from tests.support.states import without_times

CONVOLUTIONS = {"0.weight": (12, 9), "2.weight": (24, 9)}  # slice size, slices
UNCOMPRESSED = 4 + 4 + 6 + 5 * 6 + 5


def slices_of(gradient: Any) -> Any:
    """(slices, K) of a small convolution, in the order of Fig. 3a."""
    filters, depth, height, width = gradient.shape
    return gradient.transpose(2, 3, 1, 0).reshape(height * width, depth * filters)


def relative(estimate: dict[str, Vector], truth: dict[str, Any]) -> float:
    error = sum(float(np.square(estimate[name] - truth[name]).sum()) for name in truth)
    return error / sum(float(np.square(value).sum()) for value in truth.values())


QUICK = GradiVeQ(warmup=2, sample=5, compress=4, holdout_every=2, loss_threshold=0.2)
EXACT_SAMPLES = GradiVeQ(warmup=1, sample=12, compress=3, sampling=Plain(), holdout_every=1, loss_threshold=0.0)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6])
def test_plain_is_the_mean(size: int) -> None:
    results = run(size, lambda ring: train(ring, Plain(), 2))
    assert_same_bits([grads for _, _, grads in results])
    for iteration in range(2):
        truth = exact(noise, size, iteration)
        for name, value in results[0][2][iteration].items():
            np.testing.assert_allclose(value, truth[name], rtol=1e-5, atol=1e-6)
    reports = [reports[0] for _, reports, _ in results]
    length = results[0][0].layout.length
    assert sum(r.bytes_sent for r in reports) == 2 * (size - 1) * (4 * length + CONTROL_BYTES)
    assert all(r.bytes_sent == r.dense_bytes and r.ratio == 1 and r.phase == "plain" for r in reports)
    assert all(r.losses is None and not r.skipped and not r.fit_bytes for r in reports)


def test_missing_gradients_count_as_zeros() -> None:
    def work(ring: Ring) -> dict[str, Vector]:
        model = small_model()
        aggregator = Aggregator(model, ring, Plain())
        set_gradients(model, noise, ring.rank, 0)
        if ring.rank == 1:
            model.get_parameter("2.weight").grad = None
        model.get_parameter("3.bias").grad = None
        aggregator.aggregate()
        return collect(model)

    results = run(2, work)
    assert_same_bits([[grads] for grads in results])
    expected = noise("2.weight", (6, 4, 3, 3), 0, 0).numpy() / 2
    np.testing.assert_array_equal(results[1]["2.weight"], expected)
    np.testing.assert_array_equal(results[0]["3.bias"], np.zeros(5))


def test_qsgd_is_unbiased_and_bounded() -> None:
    def same(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return noise(name, shape, rank, 0)

    calls = 200
    results = run(3, lambda ring: train(ring, QSGDRing(), calls, same))
    assert_same_bits([grads for _, _, grads in results])
    truth, grads = exact(same, 3, 0), results[0][2]
    single = [relative(one, truth) for one in grads]
    assert 0.001 < np.mean(single) < 0.2
    average = {name: np.mean([one[name] for one in grads], axis=0) for name in truth}
    # the variance of a mean of independent estimates, with room for its own fluctuation
    assert relative(average, truth) < 1.5 * np.mean(single) / calls
    report = results[0][1][0]
    assert report.phase == "qsgd"
    assert report.ratio > 6
    assert report.bytes_sent < report.dense_bytes / 5


def test_qsgd_depends_on_seed_and_iteration_but_not_on_chunks() -> None:
    def bits(method: QSGDRing, **options: Any) -> bytes:
        (result,) = run(1, lambda ring: train(ring, method, 1, **options)[2])
        return result[0]["2.weight"].tobytes()

    first = bits(QSGDRing(bucket=8), chunk_bytes=32)
    assert bits(QSGDRing(bucket=8, pipelined=False)) == first
    assert bits(QSGDRing(bucket=8), seed=1) != first


def test_phases_bits_and_bytes_of_gradiveq() -> None:
    size = 3
    results = run(size, lambda ring: train(ring, QUICK, 20))
    assert_same_bits([grads for _, _, grads in results])
    window = ["sample"] * 5 + ["compress"] * 4
    assert [r.phase for r in results[0][1]] == (["warm-up"] * 2 + window + window)[:20]
    assert [r.iteration for r in results[0][1]] == list(range(20))
    aggregator = results[0][0]
    length = aggregator.layout.length
    dense = 4 * length + CONTROL_BYTES
    for i, ranks in enumerate(zip(*(reports for _, reports, _ in results), strict=True)):
        sent = sum(r.bytes_sent - r.fit_bytes for r in ranks)
        assert (ranks[0].fit_bytes > 0) == (i in (6, 15))
        if ranks[0].phase == "compress":
            log = aggregator.window_log[0 if i < 15 else 1]["layers"]
            payload = sum(4 * slices * log[name]["d"][0] for name, (_, slices) in CONVOLUTIONS.items())
            payload += 4 * UNCOMPRESSED + CONTROL_BYTES
            assert sent == 2 * (size - 1) * payload
            assert ranks[0].ratio == pytest.approx(dense / payload)
            assert ranks[0].ratio == aggregator.window_log[0 if i < 15 else 1]["ratio"]
        elif ranks[0].phase == "warm-up":
            assert sent == 2 * (size - 1) * dense
        measured = sum(r.measure_bytes for r in ranks)
        assert measured == (2 * (size - 1) * 4 * (length - UNCOMPRESSED) if i in (7, 9, 16, 18) else 0)
        assert sum(r.dense_bytes for r in ranks) == 2 * (size - 1) * dense


def test_compressed_is_equations_3_to_5_in_numpy() -> None:
    size, gradients = 4, subspace(5, off=0.3)
    method = GradiVeQ(warmup=1, sample=9, compress=2, sampling=Plain(), holdout_every=1, loss_threshold=0.1)
    results = run(size, lambda ring: train(ring, method, 12, gradients))
    aggregator, reports, grads = results[0]
    for iteration in (10, 11):
        truth = exact(gradients, size, iteration)
        errors = norms = 0.0
        for name in truth:
            if name not in CONVOLUTIONS:
                np.testing.assert_allclose(grads[iteration][name], truth[name], rtol=1e-5, atol=1e-6)
                continue
            samples = np.stack([slices_of(grads[i][name].astype(np.float64)) for i in range(1, 10)])
            mean = samples.mean(axis=0)
            _, s, components = np.linalg.svd(samples[:, 0] - mean[0], full_matrices=False)
            captured = np.cumsum(s**2) / np.sum(s**2)
            d = int(np.argmax(captured >= 1 - 0.1)) + 1  # Eq. 6
            u = components[:d].T
            layer = aggregator.window_log[0]["layers"][name]
            assert layer["d"] == [d]
            assert layer["in_sample_loss"] == pytest.approx(1 - captured[d - 1], abs=1e-6)
            # Eq. 3 and 4 per worker, with the mean gradient's µ for the paper's µ/N
            coded = sum(
                (slices_of(gradients(name, truth[name].shape, rank, iteration).double().numpy()) - mean) @ u
                for rank in range(size)
            )
            estimate = coded @ u.T / size + mean  # Eq. 5, divided by N
            np.testing.assert_allclose(slices_of(grads[iteration][name]), estimate, rtol=1e-4, atol=1e-4)
            error = float(np.square(estimate - slices_of(truth[name])).sum())
            norm = float(np.square(truth[name]).sum())
            errors, norms = errors + error, norms + norm
            losses = reports[iteration].losses
            assert losses is not None
            assert losses["layers"][name] == pytest.approx(error / norm, rel=1e-3)
        assert losses["held_out"] == pytest.approx(errors / norms, rel=1e-3)
    records = aggregator.window_log[0]["held_out"]
    assert [record["iteration"] for record in records] == [10, 11]
    for name, layer in aggregator.window_log[0]["layers"].items():
        assert layer["held_out_loss"] == pytest.approx(np.mean([record["layers"][name] for record in records]))


def test_local_loss_is_equation_7_in_numpy() -> None:
    size, gradients = 2, subspace(5, off=0.3)
    method = GradiVeQ(warmup=0, sample=9, compress="auto", sampling=Plain(), holdout_every=0, loss_threshold=0.1)
    results = run(size, lambda ring: train(ring, method, 10, gradients))
    for rank, (_, reports, grads) in enumerate(results):
        error = norm = 0.0
        for name in CONVOLUTIONS:
            samples = np.stack([slices_of(grads[i][name].astype(np.float64)) for i in range(9)])
            mean = samples.mean(axis=0)
            components = np.linalg.svd(samples[:, 0] - mean[0], full_matrices=False)[2]
            u = components[: results[0][0].window_log[0]["layers"][name]["d"][0]].T
            own = slices_of(gradients(name, tuple(grads[9][name].shape), rank, 9).double().numpy())
            error += float(np.square(own - mean - (own - mean) @ u @ u.T).sum())
            norm += float(np.square(own).sum())
        assert reports[9].losses == {"local": pytest.approx(error / norm, rel=1e-3)}
        assert reports[9].measure_bytes == 0


def test_gradients_within_the_subspace_lose_nothing() -> None:
    gradients = subspace(4)
    results = run(3, lambda ring: train(ring, EXACT_SAMPLES, 17, gradients))
    aggregator, reports, grads = results[0]
    assert [layer["d"] for layer in aggregator.window_log[0]["layers"].values()] == [[4], [4]]
    for iteration in range(13, 16):
        assert reports[iteration].phase == "compress"
        truth = exact(gradients, 3, iteration)
        for name, value in truth.items():
            np.testing.assert_allclose(grads[iteration][name], value, rtol=1e-4, atol=1e-4)
        losses = reports[iteration].losses
        assert losses is not None
        assert losses["held_out"] < 1e-9
        assert losses["local"] < 1e-5
    # the next window's first sample evaluates the old bases
    losses = reports[16].losses
    assert reports[16].phase == "sample"
    assert losses is not None
    assert 0 <= losses["held_out"] < 1e-5
    assert aggregator.window_log[0]["after"] == {"iteration": 16, **losses}
    assert reports[16].measure_bytes == 0


def test_layers_that_cannot_be_compressed_are_sent_as_they_are() -> None:
    method = GradiVeQ(
        warmup=0, sample=8, compress=2, sampling=Plain(), fit_slices="all", loss_threshold=0.0, holdout_every=1
    )
    results = run(2, lambda ring: train(ring, method, 10))
    plain = run(2, lambda ring: train(ring, Plain(), 10))
    aggregator, reports, grads = results[0]
    for name, (k, _) in CONVOLUTIONS.items():
        layer = aggregator.window_log[0]["layers"][name]
        assert (layer["d"], layer["ratio"], layer["in_sample_loss"]) == ([k], 1.0, 0.0)
        for i in range(10):
            np.testing.assert_allclose(grads[i][name], plain[0][2][i][name], rtol=1e-5, atol=1e-6)
    assert reports[9].ratio == 1
    assert reports[9].losses is not None
    assert reports[9].losses["held_out"] < 1e-12


@pytest.mark.parametrize(
    "method",
    [
        Plain(),
        QSGDRing(),
        QUICK,
        GradiVeQ(warmup=1, sample=4, compress=3, reuse=5, fit_slices="all", ratio=3.0, sampling=Plain()),
        GradiVeQ(warmup=0, sample="auto", max_sample=11, compress="auto", stop_multiple=1.01, loss_threshold=0.3),
    ],
)
def test_resume_is_bitwise(method: Any) -> None:
    """Stopped after each of several iterations, in whatever phase, all that follows is the same."""
    size, total, stops = 2, 16, (1, 4, 7, 8, 12)

    def going_on(ring: Ring) -> tuple[Any, ...]:
        model = small_model()
        aggregator = Aggregator(model, ring, method, seed=3)
        states, reports, grads = {}, [], []
        for iteration in range(total):
            if iteration in stops:
                states[iteration] = pickle.dumps(aggregator.state_dict())
            set_gradients(model, noise, ring.rank, iteration)
            reports.append(aggregator.aggregate())
            grads.append(collect(model))
        return states, reports, grads, aggregator.state_dict()

    def resumed(ring: Ring, state: bytes) -> tuple[Any, ...]:
        model = small_model()
        aggregator = Aggregator(model, ring, method, seed=3)
        aggregator.load_state_dict(pickle.loads(state))
        reports, grads = [], []
        for iteration in range(aggregator.iteration, total):
            set_gradients(model, noise, ring.rank, iteration)
            reports.append(aggregator.aggregate())
            grads.append(collect(model))
        return reports, grads, aggregator.state_dict()

    whole = run(size, going_on)
    for stop in stops:
        parts = run(size, lambda ring, stop=stop: resumed(ring, whole[ring.rank][0][stop]))  # type: ignore[misc]
        for (_, reports, grads, end), (their_reports, their_grads, their_end) in zip(whole, parts, strict=True):
            assert_same_bits([grads[stop:], their_grads])
            for one, other in zip(reports[stop:], their_reports, strict=True):
                assert (one.iteration, one.phase, one.bytes_sent, one.fit_bytes, one.ratio) == (
                    other.iteration,
                    other.phase,
                    other.bytes_sent,
                    other.fit_bytes,
                    other.ratio,
                )
                assert one.losses == other.losses
            assert without_times(end) == without_times(their_end)


def test_a_state_is_a_copy() -> None:
    def work(ring: Ring) -> bool:
        model = small_model()
        aggregator = Aggregator(model, ring, QUICK)
        same = True
        for iteration in range(12):
            set_gradients(model, noise, ring.rank, iteration)
            state = aggregator.state_dict()
            before = pickle.dumps(state)
            aggregator.aggregate()
            same &= pickle.dumps(state) == before
        return same

    assert run(1, work) == [True]


@pytest.mark.parametrize(("drifting", "ends"), [((), False), ((0, 2), False), ((0, 2, 3), True), ((0, 1, 2, 3), True)])
def test_most_votes_end_the_window(drifting: tuple[int, ...], ends: bool) -> None:
    """From iteration 15 on, some workers' gradients leave the subspace: their loss is seen then, and voted on in 16."""

    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        off = 5.0 if iteration >= 15 and rank in drifting else 0.3
        return subspace(5, off)(name, shape, rank, iteration)

    method = GradiVeQ(warmup=0, sample=12, compress="auto", holdout_every=0, loss_threshold=0.1)
    results = run(4, lambda ring: train(ring, method, 19, gradients))
    phases = [r.phase for r in results[0][1]]
    expected = ["sample"] * 12 + (["compress"] * 5 + ["sample"] * 2 if ends else ["compress"] * 7)
    assert phases == expected
    assert all([r.phase for r in reports] == phases for _, reports, _ in results)
    window = results[0][0].window_log[0]
    assert (window["compress"], window["ended_by"]) == ((5, "vote") if ends else (7, None))


def test_votes_do_not_end_a_window_of_a_given_length() -> None:
    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return subspace(5, 0.3 if iteration < 7 else 9.0)(name, shape, rank, iteration)

    method = GradiVeQ(warmup=0, sample=6, compress=6, loss_threshold=0.1)
    ((aggregator, reports, _),) = run(1, lambda ring: train(ring, method, 13, gradients))
    assert [r.phase for r in reports] == ["sample"] * 6 + ["compress"] * 6 + ["sample"]
    assert aggregator.window_log[0]["ended_by"] == "count"


def test_sampling_ends_when_d_is_stable() -> None:
    method = GradiVeQ(warmup=0, sample="auto", compress=1, sampling=Plain(), loss_threshold=0.0, max_sample=80)
    results = run(2, lambda ring: train(ring, method, 45, subspace(3)))
    for aggregator, reports, grads in results:
        window = aggregator.window_log[0]
        assert (window["sample"], window["stable"], window["checks"]) == (40, True, [[10 * i, 6] for i in (1, 2, 3, 4)])
        assert [r.phase for r in reports[39:42]] == ["sample", "compress", "sample"]
        assert [i for i, r in enumerate(reports[:40]) if r.fit_bytes] == [9, 19, 29, 39]
        assert grads[40]["0.weight"].tobytes() == results[0][2][40]["0.weight"].tobytes()


def test_sampling_ends_at_its_bound_when_d_is_not_stable() -> None:
    method = GradiVeQ(warmup=0, sample="auto", compress=1, sampling=Plain(), loss_threshold=0.0, max_sample=14)
    ((aggregator, _, _),) = run(1, lambda ring: train(ring, method, 15))
    window = aggregator.window_log[0]
    assert (window["sample"], window["stable"], window["checks"]) == (14, False, [[10, 18]])


METHODS_AND_ITERATIONS = [
    (Plain(), 1),
    (QSGDRing(), 1),
    (QUICK, 1),
    (QUICK, 4),
    (QUICK, 7),
    (QUICK, 8),
    (QUICK, 10),
]


@pytest.mark.parametrize(("method", "iteration"), METHODS_AND_ITERATIONS)
def test_non_finite_gradient_fails_on_all_ranks(method: Any, iteration: int) -> None:
    gradients = spoilt(1, iteration, {"2.weight": math.nan, "3.bias": -math.inf})

    def work(ring: Ring) -> tuple[str, int, bool]:
        model = small_model()
        aggregator = Aggregator(model, ring, method)
        for i in range(iteration):
            set_gradients(model, gradients, ring.rank, i)
            aggregator.aggregate()
        set_gradients(model, gradients, ring.rank, iteration)
        before = collect(model)
        with pytest.raises(NonFiniteGradient) as caught:
            aggregator.aggregate()
        after = collect(model)
        return str(caught.value), aggregator.iteration, all(before[n].tobytes() == after[n].tobytes() for n in before)

    message = f"non-finite gradient in iteration {iteration}: 2.weight, 3.bias on rank 1"
    assert run(3, work) == [(message, iteration, True)] * 3


@pytest.mark.parametrize(("method", "iteration"), METHODS_AND_ITERATIONS)
def test_non_finite_gradient_skips_on_all_ranks(method: Any, iteration: int) -> None:
    """What follows is as if the iteration had not been, except that its number counts."""
    names = {"2.weight": math.inf}
    results = run(3, lambda ring: train(ring, method, 14, spoilt(1, iteration, names), nonfinite="skip"))
    assert_same_bits([grads for _, _, grads in results])
    for _, reports, grads in results:
        assert [r.iteration for r in reports if r.skipped] == [iteration]
        assert reports[iteration].losses is None
        assert not any(value.any() for value in grads[iteration].values())
        assert all(np.isfinite(value).all() for one in grads for value in one.values())
        phases = [r.phase for r in reports]
        assert phases[iteration] == phases[iteration + 1]
        normal = ["warm-up"] * 2 + ["sample"] * 5 + ["compress"] * 4 + ["sample"] * 3
        if isinstance(method, GradiVeQ):
            assert [phase for i, phase in enumerate(phases) if i != iteration] == normal[:13]


def test_non_finite_gradients_of_many_layers_and_ranks_make_one_line() -> None:
    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return noise(name, shape, rank, iteration) * (1.0 if rank == 1 else math.nan)

    with pytest.raises(NonFiniteGradient) as caught:
        run(3, lambda ring: train(ring, Plain(), 1, gradients))
    assert str(caught.value) == (
        "non-finite gradient in iteration 0: 0.weight, 2.weight, 1.weight and 4 more on rank 0; "
        "0.weight, 2.weight, 1.weight and 4 more on rank 2"
    )


@pytest.mark.parametrize("method", [Plain(), QSGDRing(bucket=8)])
def test_a_sum_that_overflows_is_named_too(method: Any) -> None:
    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return torch.full(shape, 3e38 if name == "1.bias" else 1.0)

    with pytest.raises(NonFiniteGradient, match=r"sum of finite gradients overflows .* iteration 0: 1\.bias.* on all"):
        run(2, lambda ring: train(ring, method, 1, gradients))


def test_large_finite_gradients_pass() -> None:
    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return torch.full(shape, 1e30)

    results = run(2, lambda ring: train(ring, Plain(), 1, gradients))
    np.testing.assert_array_equal(results[0][2][0]["1.bias"], np.full(4, 1e30, np.float32))


def linear_aggregator(ring: Ring, method: Any) -> tuple[Vector, bytes]:
    model = nn.Linear(7, 3)
    aggregator = Aggregator(model, ring, method)
    model.weight.grad, model.bias.grad = torch.full((3, 7), float(ring.rank)), torch.ones(3)
    aggregator.aggregate()
    return model.weight.grad.numpy(), model.bias.grad.numpy().tobytes()


def test_models_without_convolutions() -> None:
    for weight, _ in run(3, lambda ring: linear_aggregator(ring, Plain())):
        np.testing.assert_array_equal(weight, np.ones((3, 7)))
    results = run(3, lambda ring: linear_aggregator(ring, QSGDRing()))
    assert all(bits == results[0][1] for _, bits in results)
    with pytest.raises(ValueError, match=r"GradiVeQ compresses convolutions .* use Plain or QSGDRing"):
        run(1, lambda ring: linear_aggregator(ring, GradiVeQ()))


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"method": "rar"}, TypeError, "`method` must be one of Plain, QSGDRing, GradiVeQ, Compressed, .* got 'rar'"),
        ({"nonfinite": "ignore"}, ValueError, "`nonfinite` must be 'fail' or 'skip', got 'ignore'"),
        ({"chunk_bytes": 0}, ValueError, "`chunk_bytes` must be a whole number of at least 1, got 0"),
        ({"method": GradiVeQ(slice_size=300)}, ValueError, "`slice_size` must be at most 216"),
        ({"method": GradiVeQ(sample=4, n_components=5)}, ValueError, r"`n_components` must be at most 3 \(samples - 1"),
        ({"model": nn.ReLU()}, ValueError, "`model` has no parameter"),
    ],
)
def test_invalid_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run(1, lambda ring: Aggregator(**{"model": small_model(), "ring": ring, "method": Plain(), **arguments}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": Plain()}, "another aggregator: method is gradiveq there and rar here"),
        ({"method": GradiVeQ(sample=6)}, r"another aggregator: method\.sample is 5 there and 6 here"),
        ({"seed": 1}, "another aggregator: seed is 0 there and 1 here"),
        ({"model": nn.Conv2d(4, 6, 3)}, r"another model: .* is missing there and \[0, 6, 4, 3, 3\] here"),
        ({"model": nn.Sequential(nn.Conv2d(3, 4, 5, bias=False))}, r"0\.weight is \[0, 4, 3, 3, 3\] there"),
        ({"model": nn.Sequential(nn.Conv2d(3, 4, 3, bias=False))}, r"another model: it has model\.2\.weight"),
    ],
)
def test_a_state_of_something_else(change: dict[str, Any], message: str) -> None:
    method = GradiVeQ(sample=5)

    def work(ring: Ring) -> None:
        state = Aggregator(small_model(), ring, method).state_dict()
        other = Aggregator(**{"model": small_model(), "ring": ring, "method": method, **change})
        other.load_state_dict(state)

    with pytest.raises(ValueError, match=message):
        run(1, work)


def test_a_state_of_another_rank_or_size() -> None:
    states = run(2, lambda ring: Aggregator(small_model(), ring, Plain()).state_dict())

    def load(ring: Ring, state: Any) -> None:
        Aggregator(small_model(), ring, Plain()).load_state_dict(state)

    with pytest.raises(ValueError, match="rank is 1 there and 0 here"):
        run(1, lambda ring: load(ring, states[1]))
    with pytest.raises(ValueError, match="size is 2 there and 1 here"):
        run(1, lambda ring: load(ring, states[0]))


@pytest.mark.parametrize("method", [Plain(), QSGDRing(), QUICK])
def test_states_of_different_iterations(method: Any) -> None:
    """All ranks refuse, before anything is averaged; with the same states they go on."""

    def work(ring: Ring, iterations: tuple[int, ...]) -> str:
        model = small_model()
        aggregator = Aggregator(model, ring, method)
        states = []
        for iteration in range(5):
            states.append(aggregator.state_dict())
            set_gradients(model, noise, ring.rank, iteration)
            aggregator.aggregate()
        aggregator.load_state_dict(states[iterations[ring.rank]])
        before = collect(model)
        try:
            aggregator.aggregate()
        except ValueError as error:
            assert all(value.tobytes() == before[name].tobytes() for name, value in collect(model).items())
            return str(error)
        return ""

    message = "the states that were loaded are of different iterations: 3 on rank 0, 4 on rank 1, 3 on rank 2"
    assert run(3, lambda ring: work(ring, (3, 4, 3))) == [message] * 3
    assert run(3, lambda ring: work(ring, (4, 4, 4))) == [""] * 3


def test_a_state_on_some_ranks_only() -> None:
    def work(ring: Ring) -> None:
        model = small_model()
        aggregator = Aggregator(model, ring, QSGDRing())
        if ring.rank == 1:
            aggregator.load_state_dict(aggregator.state_dict())
        set_gradients(model, noise, ring.rank, 0)
        aggregator.aggregate()

    with pytest.raises(RingMismatch):
        run(3, work)


def test_seconds_by_kind() -> None:
    timelines = [Timeline(), Timeline()]
    results = run(2, lambda ring: train(ring, QUICK, 8, timeline=timelines[ring.rank]))
    for timeline, (_, reports, _) in zip(timelines, results, strict=True):
        kinds = [set(r.seconds) for r in reports]
        assert kinds[0] == {"pack", "add"}
        assert kinds[2] == {"pack", "encode", "recode", "decode", "fit"}
        assert kinds[7] == {"pack", "encode", "add", "decode", "measure"}
        for kind, seconds in timeline.totals().items():
            assert seconds == pytest.approx(sum(r.seconds.get(kind, 0.0) for r in reports))


def failing_fit(ring: Ring, method: Any, gradients: Gradients = noise) -> tuple[str, bool]:
    """The message, and whether the gradients are what they were."""
    model = small_model()
    aggregator = Aggregator(model, ring, method)
    for iteration in range(100):
        set_gradients(model, gradients, ring.rank, iteration)
        before = collect(model)
        try:
            aggregator.aggregate()
        except FitError as error:
            after = collect(model)
            return str(error), all(before[name].tobytes() == after[name].tobytes() for name in before)
    raise AssertionError("no fit failed")


@pytest.mark.parametrize(
    ("method", "iteration"),
    [(QUICK, 6), (GradiVeQ(warmup=0, sample="auto", compress=1, loss_threshold=0.1), 9)],
)
def test_a_failing_solver_fails_on_all_ranks(monkeypatch: pytest.MonkeyPatch, method: GradiVeQ, iteration: int) -> None:
    """Ranks that have no share in the failure don't wait for ever, and all say the same."""

    def failing(matrix: Any, *args: Any, **options: Any) -> Any:
        raise np.linalg.LinAlgError("Eigenvalues did not converge")

    monkeypatch.setattr(np.linalg, "eigh", failing)
    why = "(the eigenvalue solver did not converge)"
    message = f"PCA failed in iteration {iteration}: 0.weight on rank 1 {why}; 2.weight on rank 0 {why}"
    assert run(3, lambda ring: failing_fit(ring, method)) == [(message, True)] * 3


def test_a_variance_that_overflows_fails_on_all_ranks() -> None:
    """Finite gradients, whose covariance is not; the other layer is fine."""

    def gradients(name: str, shape: tuple[int, ...], rank: int, iteration: int) -> torch.Tensor:
        return noise(name, shape, rank, iteration) * (1e25 if name == "2.weight" else 1.0)

    method = GradiVeQ(warmup=1, sample=4, sampling=Plain(), fit_slices="all", reuse=3)
    message = "PCA failed in iteration 4: 2.weight on rank "
    for found, unchanged in run(2, lambda ring: failing_fit(ring, method, gradients)):
        assert found.startswith(message)
        assert found.count("2.weight") == 2
        assert found.endswith("(the variance of the samples is not finite in float32)")
        assert unchanged


def test_resnet32() -> None:
    method = GradiVeQ(warmup=1, sample=4, compress=2, holdout_every=1)

    def work(ring: Ring) -> tuple[list[Report], list[bytes], Aggregator]:
        model = resnet32(100)
        aggregator = Aggregator(model, ring, method)
        reports, digests = [], []
        for iteration in range(7):
            set_gradients(model, noise, ring.rank, iteration)
            reports.append(aggregator.aggregate())
            digests.append(b"".join(value.tobytes() for value in collect(model).values()))
        return reports, digests, aggregator

    (reports, digests, aggregator), (_, others, _) = run(2, work)
    assert digests == others
    assert [r.phase for r in reports] == ["warm-up"] + ["sample"] * 4 + ["compress"] * 2
    layers = aggregator.window_log[0]["layers"]
    assert len(layers) == 31
    assert {layer["slice_size"] for layer in layers.values()} == {48, 256, 512, 1024, 2048, 4096}
    assert {d for layer in layers.values() for d in layer["d"]} == {3}
    rest = sum(block.length for block in aggregator.layout.blocks if not block.compressed)
    payload = 9 * 31 * 3 + rest + 2
    assert reports[6].ratio == pytest.approx(470_006 / payload)
    assert reports[6].bytes_sent == pytest.approx(4 * payload, abs=2000)


def test_reports_by_the_clusters_clock() -> None:
    """Messages of an hour each; what is computed takes no time at all."""
    cluster = Cluster("far", nodes=3, node=Node(overhead_us=1e6), link=Link(latency_us=3.6e9))

    def work(ring: Ring) -> tuple[Report, Report, dict[str, float]]:
        virtual = VirtualRing(ring, cluster, processor_time=lambda: 0.0)
        timeline = Timeline(virtual=Timeline(virtual.clock))
        _, (report,), (mine,) = train(virtual, Plain(), 1, timeline=timeline)
        _, (plain,), (theirs,) = train(ring, Plain(), 1)
        assert all(np.array_equal(mine[name], theirs[name]) for name in mine)
        assert timeline.virtual is not None
        assert timeline.virtual.totals() == report.virtual_seconds
        return report, plain, report.virtual_seconds

    for report, plain, seconds in run(3, work):
        # 4 steps; each message costs its sender and its receiver a second.
        assert seconds["overhead"] == pytest.approx(8)
        assert sum(seconds.values()) == pytest.approx(4 * 3600 + 8, abs=0.1)
        assert report.seconds.keys() >= {"pack", "add"}
        assert plain.virtual_seconds == {}
