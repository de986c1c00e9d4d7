"""What quantisers scale by: norms and the like of a vector, in one pass over memory.

Sums are in float64, where no float32 vector over- or underflows, in 16 lanes whose order is part of the result; so they
are the same bits on every machine, and as fast as memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from gradiveq.arrays.float32 import Float32
from gradiveq.arrays.jit import FLOATS, jit

LANES = 16


@jit(types.float32(FLOATS), cache=True)
def largest(values: Float32) -> Any:
    """max|x|; 0 of an empty vector. NaN if there is a NaN, else infinity if there is one."""
    patterns = values.view(np.int32)  # magnitudes order like these: a maximum that LLVM may take in any order
    most = np.int32(0)
    for i in range(len(patterns)):
        most = max(most, np.int32(patterns[i] & np.int32(0x7FFFFFFF)))
    result = np.empty(1, np.int32)
    result[0] = most
    return result.view(np.float32)[0]


@jit(types.float64(FLOATS), cache=True)
def sum_of_squares(values: Float32) -> Any:
    """‖x‖²"""
    lanes = np.zeros(LANES, np.float64)
    whole = len(values) - len(values) % LANES
    for first in range(0, whole, LANES):
        for lane in range(LANES):
            value = np.float64(values[first + lane])
            lanes[lane] += value * value
    total = lanes.sum()
    for i in range(whole, len(values)):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@jit(types.float64(FLOATS), cache=True)
def sum_of_magnitudes(values: Float32) -> Any:
    """‖x‖₁"""
    lanes = np.zeros(LANES, np.float64)
    whole = len(values) - len(values) % LANES
    for first in range(0, whole, LANES):
        for lane in range(LANES):
            lanes[lane] += abs(np.float64(values[first + lane]))
    total = lanes.sum()
    for i in range(whole, len(values)):
        total += abs(np.float64(values[i]))
    return total


@jit(types.float64(FLOATS), cache=True)
def standard_deviation(values: Float32) -> Any:
    """√(mean (x - mean x)²); exactly 0 of a constant vector, as differences from the first element are added up."""
    if len(values) == 0:
        return 0.0
    lanes, squares = np.zeros(LANES, np.float64), np.zeros(LANES, np.float64)
    origin = np.float64(values[0])
    whole = len(values) - len(values) % LANES
    for first in range(0, whole, LANES):
        for lane in range(LANES):
            difference = np.float64(values[first + lane]) - origin
            lanes[lane] += difference
            squares[lane] += difference * difference
    total, square = lanes.sum(), squares.sum()
    for i in range(whole, len(values)):
        difference = np.float64(values[i]) - origin
        total += difference
        square += difference * difference
    mean = total / len(values)
    return np.sqrt(max(0.0, square / len(values) - mean * mean))
