"""What many measurements come to: means with deviations, quartiles, paired differences, errors of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt
from typing import Literal, NamedTuple

import numpy as np
from scipy import stats

from ring.fit import quartiles

#: The probability of the intervals.
CONFIDENCE = 0.95
#: Pairs below which a difference has no interval.
LEAST_PAIRS = 3

Relation = Literal["better", "same", "not worse"]


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and the sample standard deviation (0 of a single value)."""
    mean = sum(values) / len(values)
    if len(values) == 1:
        return mean, 0.0
    return mean, (sum((value - mean) ** 2 for value in values) / (len(values) - 1)) ** 0.5


def spread_text(values: Sequence[float], form: str = ".2f") -> str:
    """ "93.10 ± 0.21", or the value alone if there is one."""
    mean, spread = mean_and_spread(values)
    return f"{mean:{form}}" + (f" ± {spread:{form}}" if len(values) > 1 else "")


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(values))))


def mean_error(errors: Sequence[float]) -> float:
    """Geometric mean of how far off predictions are, as a factor, less 1: exp(mean |log(predicted / measured)|) - 1.

    Args:
        errors: predicted / measured - 1, each.
    """
    return float(np.expm1(np.mean(np.abs(np.log1p(np.asarray(errors)))))) if errors else 0.0


class Quartiles(NamedTuple):
    """The median of some measurements, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float] | np.ndarray) -> Quartiles:
        low, median, high = quartiles(np.asarray(values))
        return cls(median, low, high)

    def text(self, form: str = ".2f") -> str:
        """ "1.02 (0.98-1.07)"."""
        return f"{self.median:{form}} ({self.low:{form}}-{self.high:{form}})"


def half_range_text(cell: Mapping[str, float], digits: int) -> str:
    """ "102 ± 3": the median, and half the distance between the quartiles.

    Args:
        cell: "median", "low" and "high", as a record has them.
    """
    return f"{cell['median']:,.{digits}f} ± {(cell['high'] - cell['low']) / 2:,.{digits}f}"


class Difference(NamedTuple):
    """The mean difference of pairs, and its confidence interval.

    Attributes:
        mean: the mean of the differences.
        half_width: half the width of the interval; infinite below `LEAST_PAIRS` pairs.
    """

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width

    def text(self) -> str:
        """ "+1.20 ± 0.34", or the mean alone where there is no interval."""
        spread = f" ± {self.half_width:.2f}" if self.half_width < float("inf") else ""
        return f"{self.mean:+.2f}{spread}"


def paired(first: Sequence[float], second: Sequence[float]) -> Difference:
    """first - second, pair by pair, with an interval by Student's t."""
    mean, spread = mean_and_spread([a - b for a, b in zip(first, second, strict=True)])
    if len(first) < LEAST_PAIRS:
        return Difference(mean, float("inf"))
    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(first) - 1))
    return Difference(mean, quantile * spread / sqrt(len(first)))


def holds(relation: Relation, difference: Difference, margin: float) -> bool | None:
    """Whether the first of two is "better" than (the "same" as, "not worse" than) the second; None if it is open.

    Better: the interval lies above 0; refuted where it ends below the margin or 0.
    Not worse: it lies above -margin; refuted where it lies below 0 and its mean below -margin.
    The same: it lies within ±margin; refuted where it excludes 0 and its mean is beyond ±margin.
    """
    low, high = difference.low, difference.high
    if relation == "better":
        return True if low > 0 else False if high < margin or high <= 0 else None
    if relation == "not worse":
        return True if low > -margin else False if high < 0 and difference.mean < -margin else None
    if -margin < low and high < margin:
        return True
    return False if (low > 0 or high < 0) and abs(difference.mean) > margin else None
