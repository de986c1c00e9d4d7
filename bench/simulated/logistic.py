"""Logistic regression on many workers in one process: Section C.3 of Sahu et al. 2021.

    f(x) = 1/N Σᵢ log(1 + exp(-yᵢ·aᵢᵀx)) + µ/2·‖x‖²                                      (their Eq. 31)
    µ = 10⁻⁴·λ_max(AᵀA)/(4N),   L = µ + λ_max(AᵀA)/(4N),   step γ = 1/L, of the features as they are

The rows are shared out among n workers at random. Where n doesn't divide N some have a row more, so worker w's part of
the objective weighs its rows by n/N: f is the mean of the f_w exactly, and a row drawn from worker w, weighed by
n·(its rows)/N, has ∇f_w as its mean.

    EF-SGD      Algorithm 1: each worker compresses the gradient at one of its rows, drawn uniformly
    EF-GD       the same with ∇f_w; it stops at the noise of the compression
    EF-GDstar   EC-GDstar of Gorbunov et al. 2020: the same with ∇f_w(x) - ∇f_w(x*), which vanishes at the optimum x*,
                and so does what is compressed: it reaches any precision, given x*

An *epoch* is N rows: N/n iterations of EF-SGD, one of the others. All start at x* + s·(1, …, 1), as the authors'
released code does (s = 10⁻⁴ for madelon, 5·10⁻³ for gisette); the paper doesn't say where.

The optimum, the gradients and the point are float64. What is compressed is float32, as everywhere: of EF-GDstar the
*difference* of two float64 gradients, so that its rounding vanishes with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numba
import numpy as np
import numpy.typing as npt
import scipy.linalg
from scipy.sparse.linalg import eigsh

from bench.simulated.training import CompressedMean
from gradiveq.arrays.float32 import LARGEST
from gradiveq.arrays.jit import jit
from gradiveq.compressors import COMPRESSORS, Compressor, Draw
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.message import LENGTH_BYTES
from gradiveq.exchange.parts import Part

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int64 = npt.NDArray[np.int64]

Algorithm = Literal["ef-sgd", "ef-gd", "ef-gdstar"]
ALGORITHMS: tuple[Algorithm, ...] = ("ef-sgd", "ef-gd", "ef-gdstar")
#: µ over λ_max(AᵀA)/(4N).
REGULARISATION = 1e-4
#: Newton's method needs about ten steps.
NEWTON_STEPS = 200
#: Iterations of each long run that are done both ways; see `Crowd`.
CHECKED = 100


# --- the objective and its optimum -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Problem:
    """Eq. 31.

    Attributes:
        features: A, float64 of shape (N, d).
        labels: y, float64 of shape (N,), -1 or 1.
        mu, smoothness: µ and L of f.
    """

    features: Float64
    labels: Float64
    mu: float
    smoothness: float

    @classmethod
    def of(cls, features: npt.ArrayLike, labels: npt.ArrayLike) -> Problem:
        """The problem with µ and L as above.

        Raises:
            ValueError: if the features are no finite matrix or the labels aren't one of -1 and 1 for each row.
        Cost: a few dozen products with A.
        """
        matrix, signs = np.ascontiguousarray(features, np.float64), np.asarray(labels, np.float64)
        if matrix.ndim != 2 or not matrix.size or not np.isfinite(matrix).all():
            raise ValueError(f"`features` must be a finite matrix, got shape {matrix.shape}")
        if signs.shape != matrix.shape[:1] or not np.isin(signs, (-1, 1)).all():
            raise ValueError(f"`labels` must be -1 or 1, one for each of {len(matrix)} rows, got shape {signs.shape}")
        largest = _largest_eigenvalue(matrix) / (4 * len(matrix))
        return cls(matrix, signs, REGULARISATION * largest, (1 + REGULARISATION) * largest)

    @property
    def length(self) -> int:
        """d."""
        return int(self.features.shape[1])

    @property
    def num_rows(self) -> int:
        """N."""
        return len(self.features)

    @property
    def step(self) -> float:
        """γ = 1/L."""
        return 1 / self.smoothness

    def threshold(self, precision: float) -> float:
        """λ for which d·γ²·λ² = precision ("Tuning the hard-threshold", C.3; λ = sqrt(ε/d)/γ)."""
        return math.sqrt(precision / self.length) / self.step

    def value(self, point: Float64) -> float:
        """f. Cost: one product with A."""
        margins = self.labels * (self.features @ point)
        return float(np.logaddexp(0, -margins).mean() + self.mu / 2 * (point @ point))

    def gradient(self, point: Float64) -> Float64:
        """∇f, float64 of shape (d,). Cost: two products with A."""
        return (self._slopes(point) @ self.features) / self.num_rows + self.mu * point

    def _slopes(self, point: Float64) -> Float64:
        """The slope of each row's loss: -y·σ(-y·aᵀx)."""
        return -self.labels * _sigmoid(-self.labels * (self.features @ point))

    def hessian(self, point: Float64) -> Float64:
        """∇²f, float64 of shape (d, d). Cost: N·d² multiplications."""
        chances = _sigmoid(self.features @ point)
        weighted = self.features * (chances * (1 - chances) / self.num_rows)[:, None]
        curvature: Float64 = self.features.T @ weighted
        curvature[np.diag_indices_from(curvature)] += self.mu
        return curvature


