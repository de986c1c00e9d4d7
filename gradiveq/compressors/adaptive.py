"""Adaptive threshold: every element that is not much smaller than the largest of its tensor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradiveq.arrays.bits import UInt32
from gradiveq.arrays.reductions import largest
from gradiveq.arrays.select import at_least
from gradiveq.compressors.base import Constants, Float32
from gradiveq.compressors.sparse import Sparsifier, positions_bytes


@dataclass(frozen=True)
class Adaptive(Sparsifier):
    """Sends the elements with |multiple·x| >= max|x| as they are.

    What the figures of Dutta et al. 2020 call Adaptive Threshold, as their code has it, with multiple = 2 and without
    error feedback: AdaComp's rule (`gradiveq.compressors.adacomp`) for one bin and no residual. Not sent: a vector of
    zeros, which the rule would send whole.

    The largest element is always sent and each of the others is below max|x|/multiple if not, so that at least
    δ = 1/(1 + (length - 1)/multiple²) of ‖x‖² is.

    Args:
        multiple: at least 1. With 1, only elements of the largest magnitude.
    Raises:
        ValueError: if it is below 1 or not finite.
    Cost on the wire: at most 5 + ceil(length/8) + 4·length bytes, if everything is sent.
    """

    multiple: float = 2.0

    name = "adaptive"
    fixed_size = False

    def __post_init__(self) -> None:
        if not 1 <= self.multiple < np.inf:
            raise ValueError(f"`multiple` must be at least 1, for the largest element to be sent, got {self.multiple}")

    def select(self, values: Float32) -> tuple[UInt32, Float32]:
        most = float(largest(values))
        if most == 0:
            return np.empty(0, np.uint32), np.empty(0, np.float32)
        # The smallest float32 that the rule sends, in float64 so that nothing overflows; a step at most is needed.
        bound = np.float32(most / self.multiple)
        if self.multiple * float(bound) < most:
            bound = np.nextafter(bound, np.float32(np.inf))
        return at_least(values, bound)

    def payload_bytes(self, length: int) -> int:
        return positions_bytes(length, length) + 4 * length

    def constants(self, length: int) -> Constants:
        others = max(0, length - 1) / self.multiple**2
        return Constants(omega=0.0, delta=1 / (1 + others), variance=others / (1 + others))
