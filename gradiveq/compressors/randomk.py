"""Random k: k elements chosen by lot, the same ones on every worker."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gradiveq.arrays.float32 import LARGEST
from gradiveq.arrays.select import check_kept, num_kept
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32
from gradiveq.device.bits import copied


@dataclass(frozen=True)
class RandomK(Compressor):
    """Sends k elements that are drawn uniformly, anew in every call.

    All workers draw the same ones from the run's seed, so that no indices are sent and the values may be added in the
    ring. As they are, E‖x - C(x)‖² = (1 - k/length)·‖x‖²: biased, a δ-contraction with δ = k/length, made for error
    feedback. Times length/k, E[C(x)] = x and E‖x - C(x)‖² = (length/k - 1)·‖x‖².

    Args:
        ratio: the fraction of the elements to keep: k = max(1, round(ratio·length)).
        count: k itself, instead of `ratio`; a shorter vector is sent whole.
        unbiased: rescale by length/k.
    Raises:
        ValueError: if a value is out of its range.
    What rescaling takes beyond float32 is sent as the largest float32.
    Cost: `length` bytes of memory for a moment; about k random numbers.
    """

    ratio: float = 0.01
    count: int | None = None
    unbiased: bool = False

    name = "randomk"
    collective = "all_reduce"
    biased = True
    copies = True

    def __post_init__(self) -> None:
        check_kept(self.ratio, self.count)
        if self.unbiased:  # these two depend on it; on the class they say what the default does
            object.__setattr__(self, "biased", False)
            object.__setattr__(self, "copies", False)

    def indices(self, length: int, draw: Draw) -> npt.NDArray[np.intp]:
        """Which elements are sent: ascending, the same on every rank.

        A draw of k numbers hits fewer than k different elements, so the missing ones are drawn again and again; every
        set of k is as likely, as nothing distinguishes one element from another. If k is more than half of the vector,
        those that are not sent are drawn.
        """
        k = num_kept(length, self.ratio, self.count)
        rare = min(k, length - k)
        generator = draw.generator(shared=True)
        chosen = np.zeros(length, bool)
        while missing := rare - np.count_nonzero(chosen):
            chosen[generator.integers(0, length, missing)] = True
        return np.flatnonzero(chosen if rare == k else ~chosen)

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        sent = values[self.indices(len(values), draw)]
        if self.unbiased and len(sent):
            scaled = sent.astype(np.float64) * (len(values) / len(sent))
            sent = np.clip(scaled, -LARGEST, LARGEST).astype(np.float32)
        return sent

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        indices = self.indices(len(out), draw)
        if len(payload) != len(indices):  # one alone would be copied to all of them
            raise ValueError(f"{len(indices)} of {len(out)} elements are sent, got {len(payload)}")
        out.fill(0)
        out[indices] = payload

    def payload_bytes(self, length: int) -> int:
        return 4 * num_kept(length, self.ratio, self.count)

    def num_sent(self, payload: Array, length: int) -> int:
        return len(payload)

    def constants(self, length: int) -> Constants:
        if length == 0:
            return Constants(omega=0.0, delta=1.0, variance=0.0, absolute=0.0)
        kept = num_kept(length, self.ratio, self.count) / length
        variance = 1 / kept - 1 if self.unbiased else 1 - kept
        return Constants(
            omega=variance if self.unbiased else 0.0,
            delta=1 - variance if variance < 1 else None,
            variance=variance,
            absolute=0.0 if kept == 1 else None,
        )

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        """Indices are drawn on the host, in a loop whose length depends on what it draws, and copied to the device."""
        sent = values[copied(self.indices(len(values), draw), values.device)]
        if self.unbiased and len(sent):
            return (sent.double() * (len(values) / len(sent))).clamp_(-LARGEST, LARGEST).float()
        return sent

    def decompress_tensor(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        out.zero_()
        out[copied(self.indices(len(out), draw), out.device)] = payload
