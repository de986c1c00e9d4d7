"""How noisy gradients are, and the threshold that follows (section 6 and appendix D of Sahu et al. 2021).

With g = ∇f_i + ξ of worker i's minibatch, f the mean of the n workers' f_i:

    Assumption 3    E‖ξ‖² <= M‖∇f_i‖² + σ²
    Assumption 4    mean over i of ‖∇f_i - ∇f‖² <= C‖∇f‖² + ζ²         here with C = 0, as in the formula for λ

    λ ~ 2/√k · sqrt((2d/k + M)·ζ² + σ²)         for as good a bound as top-k's, k of d elements
    λ ~ 1/(2√k)                                 the same with ζ = 0 and σ = 1/4, as in the paper's comparison

**The estimates.** For T uncompressed iterations every worker knows its own gradients g_t and the mean of all, ḡ_t.
Their difference x_t = g_t - ḡ_t is (∇f_i - ∇f) + (ξ - mean ξ): however ∇f moves as training goes, it is not in there.

    ζ²    ‖mean of x_t‖² - (variance of x_t)/T, averaged over workers        what is left when the noise averages out
    V     (variance of x_t)·n/(n - 1), averaged over workers                 E‖ξ‖²
    G     ‖mean of g_t‖² - V/B, averaged over workers                        ‖∇f_i‖²

where "variance" is the unbiased one, summed over elements. V and G are of blocks of B iterations each, and M and σ² are
the non-negative least squares of V = M·G + σ² over the blocks. Only if M differs from 0 with a confidence of 97.5 %
(one-sided, Student's t of the regression's slope) is it used; mostly ‖∇f‖ changes too little in a warm-up for that, and
then M = 0 and σ² is the mean of V. In λ, M stands beside 2d/k, at least 2 and mostly thousands.

They assume that minibatches are independent between workers and iterations, and that ∇f_i - ∇f stays as it is for T
iterations and ∇f_i for B. With one worker ζ = 0, and V is the variance of g_t itself within a block, to which
the drift of ∇f within the block adds. These are what the noise *was* at the iterates seen, not a bound for all of
them, as the assumptions have it.

`NoiseWindow` estimates once, at the end of uncompressed iterations; `gradiveq.running_noise` along all of training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

from gradiveq.compressors.base import Float32

Float64 = npt.NDArray[np.float64]

#: B: iterations over which a worker's expected gradient counts as constant.
BLOCK = 10
#: Probability that a slope which is 0 is taken for one that is not.
SLOPE_ERROR = 0.025


@dataclass(frozen=True)
class NoiseEstimate:
    """The constants of Assumptions 3 and 4, from one window; squares are in the gradient's units, summed over its
    elements.

    Attributes:
        multiple: M, how the noise grows with the gradient; 0 where it can't be told.
        noise: σ², the noise that is there whatever the gradient.
        heterogeneity: ζ², how far the workers' expected gradients are from their mean.
        multiple_error: standard error of M's least-squares slope; None with fewer than 3 blocks.
        total_noise: the mean of E‖ξ‖² in the window; σ² if M is 0.
        gradient: the mean of ‖∇f_i‖² in the window.
    """

    multiple: float
    noise: float
    heterogeneity: float
    multiple_error: float | None
    total_noise: float
    gradient: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class NoiseWindow:
    """Moments of one worker's gradients over a window of uncompressed iterations.

    Args:
        length: d, of the gradient.
        size: n, the number of workers.
        iterations: T, at least 2 blocks.
        block: B, iterations over which ∇f_i counts as constant; at least 2. What is left of T after the last whole
            block counts for ζ only.
    Raises:
        ValueError: a value is out of its range.
    Memory: two vectors of `length` in float64, with several workers three.
    """

    def __init__(self, length: int, size: int, iterations: int, block: int = BLOCK) -> None:
        if block < 2:
            raise ValueError(f"`block` must be at least 2, as a variance needs, got {block}")
        if iterations < 2 * block:
            raise ValueError(f"`iterations` must be at least {2 * block} (two blocks), got {iterations}")
        self.length, self.size, self.iterations, self.block = length, size, iterations, block
        self.done = 0
        self._all = np.zeros(length, np.float64)  # Σ x_t over the window
        self._all_squares = 0.0  # Σ ‖x_t‖²
        self._own = np.zeros(length, np.float64)  # Σ g_t over the block
        self._block = np.zeros(length if size > 1 else 0, np.float64)  # Σ x_t over the block
        self._block_squares = 0.0
        self._points: list[float] = []  # of each block: variance of x_t (of g_t with one worker), ‖mean of g_t‖²

    @property
    def full(self) -> bool:
        return self.done == self.iterations

    def add(self, own: Float32, mean: Float32) -> None:
        """Take one iteration.

        Args:
            own: this worker's gradient, float32 of shape (length,), finite. Not modified.
            mean: the mean over all workers of the same iteration.
        Cost: about six passes.
        """
        if self.full:
            raise ValueError(f"the window of {self.iterations} iterations is full")
        self._own += own
        if self.size > 1:
            difference = own.astype(np.float64) - mean
            squares = float(np.dot(difference, difference))
            self._block += difference
            self._all += difference
            self._all_squares += squares
            self._block_squares += squares
        else:
            wide = own.astype(np.float64)
            self._block_squares += float(np.dot(wide, wide))
        self.done += 1
        if self.done % self.block == 0:
            sums = self._block if self.size > 1 else self._own
            self._points += [
                variance(self._block_squares, float(np.dot(sums, sums)), self.block),
                float(np.dot(self._own, self._own)) / self.block**2,
            ]
            self._own.fill(0)
            self._block.fill(0)
            self._block_squares = 0.0

    def row(self) -> list[float]:
        """What the other workers need of this one's full window: 2 + 2·(T // B) numbers."""
        if not self.full:
            raise ValueError(f"the window has {self.done} of its {self.iterations} iterations")
        square = float(np.dot(self._all, self._all))
        spread = variance(self._all_squares, square, self.iterations) if self.size > 1 else 0.0
        return [square / self.iterations**2, spread, *self._points]

    def estimate(self, rows: Float64) -> NoiseEstimate:
        """The estimates, the same bits for the same rows.

        Args:
            rows: (size, 2 + 2·(T // B)), every worker's `row`.
        """
        return estimate_of(np.asarray(rows, np.float64).mean(axis=0), self.size, self.iterations, self.block)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; differs by rank. Copies."""
        return {
            "done": self.done,
            "all": self._all.copy(),
            "all_squares": self._all_squares,
            "own": self._own.copy(),
            "block": self._block.copy(),
            "block_squares": self._block_squares,
            "points": list(self._points),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of another window; nothing was changed.
        """
        mine = (self._all, self._own, self._block)
        theirs = (state["all"], state["own"], state["block"])
        if any(a.shape != b.shape for a, b in zip(mine, theirs, strict=True)) or state["done"] > self.iterations:
            raise ValueError("the state is of a window of another length or number of workers")
        for a, b in zip(mine, theirs, strict=True):
            a[:] = b
        self.done, self._points = state["done"], list(state["points"])
        self._all_squares, self._block_squares = state["all_squares"], state["block_squares"]