@dataclass(frozen=True, eq=False)
class Optimum:
    """x* and f*, with how near they are.

    Attributes:
        point: float64 of shape (d,).
        value: f there.
        gradient_norm: ‖∇f‖ there.
        gap: f(point) - f* is at most this, ‖∇f‖²/(2µ), as f is µ-strongly convex.
    """

    point: Float64
    value: float
    gradient_norm: float
    gap: float


def optimum(problem: Problem) -> Optimum:
    """Newton's method, whose steps are halved until the gradient's norm falls, down to what float64 resolves.

    The Newton direction shortens the gradient, as f is strongly convex, so this ends only where rounding does.

    Cost: about ten Cholesky decompositions of a (d, d) matrix.
    """
    point = np.zeros(problem.length)
    gradient = problem.gradient(point)
    norm = float(np.linalg.norm(gradient))
    for _ in range(NEWTON_STEPS):
        direction = scipy.linalg.solve(problem.hessian(point), gradient, assume_a="pos")
        share = 1.0
        while share > 1e-3:
            candidate = point - share * direction
            gradient = problem.gradient(candidate)
            if np.linalg.norm(gradient) < norm:
                break
            share /= 2
        else:
            break
        point, norm = candidate, float(np.linalg.norm(gradient))
    return Optimum(point, problem.value(point), norm, norm**2 / (2 * problem.mu))


def _largest_eigenvalue(matrix: Float64) -> float:
    """λ_max(AᵀA), from the smaller of AᵀA and AAᵀ."""
    small = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    gram = small @ small.T
    if len(gram) < 3:
        return float(np.linalg.eigvalsh(gram)[-1])
    (largest,) = eigsh(gram, k=1, v0=np.ones(len(gram)), return_eigenvectors=False)
    return float(largest)


def _sigmoid(z: Float64) -> Float64:
    return np.asarray(0.5 * (1 + np.tanh(z / 2)))


# --- the workers' rows -----------------------------------------------------------------------------------------------


class Shards:
    """The rows of each worker, one behind another.

    Args:
        seed: the seed of the order in which rows are dealt out; worker w gets rows bounds[w] ... bounds[w + 1] of it.

    Attributes:
        features: shape (N, d), float32 if that holds every feature exactly (raw features often are integers).
        labels: float64 of shape (N,).
        bounds: int64 of shape (workers + 1,).
    """

    def __init__(self, problem: Problem, workers: int, seed: int) -> None:
        if not 1 <= workers <= problem.num_rows:
            raise ValueError(f"`workers` must be 1 ... {problem.num_rows}, a row for each, got {workers}")
        order = np.random.default_rng([seed, 0]).permutation(problem.num_rows)
        features = problem.features[order]
        with np.errstate(over="ignore"):
            narrow = features.astype(np.float32)
        self.features = narrow if np.array_equal(narrow, features) else features
        self.labels = problem.labels[order]
        self.bounds: Int64 = np.arange(workers + 1) * problem.num_rows // workers
        self.mu = problem.mu
        self.workers = workers

    def gradients(self, point: Float64, out: Float64) -> float:
        """∇f_w of every worker into `out`, float64 of shape (workers, d). Returns f. Cost: A is read once."""
        return _gradients(self.features, self.labels, self.bounds, self.mu, point, out)

    def draw(self, iterations: int, seed: int) -> Int64:
        """A row of each worker for each iteration, uniformly: shape (iterations, workers)."""
        sizes = np.diff(self.bounds)
        return np.random.default_rng([seed, 1]).integers(0, sizes, (iterations, self.workers)) + self.bounds[:-1]

    def row_gradients(self, point: Float64, rows: Int64, out: Float64) -> None:
        """Gradients of one row of each worker, weighed so that their mean over its rows is ∇f_w, into `out`."""
        features, labels = self.features[rows], self.labels[rows]
        weights = np.diff(self.bounds) * (self.workers / len(self.labels))
        slopes = -labels * weights * _sigmoid(-labels * (features @ point))
        np.multiply(features, slopes[:, None], out=out)
        out += self.mu * point


