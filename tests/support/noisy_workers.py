"""Workers whose gradients have a known noise."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import stats

from gradiveq.noise import NoiseEstimate, NoiseWindow

#: Two-sided, of each statistical test here, with the seeds fixed.
ERROR = 1e-6
#: Standard deviations within which a normal variable is but for ERROR.
SIGMAS = float(stats.norm.isf(ERROR / 2))


class Synthetic:
    """Workers whose gradients are ∇f_i(t) + ξ with E‖ξ‖² = M‖∇f_i(t)‖² + σ².

    ∇f(t) shrinks and turns; ∇f_i - ∇f is constant and sums to zero. The noise is uneven over the elements.
    """

    def __init__(self, size: int, length: int, multiple: float, noise: float, heterogeneity: float, seed: int) -> None:
        self.size, self.length, self.multiple, self.noise, self.seed = size, length, multiple, noise, seed
        generator = np.random.default_rng([seed, 0])
        apart = generator.standard_normal((size, length))
        apart -= apart.mean(axis=0)
        scale = math.sqrt(heterogeneity / max(1e-300, np.square(apart).sum() / size)) if size > 1 else 0.0
        self.apart = apart * scale
        self.directions = np.linalg.qr(generator.standard_normal((length, 2))).Q.T
        weights = generator.uniform(0.1, 2, length)
        self.weights = weights / np.square(weights).sum() ** 0.5

    def expected(self, rank: int, iteration: int, drift: float) -> npt.NDArray[np.float64]:
        size, angle = 3 * math.exp(-drift * iteration), drift * iteration
        return size * (math.cos(angle) * self.directions[0] + math.sin(angle) * self.directions[1]) + self.apart[rank]

    def gradient(self, rank: int, iteration: int, drift: float) -> npt.NDArray[np.float32]:
        expected = self.expected(rank, iteration, drift)
        variance = self.multiple * float(expected @ expected) + self.noise
        xi = np.random.default_rng([self.seed, 1, rank, iteration]).standard_normal(self.length) * self.weights
        return (expected + math.sqrt(variance) * xi).astype(np.float32)

    def windows(self, iterations: int, drift: float = 0.0, block: int = 10) -> list[NoiseWindow]:
        windows = [NoiseWindow(self.length, self.size, iterations, block) for _ in range(self.size)]
        for iteration in range(iterations):
            gradients = [self.gradient(rank, iteration, drift) for rank in range(self.size)]
            mean = np.mean(gradients, axis=0, dtype=np.float32)
            for window, gradient in zip(windows, gradients, strict=True):
                window.add(gradient, mean)
        return windows

    def estimate(self, iterations: int, drift: float = 0.0, block: int = 10) -> NoiseEstimate:
        windows = self.windows(iterations, drift, block)
        rows = np.array([window.row() for window in windows])
        estimates = [window.estimate(rows) for window in windows]
        assert all(one == estimates[0] for one in estimates)
        return estimates[0]


def assert_mean_is(values: list[float], truth: float) -> None:
    """Unbiased: the mean of independent estimates is within SIGMAS of its own standard errors of the truth."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    # Student's t instead of the normal distribution, as the error is itself estimated
    assert abs(np.mean(values) - truth) < float(stats.t.isf(ERROR / 2, len(values) - 1)) * error, (values, truth)
