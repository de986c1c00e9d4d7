"""signSGD: one bit an element.

With p = sign(x) of each worker's vector, training uses

    rule        an estimate           the result                         source
    "vote"      sign(x)               sign(Σ_workers sign(x))            Bernstein et al. 2018, majority vote
    "mean"      sign(x)               the mean of the signs
    "scaled"    (‖x‖₁/d)·sign(x)      the mean of the estimates          EF-signSGD, Karimireddy et al. 2019

**Zero.** There is no third value in a bit: sign(0) = 1, of both zeros. The vote of an even number of workers may be a
tie, whose sign is 0: no step. Elements that are zero on all workers (a frozen layer, a masked one) thus count as
positive; with "scaled" the scale makes up for it if all of a layer is.

"vote" and "mean" return numbers of magnitude 1 whatever the gradient's, so they take a learning rate of their own, and
with error feedback only "scaled" is sound: the memory of the others is in units of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from gradiveq.arrays.reductions import sum_of_magnitudes
from gradiveq.arrays.signs import pack_signs, unpack_signs
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32
from gradiveq.device import bits

Rule = Literal["vote", "mean", "scaled"]
RULES: tuple[Rule, ...] = ("vote", "mean", "scaled")


@dataclass(frozen=True)
class Sign(Compressor):
    """The sign of each element, in a bit; with rule "scaled" four bytes more, the scale (float32), before them.

    Args:
        rule: what the signs become; see the module.
    Raises:
        ValueError: a rule that isn't one.
    """

    rule: Rule = "vote"

    name = "sign"
    collective = "all_gather"
    biased = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"`rule` must be one of {', '.join(RULES)}, got {self.rule!r}")

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        signs = pack_signs(values)
        if self.rule != "scaled" or not len(values):
            return signs
        scale = np.array([sum_of_magnitudes(values) / len(values)], np.float32)
        return np.concatenate([scale.view(np.uint8), signs])

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        if len(payload) != self.payload_bytes(len(out)):
            raise ValueError(f"{len(out)} elements take {self.payload_bytes(len(out))} bytes, got {len(payload)}")
        header = self._header(len(out))
        scale = payload[:header].copy().view(np.float32)[0] if header else np.float32(1)
        unpack_signs(payload[header:], scale, out)

    def payload_bytes(self, length: int) -> int:
        return self._header(length) + -(-length // 8)

    def constants(self, length: int) -> Constants:
        """Ω = 0 and δ = 1/d for "scaled" (Karimireddy et al. 2019, section 3); the others have none.

        ‖C(x)‖² = ‖x‖₁²/d and ‖x - C(x)‖² = ‖x‖² - ‖x‖₁²/d, where ‖x‖² <= ‖x‖₁² <= d‖x‖². A vector of ±1 is of length √d
        however short x is.
        """
        if self.rule != "scaled":
            return Constants()
        delta = 1 / max(1, length)
        return Constants(omega=0.0, delta=delta, variance=1 - delta)

    def finish(self, total: Float32, size: int) -> None:
        if self.rule == "vote":
            np.sign(total, out=total)
        else:
            super().finish(total, size)

    def _header(self, length: int) -> int:
        return 4 if self.rule == "scaled" and length else 0

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        """The scale may be the float32 beside the host's: its sum is in the device's order (`gradiveq.device`)."""
        signs = bits.pack_bits(values < 0)
        if self.rule != "scaled" or not len(values):
            return signs
        scale = (values.abs().sum(dtype=torch.float64) / len(values)).float()
        return torch.cat([bits.as_bytes(scale), signs])

    def estimates(self, payloads: Tensor, length: int) -> Tensor:
        header = payloads.shape[-1] - -(-length // 8)
        magnitude = bits.cast(payloads[..., :4], torch.float32) if header else payloads.new_ones(1, dtype=torch.float32)
        return torch.where(bits.unpack_bits(payloads[..., header:], length), -magnitude, magnitude)

    def finish_tensor(self, total: Tensor, size: int) -> None:
        if self.rule == "vote":
            total.sign_()
        else:
            super().finish_tensor(total, size)