def _all_gradients(features: Any, labels: Any, bounds: Any, mu: float, point: Any, out: Any) -> float:
    """Four rows at a time, each used twice while it is in the first cache: two products would read A twice.

    Behind a worker's last row that row stands in for those that are missing, with weight 0.
    """
    num_rows, length = features.shape
    workers = len(bounds) - 1
    losses = 0.0
    margins, slopes = np.empty(4), np.empty(4)
    for worker in range(workers):
        total, last = out[worker], bounds[worker + 1] - 1
        for j in range(length):
            total[j] = mu * point[j]
        for start in range(bounds[worker], last + 1, 4):
            a, b = features[start], features[min(start + 1, last)]
            c, d = features[min(start + 2, last)], features[min(start + 3, last)]
            of_a, of_b, of_c, of_d = 0.0, 0.0, 0.0, 0.0
            for j in range(length):
                of_a += a[j] * point[j]
                of_b += b[j] * point[j]
                of_c += c[j] * point[j]
                of_d += d[j] * point[j]
            margins[0], margins[1], margins[2], margins[3] = of_a, of_b, of_c, of_d
            for r in range(4):
                slopes[r] = 0.0
                if start + r <= last:
                    margin = labels[start + r] * margins[r]
                    small = math.exp(-abs(margin))
                    losses += math.log1p(small) + max(-margin, 0.0)
                    chance = (small if margin > 0 else 1.0) / (1.0 + small)
                    slopes[r] = -labels[start + r] * chance * workers / num_rows
            by_a, by_b, by_c, by_d = slopes[0], slopes[1], slopes[2], slopes[3]
            for j in range(length):
                total[j] += by_a * a[j] + by_b * b[j] + by_c * c[j] + by_d * d[j]
    squares = 0.0
    for j in range(length):
        squares += point[j] * point[j]
    return float(losses / num_rows + mu / 2 * squares)


#: Compiled with sums in vector registers; infinities and NaN stay as they are.
_gradients: Callable[..., float] = numba.njit(
    fastmath={"reassoc", "contract", "nsz"}, nogil=True, error_model="numpy", cache=True
)(_all_gradients)


# --- exchanging ------------------------------------------------------------------------------------------------------


class SentElements(NamedTuple):
    """What one exchange sends, over all workers.

    Attributes:
        elements, num_bytes: that were sent, summed.
        corrected: mean of ‖γ·x‖², x being what was compressed: the error-compensated update (their Fig. 4b).
        error: mean of ‖e‖² of the memories afterwards.
    """

    elements: int
    num_bytes: int
    corrected: float
    error: float


class Exchange(Protocol):
    """The workers' side of an iteration: Algorithm 1 from the gradients to the mean of what was sent."""

    def __call__(self, gradients: Float32, out: Float32, call: int, lr: float) -> SentElements:
        """Compress what each worker has.

        Args:
            gradients: gradients of shape (workers, d). Not modified.
            out: array of shape (d,); overwritten with the mean of the workers' C(g + e/γ).
        """


class CompressingWorkers:
    """Workers with error feedback of the form "scaled", by `gradiveq.here`."""

    def __init__(self, compressor: Compressor, workers: int, length: int, seed: int = 0) -> None:
        self._mean = CompressedMean(
            [Part("x", 0, length, compressor)], workers, seed=seed, feedback=ErrorFeedback("scaled")
        )

    def __call__(self, gradients: Float32, out: Float32, call: int, lr: float) -> SentElements:
        self._mean.here.aggregate(list(gradients), out, call, lr)
        said = [one for one in self._mean.here.measures if one is not None]
        return SentElements(
            sum(one.num_sent for one in said),
            sum(one.payload_bytes for one in said),
            lr**2 * sum(one.norm for one in said) / len(said),
            sum(one.error for one in said) / len(said),
        )


