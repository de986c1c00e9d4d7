"""PowerSGD (Vogels, Karimireddy and Jaggi 2019), its hyper-parameters; `gradiveq.exchange.lowrank` carries it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gradiveq.compressors.base import Constants
from gradiveq.flatten import matrix_shape


@dataclass(frozen=True)
class PowerSGD:
    """Low-rank gradients of every layer that is a matrix.

    Attributes:
        rank: r, of the product; at most that of the layer's matrix.
        error_feedback: whether each worker adds what was left out to its next gradient.
        warm_start: keep Q from call to call; False draws a new one for each.
        min_compression_rate: a layer goes uncompressed unless n·m > min_compression_rate·(n + m)·r. In PyTorch's
            hook that is 2; with 0 every matrix is compressed, at full rank too.
    Raises:
        ValueError: a value is out of its range.
    """

    rank: int = 4
    error_feedback: bool = True
    warm_start: bool = True
    min_compression_rate: float = 1.0

    name: ClassVar[str] = "powersgd"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise ValueError(f"`rank` must be a whole number of at least 1, got {self.rank!r}")
        if not 0 <= self.min_compression_rate < float("inf"):
            raise ValueError(f"`min_compression_rate` must be at least 0, got {self.min_compression_rate}")

    def rank_of(self, shape: Sequence[int]) -> int | None:
        """r of a parameter of this shape, or None if it goes uncompressed."""
        if len(shape) < 2 or 0 in shape:
            return None
        rows, columns = matrix_shape(shape)
        rank = min(self.rank, rows, columns)
        return rank if rows * columns > self.min_compression_rate * (rows + columns) * rank else None

    def payload_bytes(self, shape: Sequence[int]) -> int:
        """Bytes that a parameter of this shape takes on the wire, P and Q together."""
        rank = self.rank_of(shape)
        return 4 * (int(np.prod(shape)) if rank is None else sum(matrix_shape(shape)) * rank)

    def constants(self, shape: Sequence[int]) -> Constants:
        """What is known of C(x) = P Pᵀx, a projection, so that ‖C(x)‖² + ‖x - C(x)‖² = ‖x‖² within rounding.

        Without a warm start, Q is Gaussian and independent of x. Let x be the mean gradient, whose P this is, of
        singular values σ_1 >= ... >= σ_s, s = min(n, m). Then E‖C(x)‖² = Σ σ_i²·h_i, where h_i, how much of singular
        direction i is within the column space of P, sums to r and on average does not fall with σ_i. By Chebyshev's
        sum inequality E‖C(x)‖² >= r/s·‖x‖²: a δ-contraction with δ = r/s. (Equal singular values attain it.)

        With a warm start Q depends on the gradients before, which may be orthogonal to this one: nothing better than
        ‖x - C(x)‖² <= ‖x‖² holds. The same is true of one worker's own gradient among others. The paper proves no
        constant either.
        """
        rank = self.rank_of(shape)
        if rank is None:
            return Constants(omega=0.0, delta=1.0, variance=0.0, absolute=0.0)
        if self.warm_start:
            return Constants(omega=0.0, variance=1.0)
        delta = rank / min(matrix_shape(shape))
        return Constants(omega=0.0, delta=delta, variance=1 - delta)
