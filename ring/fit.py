"""Straight lines through timings, by relative errors: how calibration makes few numbers of many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Samples = Sequence[float] | Floats

#: Relative error from which on a fit is said to miss.
LARGE_ERROR = 0.2
#: Relative error up to which points are weighted by least squares; beyond it by absolute errors (Huber's loss).
SMALL_ERROR = 0.05


class Line(NamedTuple):
    """The line intercept + slope * x."""

    intercept: float
    slope: float

    def at(self, x: npt.ArrayLike) -> Floats:
        return self.intercept + self.slope * np.asarray(x, np.float64)


def fit_line(x: npt.ArrayLike, y: npt.ArrayLike, *, through_origin: bool = False) -> Line:
    """The line with the least Huber loss of its relative errors, neither part negative.

    Relative, because timings span six powers of ten and each size counts the same; Huber's, because a protocol that
    changes at some size must not bend the line everywhere else. Solved by least squares with weights, repeated.

    Args:
        x, y: the points, of the same number; y > 0.
        through_origin: whether the intercept is 0.
    Raises:
        ValueError: fewer points than unknowns, or a y that is not positive and finite.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    unknowns = 1 if through_origin else 2
    if x.shape != y.shape or x.ndim != 1 or len(np.unique(x[x != 0] if through_origin else x)) < unknowns:
        raise ValueError(f"a line needs {unknowns} different x and a y for each, got {x} and {y}")
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise ValueError(f"timings must be positive and finite, got {y}")
    weights = np.ones(len(y))
    line = Line(0.0, 0.0)
    for _ in range(100):
        before, line = line, _least_squares(x, y, weights / y**2, through_origin)
        error = np.abs(relative_errors(y, line.at(x)))
        weights = SMALL_ERROR / np.maximum(error, SMALL_ERROR)
        if np.allclose(before, line, rtol=1e-6, atol=0):
            break
    return line


def _least_squares(x: Floats, y: Floats, weights: Floats, through_origin: bool) -> Line:
    """The line with the least sum of weights * (y - line)², both parts at least 0."""

    def slope_only() -> Line:
        return Line(0.0, float((weights * x * y).sum() / (weights * x * x).sum()))

    if through_origin:
        return slope_only()
    mean_x, mean_y = np.average(x, weights=weights), np.average(y, weights=weights)
    spread = (weights * (x - mean_x) ** 2).sum()
    slope = float((weights * (x - mean_x) * (y - mean_y)).sum() / spread)
    if slope < 0:
        return Line(float(mean_y), 0.0)
    intercept = float(mean_y - slope * mean_x)
    return Line(intercept, slope) if intercept >= 0 else slope_only()


def relative_errors(measured: npt.ArrayLike, fitted: npt.ArrayLike) -> Floats:
    """Relative errors of a fit: (fitted - measured) / measured."""
    measured = np.asarray(measured, np.float64)
    errors: Floats = (np.asarray(fitted, np.float64) - measured) / measured
    return errors


def flag(error: float) -> str:
    """The mark behind a relative error in a table; empty if the error is small."""
    return "  <- misses" if abs(error) > LARGE_ERROR else ""


def quartiles(samples: Samples) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, median, high = np.percentile(samples, (25, 50, 75))
    return float(low), float(median), float(high)


def rounded(value: float, digits: int = 4) -> float:
    """The value to so many significant digits, as many as a measurement deserves in a file."""
    return float(f"{value:.{digits}g}")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Text of a table: columns are aligned to the right, and notes stand behind the last."""
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
    lines = ["  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=False)) for row in (head, *rows)]
    notes = [row[len(head)] if len(row) > len(head) else "" for row in (head, *rows)]
    return "\n".join((line + note).rstrip() for line, note in zip(lines, notes, strict=True))
