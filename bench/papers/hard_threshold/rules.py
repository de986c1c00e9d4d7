"""The rules by which findings of Sahu et al. 2021 are judged, in words, and how numbers are listed beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Runs = Mapping[str, Mapping[str, Any]]
Record = Mapping[str, Any]

#: Densities within this factor count as the same budget.
SAME_BUDGET = 1.5
#: Percentage points (perplexity: percent) within which two test metrics are the same.
MARGIN = 1.0

INTERVAL = "the 95 % confidence interval of the mean difference over the seeds"
BETTER = (
    f"{INTERVAL} lies above 0 (not confirmed: below {MARGIN:g} points, of perplexity percent; else open, which counts "
    "as not testable)"
)
NOT_WORSE = (
    f"{INTERVAL} lies above -{MARGIN:g} points, of perplexity percent (not confirmed: below 0, its mean -{MARGIN:g})"
)
EACH_SEED = "it is so for every seed"


def short_source(source: str) -> str:
    """What the data are, without what stands in brackets."""
    return source.split(" (")[0] if "(" in source else source


def number_list(values: Sequence[float], form: str = ".2g") -> str:
    return ", ".join(f"{value:{form}}" for value in values)
