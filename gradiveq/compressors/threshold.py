"""Hard-threshold, which the layer-wise paper calls threshold-v: every element that is large enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gradiveq.arrays.bits import UInt32
from gradiveq.arrays.float32 import LARGEST
from gradiveq.arrays.select import at_least
from gradiveq.compressors.base import Constants, Float32
from gradiveq.compressors.sparse import Sparsifier, positions_bytes


@dataclass(frozen=True)
class Threshold(Sparsifier):
    """Sends the elements with |x| >= λ as they are, however many.

    The optimum for a budget over all of the training (Lemma 3 of Sahu et al. 2021). Not a contraction, as all of a
    small vector stays behind, but an absolute compressor: ‖x - C(x)‖² <= length·λ² (section 5 there). It is the same
    compressor layer by layer and on the entire model.

    Args:
        value: λ, in the units of what is compressed; compared in float32. 0 sends everything.
    Raises:
        ValueError: if it is negative or beyond float32.
    Cost on the wire: at most 5 + ceil(length/8) + 4·length bytes, if everything is sent.
    """

    value: float = 0.01

    name = "threshold"
    fixed_size = False

    def __post_init__(self) -> None:
        if not 0 <= self.value <= LARGEST:
            raise ValueError(f"`value` must be in [0, {LARGEST:.4g}], float32's largest, got {self.value}")

    def select(self, values: Float32) -> tuple[UInt32, Float32]:
        return at_least(values, np.float32(self.value))

    def payload_bytes(self, length: int) -> int:
        return positions_bytes(length, length) + 4 * length

    def constants(self, length: int) -> Constants:
        return Constants(omega=0.0, variance=1.0, absolute=length * self.value**2)
