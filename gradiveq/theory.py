"""What theory says of compressors applied layer by layer, and what is measured, side by side.

Dutta et al. 2020 compare two granularities: a compressor for each layer, or one for the entire model. Their bounds are
functions of each layer's Ω (`Constants.omega`); `measure` finds the errors themselves, at either granularity, for one
vector. Sums over layers here are what makes the difference: a bound for the entire model takes the worst layer's
constant for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gradiveq.compressors.base import Constants, Draw, Float32
from gradiveq.exchange.parts import Part


class Lemma1(NamedTuple):
    """The two bounds on E‖Q(x)‖² of Eq. 7; the first is never above the second.

    Attributes:
        layer_wise: Σ_j (1 + Ω_j)‖x^j‖².
        entire_model: max_j (1 + Ω_j)·‖x‖².
    """

    layer_wise: float
    entire_model: float


def lemma1(constants: Sequence[Constants], squared_norms: Sequence[float]) -> Lemma1:
    """Lemma 1 of Dutta et al. for layers with these constants.

    Args:
        constants: of each layer's compressor, at the layer's length.
        squared_norms: ‖x^j‖² of each layer.
    Raises:
        ValueError: a layer without an Ω.
    """
    factors = _factors(constants)
    layer_wise = sum(factor * norm for factor, norm in zip(factors, squared_norms, strict=True))
    return Lemma1(layer_wise, max(factors, default=1.0) * sum(squared_norms))


class Noise(NamedTuple):
    """What the error of bidirectional compression is proportional to (end of section 4).

    Attributes:
        layer_wise: Trace(A) = Σ_j (1 + Ω_M^j)(1 + Ω_W^j), as the paper counts it: each layer once, whatever its length.
        entire_model: L·max_j (1 + Ω_M^j)(1 + Ω_W^j).
    """

    layer_wise: float
    entire_model: float


def noise(worker: Sequence[Constants], master: Sequence[Constants] | None = None) -> Noise:
    """The noise terms of Algorithm 1 with Q_W at the workers and Q_M at the master.

    Args:
        worker, master: of each layer's compressor. None for a master that doesn't compress (Ω = 0; an all-reduce).
    Raises:
        ValueError: a layer without an Ω.
    """
    factors = _factors(worker)
    if master is not None:
        factors = [own * other for own, other in zip(factors, _factors(master), strict=True)]
    return Noise(sum(factors), len(factors) * max(factors, default=0.0))


def error_bound(constants: Sequence[Constants], squared_norms: Sequence[float]) -> float | None:
    """The least that theory promises for E‖x - Q(x)‖²: the sum over the layers of their relative or absolute bounds.

    Eq. 7 and 9 of Sahu et al. 2021, whichever is smaller for a layer.

    Returns:
        None if there is neither for some layer.
    """
    total = 0.0
    for layer, norm in zip(constants, squared_norms, strict=True):
        bounds = [] if layer.variance is None else [layer.variance * norm]
        if layer.absolute is not None:
            bounds.append(layer.absolute)
        if not bounds:
            return None
        total += min(bounds)
    return total


@dataclass(frozen=True)
class Measured:
    """What was measured of one vector, compressed a number of times with other random numbers.

    Attributes:
        norm: ‖x‖².
        second_moments: ‖Q(x)‖² of each time; float64.
        errors: ‖x - Q(x)‖² of each time; float64.
        num_sent: elements sent the last time.
    """

    norm: float
    second_moments: npt.NDArray[np.float64]
    errors: npt.NDArray[np.float64]
    num_sent: int

    @property
    def second_moment(self) -> float:
        """The estimate of E‖Q(x)‖²."""
        return float(self.second_moments.mean())

    @property
    def error(self) -> float:
        """The estimate of E‖x - Q(x)‖²."""
        return float(self.errors.mean())

    @property
    def relative_error(self) -> float:
        """error / norm; 0 of a zero vector."""
        return self.error / self.norm if self.norm else 0.0


def squared_norm(vector: Float32) -> float:
    """‖x‖² in float64."""
    exact = vector.astype(np.float64)
    return float(exact @ exact)


def measure(parts: Sequence[Part], vector: Float32, times: int = 1, seed: int = 0) -> Measured:
    """Compress a vector part by part and compare.

    Args:
        parts: the layers, or one part for the entire model; as `gradiveq.exchange.compressed.Compression` takes them.
        vector: finite float32 of shape (length,). Not modified.
        times: how often, each with its own random numbers; 1 is enough if there are none.
        seed: of the random numbers.
    Cost: `times` compressions and decompressions; no communication. Memory: three vectors of float64.
    """
    exact = vector.astype(np.float64)
    estimate = np.empty_like(vector)
    second_moments, errors = np.empty(times), np.empty(times)
    num_sent = 0
    for time in range(times):
        num_sent = 0
        for index, part in enumerate(parts):
            compressor, draw = part.compressor, Draw(seed, time, 0, index)
            values = vector[part.start : part.stop]
            payload = compressor.compress(values, draw, values if compressor.uses_latest else None)
            compressor.decompress(payload, estimate[part.start : part.stop], draw)
            num_sent += compressor.num_sent(payload, part.length)
        found = estimate.astype(np.float64)
        second_moments[time] = found @ found
        found -= exact
        errors[time] = found @ found
    return Measured(float(exact @ exact), second_moments, errors, num_sent)


def _factors(constants: Sequence[Constants]) -> list[float]:
    """1 + Ω_j of each layer."""
    factors = []
    for index, layer in enumerate(constants):
        if layer.omega is None:
            raise ValueError(
                f"layer {index} has no Ω: its compressor doesn't satisfy Assumption 5 of Dutta et al. 2020"
            )
        factors.append(1 + layer.omega)
    return factors
