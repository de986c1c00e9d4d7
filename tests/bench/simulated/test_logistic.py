"""Logistic regression on many workers: the objective, Algorithm 1, EF-GDstar, and what Sahu et al. 2021 find."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize

from bench.simulated import logistic
from bench.simulated.logistic import (
    CompressingWorkers,
    Crowd,
    LogisticSetting,
    Optimum,
    Problem,
    Shards,
    reached,
    train,
)
from gradiveq.compressors import COMPRESSORS

SGD = LogisticSetting("ef-sgd", "identity", {}, workers=20, epochs=10, seed=0)
#: The paper's two precisions: of its Fig. 7, and of 8 and 9.
COARSE, FINE = 1.25e-4, 5e-12


def madelon_like(rows: int = 600, length: int = 100, seed: int = 0) -> Problem:
    """Whole numbers about 480 with a deviation of 40, as madelon's raw features; few of them tell the classes apart."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.where(np.arange(rows) % 2, 1.0, -1.0))
    features = rng.normal(480, 40, (rows, length))
    features[:, :5] += 15 * labels[:, None]
    return Problem.of(np.round(features), labels)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return madelon_like()


@pytest.fixture(scope="module")
def best(problem: Problem) -> Optimum:
    return logistic.optimum(problem)


# --- the objective ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 12), (9, 30), (2, 2)])
def test_constants_are_those_of_equation_31(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(3, 1, shape)
    problem = Problem.of(features, np.where(np.arange(shape[0]) % 2, 1, -1))
    largest = np.linalg.eigvalsh(features.T @ features)[-1] / (4 * shape[0])
    assert problem.mu == pytest.approx(1e-4 * largest, rel=1e-9)
    assert problem.smoothness == pytest.approx(problem.mu + largest, rel=1e-9)
    assert problem.step == 1 / problem.smoothness
    threshold = problem.threshold(COARSE)
    assert problem.length * problem.step**2 * threshold**2 == pytest.approx(COARSE, rel=1e-12)


def test_value_gradient_and_hessian_belong_together(problem: Problem) -> None:
    rng = np.random.default_rng(2)
    point = rng.normal(0, 1e-4, problem.length)
    margins = problem.labels * (problem.features @ point)
    plain = np.mean(np.log(1 + np.exp(-margins))) + problem.mu / 2 * np.sum(point**2)
    assert problem.value(point) == pytest.approx(plain, rel=1e-13)
    direction = rng.normal(0, 1, problem.length)
    step = 1e-8
    ahead, behind = point + step * direction, point - step * direction
    assert problem.gradient(point) @ direction == pytest.approx(
        (problem.value(ahead) - problem.value(behind)) / (2 * step), rel=1e-5
    )
    difference = (problem.gradient(ahead) - problem.gradient(behind)) / (2 * step)
    np.testing.assert_allclose(problem.hessian(point) @ direction, difference, rtol=1e-5)


def test_margins_of_any_size_do_not_overflow(problem: Problem) -> None:
    shards = Shards(problem, 3, 0)
    gradients = np.empty((3, problem.length))
    for point in (np.full(problem.length, 1e3), np.full(problem.length, -1e3)):
        value = problem.value(point)
        assert np.isfinite(value)
        assert shards.gradients(point, gradients) == pytest.approx(value, rel=1e-12)
        np.testing.assert_allclose(gradients.mean(axis=0), problem.gradient(point), rtol=1e-9)


@pytest.mark.parametrize(
    ("features", "labels", "match"),
    [
        ([[1.0, np.inf]], [1], "finite matrix"),
        ([1.0, 2.0], [1, -1], "finite matrix"),
        ([[1.0], [2.0]], [0, 1], "-1 or 1"),
        ([[1.0], [2.0]], [1], "2 rows"),
    ],
)
def test_what_is_no_problem_is_refused(features: list, labels: list, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Problem.of(features, labels)


def test_the_optimum_is_certified(problem: Problem, best: Optimum) -> None:
    """The certificate is small, and L-BFGS, which knows nothing of it, finds nothing lower."""
    assert best.gradient_norm == pytest.approx(np.linalg.norm(problem.gradient(best.point)), abs=1e-9)
    assert best.gap == best.gradient_norm**2 / (2 * problem.mu)
    assert best.gap < 1e-20
    scale = problem.step**0.5
    found = scipy.optimize.minimize(
        lambda z: problem.value(scale * z),
        np.zeros(problem.length),
        jac=lambda z: scale * problem.gradient(scale * z),
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9},
    )
    assert best.value - 1e-14 <= found.fun <= best.value + 1e-9


def test_the_certificate_bounds_the_suboptimality_anywhere(problem: Problem, best: Optimum) -> None:
    rng = np.random.default_rng(3)
    for size in (1e-7, 1e-5, 1e-3):
        point = best.point + size * rng.normal(0, 1, problem.length)
        excess = problem.value(point) - best.value
        assert 0 < excess <= np.sum(problem.gradient(point) ** 2) / (2 * problem.mu)


# --- the workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 7, 600])
def test_the_objective_is_the_mean_of_the_workers(problem: Problem, workers: int) -> None:
    """Also where workers have unequally many rows; and each worker's drawn gradient is unbiased."""
    shards = Shards(problem, workers, seed=4)
    sizes = np.diff(shards.bounds)
    assert sizes.sum() == problem.num_rows
    assert sizes.max() - sizes.min() <= 1
    point = np.random.default_rng(5).normal(0, 1e-5, problem.length)
    gradients = np.empty((workers, problem.length))
    assert shards.gradients(point, gradients) == pytest.approx(problem.value(point), rel=1e-13)
    np.testing.assert_allclose(gradients.mean(axis=0), problem.gradient(point), rtol=1e-9, atol=1e-9)
    drawn, total = np.empty_like(gradients), np.zeros_like(gradients)
    for index in range(sizes.max()):
        row = np.minimum(index, sizes - 1)
        shards.row_gradients(point, shards.bounds[:-1] + row, drawn)
        total += np.where((index < sizes)[:, None], drawn, 0)
    np.testing.assert_allclose(total / sizes[:, None], gradients, rtol=1e-9, atol=1e-7)


def test_rows_are_drawn_uniformly_from_each_workers_own(problem: Problem) -> None:
    shards = Shards(problem, 7, seed=0)
    rows = shards.draw(20_000, seed=0)
    for worker, (low, high) in enumerate(zip(shards.bounds[:-1], shards.bounds[1:], strict=True)):
        counts = np.bincount(rows[:, worker] - low, minlength=high - low)
        assert len(counts) == high - low
        expected = len(rows) / len(counts)
        assert abs(counts - expected).max() < 6 * expected**0.5  # 5 standard deviations happen once in 10^6


def test_raw_whole_numbers_take_half_the_memory_and_others_are_not_rounded(problem: Problem) -> None:
    assert Shards(problem, 2, 0).features.dtype == np.float32
    other = Problem.of(problem.features + 1e-9, problem.labels)
    assert Shards(other, 2, 0).features.dtype == np.float64


def test_too_many_workers_are_refused(problem: Problem) -> None:
    with pytest.raises(ValueError, match=r"1 \.\.\. 600"):
        Shards(problem, 601, 0)


# --- Algorithm 1 -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compressor", "fields"), [("identity", {}), ("topk", {"count": 3}), ("threshold", {"value": 3000.0})]
)
@pytest.mark.parametrize("algorithm", logistic.ALGORITHMS)
def test_training_is_algorithm_1(
    problem: Problem, best: Optimum, algorithm: logistic.Algorithm, compressor: str, fields: dict
) -> None:
    """Against the paper's pseudo-code in float64, one worker and one element after another."""
    iterations, workers = 60, 5
    epochs = iterations * workers / problem.num_rows if algorithm == "ef-sgd" else iterations
    setting = LogisticSetting(algorithm, compressor, fields, workers, epochs, seed=6)
    trace = train(problem, best, setting, points=iterations)
    shards = Shards(problem, workers, seed=6)
    features, labels = shards.features.astype(np.float64), shards.labels
    rows, gamma = shards.draw(iterations, seed=6), 1 / problem.smoothness

    def gradient(point: np.ndarray, worker: int, chosen: np.ndarray) -> np.ndarray:
        total = np.zeros(problem.length)
        for row in chosen:
            total += -labels[row] * features[row] / (1 + np.exp(labels[row] * (features[row] @ point)))
        size = shards.bounds[worker + 1] - shards.bounds[worker]
        return workers * size / problem.num_rows * total / len(chosen) + problem.mu * point

    def select(vector: np.ndarray) -> np.ndarray:
        if compressor == "identity":
            return vector
        if compressor == "threshold":
            return np.where(abs(vector) >= fields["value"], vector, 0)
        kept = np.argsort(-abs(vector), kind="stable")[: fields["count"]]
        return np.where(np.isin(np.arange(len(vector)), kept), vector, 0)

    point, memories, sent = best.point + 1e-4, np.zeros((workers, problem.length)), 0
    for t in range(iterations):
        assert trace.suboptimality[t] == pytest.approx(problem.value(point) - best.value, rel=1e-3, abs=1e-12)
        steps = np.zeros(problem.length)
        for w in range(workers):
            own = np.arange(shards.bounds[w], shards.bounds[w + 1])
            g = gradient(point, w, rows[t, [w]] if algorithm == "ef-sgd" else own)
            if algorithm == "ef-gdstar":
                g = g - gradient(best.point, w, own)
            p = memories[w] + gamma * g
            delta = gamma * select(p / gamma)
            memories[w] = p - delta
            steps += delta / workers
            sent += np.count_nonzero(delta)
        point = point - steps
        errors = np.mean(np.sum(memories**2, axis=1))
        assert trace.error[t + 1] == pytest.approx(errors, rel=1e-3, abs=1e-15)
    assert trace.iteration[-1] == iterations
    assert trace.elements[-1] * workers == pytest.approx(sent, abs=2)  # float32 may see another side of the threshold