class Crowd:
    """All workers of a long run in one loop over arrays: the bits of `CompressingWorkers`, within a tenth of the time.

    For runs of 10⁵ iterations with 100 workers, where calls would take hours. No payload is made: its bytes are those
    of a payload with as many elements. `train` does the first iterations of every run both ways and compares.

    Raises:
        ValueError: for a compressor other than identity, topk and threshold.
    """

    def __init__(self, compressor: Compressor, workers: int, length: int) -> None:
        if compressor.name not in ("identity", "topk", "threshold"):
            raise ValueError(f"`compressor` must be identity, topk or threshold here, got {compressor.name}")
        self._compressor, self._length = compressor, length
        self._keep = _num_sent(compressor, length) if compressor.name == "topk" else length
        self._threshold = np.float32(getattr(compressor, "value", 0.0))
        self._bytes: dict[int, int] = {}
        self.memory = np.zeros((workers, length), np.float32)
        self._counts = np.zeros(workers, np.int64)

    def __call__(self, gradients: Float32, out: Float32, call: int, lr: float) -> SentElements:
        corrected, error = _exchange(
            gradients, self.memory, np.float32(lr), self._keep, self._threshold, out, self._counts
        )
        num_bytes = sum(self._message_bytes(int(count)) for count in self._counts)
        workers = len(gradients)
        return SentElements(int(self._counts.sum()), num_bytes, lr**2 * corrected / workers, error / workers)

    def _message_bytes(self, count: int) -> int:
        if count not in self._bytes:
            self._bytes[count] = message_bytes(self._compressor, self._length, count)
        return self._bytes[count]


def message_bytes(compressor: Compressor, length: int, count: int) -> int:
    """Bytes that a worker sends when `count` elements of a vector are sent."""
    values = np.zeros(length, np.float32)
    values[:count] = LARGEST
    payload = compressor.compress(values, Draw(0, 0, 0, 0))
    gathered = compressor.collective == "all_gather" and not compressor.fixed_size
    return int(payload.nbytes) + (LENGTH_BYTES if gathered else 0)


def _num_sent(compressor: Compressor, length: int) -> int:
    """How many elements are sent of a vector whose elements all differ."""
    payload = compressor.compress(np.arange(1, length + 1, dtype=np.float32), Draw(0, 0, 0, 0))
    return compressor.num_sent(payload, length)


@jit(cache=True)  # no fastmath: rounded as NumPy does
def _exchange(
    gradients: Any, memory: Any, lr: Any, keep: int, threshold: Any, out: Any, counts: Any
) -> tuple[float, float]:
    """Sum of ‖x‖² and of ‖e‖². With keep < d the `keep` largest magnitudes are sent, else those >= threshold."""
    workers, length = gradients.shape
    norms, errors = 0.0, 0.0
    best = np.empty(keep, np.int64)
    magnitudes = np.empty(keep, np.float32)
    corrected = np.empty(length, np.float32)
    sent = np.empty(length, np.bool_)
    for j in range(length):
        out[j] = 0
    for worker in range(workers):
        for j in range(length):
            corrected[j] = gradients[worker, j] + memory[worker, j] / lr
            norms += float(corrected[j]) ** 2
        if keep < length:
            held = 0
            for j in range(length):
                sent[j] = False
                magnitude = abs(corrected[j])
                if held == keep and magnitude <= magnitudes[held - 1]:
                    continue
                place = held if held < keep else held - 1
                while place > 0 and magnitudes[place - 1] < magnitude:
                    magnitudes[place], best[place] = magnitudes[place - 1], best[place - 1]
                    place -= 1
                magnitudes[place], best[place] = magnitude, j
                held = min(held + 1, keep)
            for place in range(held):
                sent[best[place]] = True
        else:
            for j in range(length):
                sent[j] = abs(corrected[j]) >= threshold
        counts[worker] = 0
        for j in range(length):
            if sent[j]:
                out[j] += corrected[j]
                memory[worker, j] = 0
                counts[worker] += 1
            else:
                memory[worker, j] = corrected[j] * lr
                errors += float(memory[worker, j]) ** 2
    for j in range(length):
        out[j] /= np.float32(workers)
    return norms, errors


