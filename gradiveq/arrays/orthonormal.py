"""Orthonormal columns, the same bits on every rank: loops with a fixed order of float64 additions.

A library's QR decomposition may differ in the last bits by threads, alignment or processor.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from gradiveq.arrays.float32 import Float32
from gradiveq.arrays.jit import jit

#: What is left of a column of norm 1 without the columns before it, below which it counts as dependent on them.
DEPENDENT = 1e-10


def orthonormalise(matrix: Float32) -> None:
    """Replace the columns by orthonormal ones that span at least their space, in place.

    Gram-Schmidt in float64, each column twice against those before it, which leaves rounding errors only. A column
    that depends on those before it is replaced by the unit vector farthest from their span, so that a power iteration
    that has lost a direction finds another.

    Args:
        matrix: contiguous float32 of shape (rows, columns) with columns <= rows, finite.
    Cost: 4·rows·columns² flops in a fixed order, so the same bits on every IEEE machine.
    """
    work = np.ascontiguousarray(matrix.T, np.float64)
    _orthonormalise_rows(work)
    matrix[:] = work.T


@jit(cache=True)
def _orthonormalise_rows(work: npt.NDArray[np.float64]) -> None:
    """The rows of `work`, one after the other. No fast-math: additions stay in order, nothing is fused."""
    num, length = work.shape
    for j in range(num):
        row = work[j]
        left = 0.0
        if _normalise(row) > 0.0:
            _project(work, j)
            left = _normalise(row)
        if left < DEPENDENT:
            best, least = 0, np.inf
            for i in range(length):
                covered = 0.0
                for other in range(j):
                    covered += work[other, i] * work[other, i]
                if covered < least:
                    best, least = i, covered
            row[:] = 0.0
            row[best] = 1.0
            _project(work, j)
            _normalise(row)
        _project(work, j)
        _normalise(row)


@jit(cache=True)
def _project(work: npt.NDArray[np.float64], j: int) -> None:
    """Take what the rows before it span out of row j."""
    length = work.shape[1]
    for other in range(j):
        along = 0.0
        for i in range(length):
            along += work[other, i] * work[j, i]
        for i in range(length):
            work[j, i] -= along * work[other, i]


@jit(cache=True)
def _normalise(row: npt.NDArray[np.float64]) -> float:
    """Divide by the norm unless it is 0, and return it."""
    total = 0.0
    for i in range(len(row)):
        total += row[i] * row[i]
    norm = np.sqrt(total)
    if norm > 0.0:
        for i in range(len(row)):
            row[i] /= norm
    return float(norm)