@pytest.mark.parametrize(
    ("compressor", "fields"),
    [
        ("identity", {}),
        ("topk", {"count": 1}),
        ("topk", {"count": 4}),
        ("topk", {"ratio": 1.0}),
        ("threshold", {"value": 2.0}),
        ("threshold", {"value": 0.0}),
        ("threshold", {"value": 1e9}),
    ],
)
def test_one_loop_over_all_workers_has_the_bits_of_workers(compressor: str, fields: dict) -> None:
    """With many ties, as the values are whole numbers; bytes and elements too."""
    made = COMPRESSORS[compressor](**fields)
    rng = np.random.default_rng(7)
    one, many = Crowd(made, 6, 40), CompressingWorkers(made, 6, 40)
    out, expected = np.empty(40, np.float32), np.empty(40, np.float32)
    for call in range(25):
        gradients = rng.integers(-4, 5, (6, 40)).astype(np.float32)
        if call == 3:
            gradients[:] = 0
        said, wanted = one(gradients, out, call, 0.5), many(gradients, expected, call, 0.5)
        assert out.tobytes() == expected.tobytes() or np.array_equal(out, expected)
        assert said[:2] == wanted[:2]
        assert said[2:] == pytest.approx(wanted[2:], rel=1e-5)
        memories = [state["memory"]["gradient"] for state in many._mean.state_dict()["workers"]]
        np.testing.assert_array_equal(one.memory, np.stack(memories))