# --- a run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogisticSetting:
    """What is run.

    Attributes:
        algorithm: one of `ALGORITHMS`.
        compressor: its name in the registry; `fields` are its hyper-parameters.
        epochs: passes over the rows (see the module).
        seed: of the rows' division among the workers, of the rows drawn and of the compressor's random numbers.
        start: s.
    """

    algorithm: Algorithm
    compressor: str
    fields: dict[str, Any]
    workers: int
    epochs: float
    seed: int
    start: float = 1e-4

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"`algorithm` must be one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        if not self.epochs > 0:
            raise ValueError(f"`epochs` must be positive, got {self.epochs}")

    def make_compressor(self) -> Compressor:
        return COMPRESSORS[self.compressor](**self.fields)

    def iterations(self, num_rows: int) -> int:
        per_epoch = num_rows / self.workers if self.algorithm == "ef-sgd" else 1
        return max(1, round(self.epochs * per_epoch))


@dataclass
class ConvergenceTrace:
    """What a run did, at its start and after some iterations.

    Attributes:
        iteration, epoch: done.
        suboptimality: f(x) - f*.
        elements, num_bytes: sent until then, per worker.
        corrected, error: of the last iteration, as in `SentElements`; 0 before the first.
        silent: iterations until then in which no worker sent any element.
        total_error: the sum of `error` over all iterations (the objective of their Eq. 3, times γ²).
        step: γ.
    """

    iteration: list[int] = field(default_factory=list)
    epoch: list[float] = field(default_factory=list)
    suboptimality: list[float] = field(default_factory=list)
    elements: list[float] = field(default_factory=list)
    num_bytes: list[float] = field(default_factory=list)
    corrected: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)
    total_error: float = 0.0
    step: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(problem: Problem, best: Optimum, setting: LogisticSetting, points: int = 200) -> ConvergenceTrace:
    """Run the setting.

    Args:
        best: x* and f* of the problem.
        points: about as many points of the trace, equally far apart.
    Cost: of an iteration of EF-SGD, n rows and n calls of the compressor; of the others, A read once.
    """
    shards = Shards(problem, setting.workers, setting.seed)
    iterations = setting.iterations(problem.num_rows)
    compressor, lr = setting.make_compressor(), problem.step
    stochastic = setting.algorithm == "ef-sgd"
    exchange: Exchange = CompressingWorkers(compressor, setting.workers, problem.length, setting.seed)
    checked: Exchange | None = None
    if not stochastic:
        exchange, checked = Crowd(compressor, setting.workers, problem.length), exchange
    rows = shards.draw(iterations, setting.seed) if stochastic else None
    point = best.point + setting.start
    gradients = np.empty((setting.workers, problem.length))
    shifts = np.zeros_like(gradients)
    if setting.algorithm == "ef-gdstar":
        shards.gradients(best.point, shifts)
    narrow = np.empty(gradients.shape, np.float32)
    mean, other = np.empty(problem.length, np.float32), np.empty(problem.length, np.float32)
    trace = ConvergenceTrace(step=lr)
    elements, num_bytes, silent = 0, 0, 0
    every = max(1, iterations // points)
    sent = SentElements(0, 0, 0.0, 0.0)
    for iteration in range(iterations + 1):
        if iteration % every == 0 or iteration == iterations:
            trace.iteration.append(iteration)
            trace.epoch.append(iteration * (setting.workers / problem.num_rows if stochastic else 1))
            trace.suboptimality.append(problem.value(point) - best.value)
            trace.elements.append(elements / setting.workers)
            trace.num_bytes.append(num_bytes / setting.workers)
            trace.corrected.append(sent.corrected)
            trace.error.append(sent.error)
            trace.silent.append(silent)
        if iteration == iterations:
            break
        if rows is not None:
            shards.row_gradients(point, rows[iteration], gradients)
        else:
            shards.gradients(point, gradients)
        np.subtract(gradients, shifts, out=narrow, casting="same_kind")  # in float64, then rounded
        sent = exchange(narrow, mean, iteration, lr)
        if checked is not None and iteration < CHECKED:
            said = checked(narrow, other, iteration, lr)
            if not np.array_equal(mean, other) or said[:2] != sent[:2]:
                raise AssertionError(f"iteration {iteration}: one loop over all workers differs from {compressor}")
        elements += sent.elements
        num_bytes += sent.num_bytes
        silent += not sent.elements
        trace.total_error += sent.error
        point -= np.multiply(mean, lr, dtype=np.float64)
    return trace


def reached(trace: ConvergenceTrace, precision: float) -> int | None:
    """Index of the first point of the trace from which on f - f* stays at most `precision`; None if there is none."""
    above = [index for index, value in enumerate(trace.suboptimality) if not value <= precision]
    first = above[-1] + 1 if above else 0
    return first if first < len(trace.suboptimality) else None