def estimate_of(means: Float64, size: int, iterations: int, block: int) -> NoiseEstimate:
    """The estimates, from what `NoiseWindow.row` has of each worker, averaged over the workers.

    Args:
        means: (2 + 2·(T // B),): ‖mean of x_t‖² and the variance of x_t over T, then by block the variance of x_t (of
            g_t with one worker) and ‖mean of g_t‖².
        size, iterations, block: n, T and B.
    """
    heterogeneity = max(0.0, float(means[0] - means[1] / iterations))
    unshared = size / (size - 1) if size > 1 else 1.0
    noises = means[2::2] * unshared
    gradients = np.maximum(means[3::2] - noises / block, 0.0)
    multiple, noise, error = _regress(gradients, noises)
    return NoiseEstimate(multiple, noise, heterogeneity, error, float(noises.mean()), float(gradients.mean()))


def auto_threshold(num_kept: int, length: int, estimate: NoiseEstimate) -> float:
    """λ ~ 2/√k · sqrt((2d/k + M)·ζ² + σ²), in units of the gradient.

    Section 6 and appendix D of Sahu et al. 2021: the λ at which hard-threshold's bound for non-convex functions
    (Theorem 6, υ² = dλ²) is as good as that of top-k (Theorem 7, δ = k/d).

    Args:
        num_kept: k, a number of elements; at least 1.
        length: d, of the vector.
    Raises:
        ValueError: k is not from 1 to d.
    """
    _check_count(num_kept, length)
    ratio = 2 * length / num_kept
    squares = (ratio + estimate.multiple) * estimate.heterogeneity + estimate.noise
    return 2 / math.sqrt(num_kept) * math.sqrt(squares)


def simple_threshold(num_kept: int, length: int) -> float:
    """λ ~ 1/(2√k): `auto_threshold` with ζ = 0 and σ = 1/4, the paper's in its comparison with ACCORDION.

    Args:
        num_kept, length: as for `auto_threshold`.
    """
    _check_count(num_kept, length)
    return 1 / (2 * math.sqrt(num_kept))


def _check_count(num_kept: int, length: int) -> None:
    if not 1 <= num_kept <= length:
        raise ValueError(f"`num_kept` must be from 1 to {length} (the vector's length), got {num_kept}")


def variance(squares: float, square: float, num: int) -> float:
    """Unbiased, summed over the elements, of `num` vectors: from the sum of their squares and their sum's square."""
    return max(0.0, (squares - square / num) / (num - 1))


def _regress(gradients: Float64, noises: Float64) -> tuple[float, float, float | None]:
    """M, σ² and M's standard error, of noises = M·gradients + σ²."""
    flat = 0.0, float(noises.mean()), None
    spread = gradients - gradients.mean()
    scatter = float(np.dot(spread, spread))
    if len(noises) < 3 or scatter == 0.0:
        return flat
    scale = float(np.abs(gradients).max())  # so that columns are of one size
    from scipy.optimize import nnls  # whose import takes longer than this package's

    solution, _ = nnls(np.stack([gradients / scale, np.ones_like(gradients)], axis=1), noises)
    slope = float(np.dot(spread, noises)) / scatter
    residuals = noises - noises.mean() - slope * spread
    degrees = len(noises) - 2
    error = math.sqrt(float(np.dot(residuals, residuals)) / degrees / scatter)
    if slope <= error * float(stdtrit(degrees, 1 - SLOPE_ERROR)):
        return 0.0, flat[1], error
    return float(solution[0]) / scale, float(solution[1]), error
