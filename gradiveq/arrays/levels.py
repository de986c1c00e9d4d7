"""Stochastic quantisation to levels of a norm (Alistarh et al. 2017): settings, and the variance that it adds."""

from __future__ import annotations

from math import sqrt
from typing import Literal

Norm = Literal["max", "l2"]

_BITS = (2, 4, 8)


def level_variance(levels: int, bucket: int, norm: Norm) -> float:
    """The Ω of E‖Q(x) - x‖² ≤ Ω‖x‖² with s levels beside the sign. It is attained, except by "l2" with bucket < 4s².

    An element at y levels (y = s·|x|/m) has the variance f(1 - f) levels², f the fraction of y. That is at most
    y(1 - y) for y ≤ 1/2 and 1/4 beyond, which is concave in y²: elements of equal magnitude are the worst case.

    * "l2": Σy² = s², so y = s/√n, or 1/2 for so many elements that have room if s/√n exceeds it:
      Ω = √n/s - 1 for n ≥ 4s², n/4s² otherwise (the paper's bound is min(n/s², √n/s)).
    * "max": one element is exact with y = s, the others have y: Ω = max (n-1)·y(1-y) / (s² + (n-1)·y²)
      = (√(1 + (n-1)/s²) - 1) / 2.
    """
    if norm == "max":
        return (sqrt(1 + (bucket - 1) / levels**2) - 1) / 2
    return sqrt(bucket) / levels - 1 if bucket >= 4 * levels**2 else bucket / (4 * levels**2)


def check_format(bits: int, bucket: int, norm: str) -> None:
    """Refuse settings of QSGD in the ring that are out of their range.

    Raises:
        ValueError: one is.
    """
    if bits not in _BITS:
        raise ValueError(f"`bits` must be one of {_BITS}, so that codes fill whole bytes, got {bits}")
    if not 1 <= bucket < 2**31:
        raise ValueError(f"`bucket` must be in [1, 2^31), got {bucket}")
    if norm not in ("max", "l2"):
        raise ValueError(f"`norm` must be 'max' or 'l2', got {norm!r}")