def test_other_compressors_need_workers_of_their_own() -> None:
    with pytest.raises(ValueError, match="identity, topk or threshold"):
        Crowd(COMPRESSORS["randomk"](), 2, 10)


def test_a_difference_between_both_ways_ends_the_run(
    problem: Problem, best: Optimum, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logistic.Crowd, "_message_bytes", lambda self, count: 0)
    setting = LogisticSetting("ef-gdstar", "topk", {"count": 1}, 4, 10, seed=0)
    with pytest.raises(AssertionError, match="iteration 0"):
        train(problem, best, setting)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="ef-sgd, ef-gd, ef-gdstar"):
        replace(SGD, algorithm="sgd")
    with pytest.raises(ValueError, match="`epochs`"):
        replace(SGD, epochs=0)


def test_the_same_seed_gives_the_same_run_and_another_one_another(problem: Problem, best: Optimum) -> None:
    setting = replace(SGD, compressor="topk", fields={"count": 1}, epochs=2)
    assert train(problem, best, setting) == train(problem, best, setting)
    assert train(problem, best, setting) != train(problem, best, replace(setting, seed=1))


# --- what the paper finds --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large() -> tuple[Problem, Optimum]:
    """Of madelon's size."""
    problem = madelon_like(2000, 500)
    return problem, logistic.optimum(problem)


def tail(values: list[float]) -> float:
    """The mean of the last third."""
    return float(np.mean(values[-len(values) // 3 :]))


@pytest.mark.parametrize("seed", [0, 1])
def test_hard_threshold_converges_like_sgd_with_far_fewer_bits_and_faster_than_top_k(
    large: tuple[Problem, Optimum], seed: int
) -> None:
    """Fig. 1 and 7: λ by the paper's rule; top-k may send more elements, and does worse."""
    problem, best = large
    setting = replace(SGD, seed=seed)
    sgd = train(problem, best, setting)
    fields = {"value": problem.threshold(COARSE)}
    hard = train(problem, best, replace(setting, compressor="threshold", fields=fields))
    top = train(problem, best, replace(setting, compressor="topk", fields={"count": 1}))
    assert tail(hard.suboptimality) < 3 * tail(sgd.suboptimality)
    assert hard.elements[-1] < sgd.elements[-1] / 500
    assert hard.num_bytes[-1] < sgd.num_bytes[-1] / 100  # with positions, and messages that say that nothing is sent
    assert hard.elements[-1] < top.elements[-1]
    assert hard.silent[-1] > hard.iteration[-1] / 4
    assert hard.total_error < top.total_error / 2
    middle = len(sgd.iteration) // 2
    assert np.mean(hard.suboptimality[:middle]) < np.mean(top.suboptimality[:middle]) / 1.5
    assert sgd.error[-1] == sgd.total_error == 0


def test_ef_gdstar_reaches_any_precision_and_ef_gd_does_not() -> None:
    """Fig. 8: float32 is no obstacle, as what is compressed vanishes. The error keeps to dγ²λ² (Remark 5)."""
    problem = madelon_like(300, 60)
    best = logistic.optimum(problem)
    bound = FINE / 10
    fields = {"value": problem.threshold(bound)}
    setting = LogisticSetting("ef-gdstar", "threshold", fields, 20, 40_000, seed=0)
    hard = train(problem, best, setting)
    assert reached(hard, FINE) is not None
    assert max(hard.error) <= bound * (1 + 1e-5)
    assert hard.elements[-1] < hard.iteration[-1] * problem.length / 50
    top_k = replace(setting, compressor="topk", fields={"count": 1})
    assert reached(train(problem, best, top_k), FINE) is not None
    plain = train(problem, best, replace(top_k, algorithm="ef-gd", epochs=10_000))
    assert reached(plain, 1e6 * FINE) is None
