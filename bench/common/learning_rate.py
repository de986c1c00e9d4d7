"""The learning rate that rises and falls linearly."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def rise_and_fall(lr: float, warmup: float, iterations: int) -> Callable[[int], float]:
    """From 0 to lr in the share `warmup` of the run, then linearly to 0 (section 5.2 of Dutta et al. 2020).

    As in the authors' code, the first step is 1 / iterations up the slope, not at 0.
    """
    knots = [0, warmup * iterations, iterations]

    def rate(iteration: int) -> float:
        return float(np.interp(iteration + 1, knots, [0, lr, 0]))

    return rate
