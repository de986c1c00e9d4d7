"""Top-k: the k elements of largest magnitude, exactly; of equal ones the first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gradiveq.arrays.bits import UInt32
from gradiveq.arrays.select import check_kept, num_kept, top_k
from gradiveq.compressors.base import Constants, Draw, Float32, at_once
from gradiveq.compressors.sparse import (
    HEADER_BYTES,
    Sparsifier,
    decode_positions_tensor,
    encode_positions_tensor,
    form_of,
    positions_bytes,
)
from gradiveq.device import bits


@dataclass(frozen=True)
class TopK(Sparsifier):
    """Sends the k elements of largest magnitude as they are: no k elements leave a smaller error.

    The optimum for a budget of k elements an iteration (Lemma 2 of Sahu et al. 2021), and a δ-contraction with
    δ = k/length (section 4.5 there): what is left is at most 1 - k/length of ‖x‖², as much as of equal elements.

    Args:
        ratio: the fraction of the elements to keep: k = max(1, round(ratio·length)).
        count: k itself, instead of `ratio`; a shorter vector is sent whole.
    Raises:
        ValueError: if a value is out of its range.
    """

    ratio: float = 0.01
    count: int | None = None

    name = "topk"

    def __post_init__(self) -> None:
        check_kept(self.ratio, self.count)

    def select(self, values: Float32) -> tuple[UInt32, Float32]:
        return top_k(values, num_kept(len(values), self.ratio, self.count))

    def payload_bytes(self, length: int) -> int:
        k = num_kept(length, self.ratio, self.count)
        return positions_bytes(length, k) + 4 * k

    def constants(self, length: int) -> Constants:
        if length == 0:
            return Constants(omega=0.0, delta=1.0, variance=0.0, absolute=0.0)
        delta = num_kept(length, self.ratio, self.count) / length
        return Constants(omega=0.0, delta=delta, variance=1 - delta, absolute=0.0 if delta == 1 else None)

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        """Finds the k-th magnitude by `torch.topk`, then takes what is larger and the first ones that are equal: the
        host's elements, whichever of equal ones `torch.topk` would have taken."""
        length, count = len(values), num_kept(len(values), self.ratio, self.count)
        header = [
            torch.full((1,), form_of(length, count), dtype=torch.uint8, device=values.device),
            bits.as_bytes(torch.full((), count, dtype=torch.int32, device=values.device)),
        ]
        if not count:
            return torch.cat(header)
        magnitudes = values.view(torch.int32) & 0x7FFFFFFF
        kth = torch.topk(magnitudes, count, sorted=False).values.amin()
        larger, equal = magnitudes > kth, magnitudes == kth
        chosen = larger | (equal & (equal.cumsum(0) <= count - larger.sum()))
        indices = bits.places(chosen, count)
        return torch.cat([*header, *encode_positions_tensor(chosen, indices), values[indices].view(torch.uint8)])

    def decompress_tensor(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        indices, values = self._decoded(payload, len(out))
        out.zero_()
        out[indices] = values

    def add_tensors(self, payloads: Tensor, total: Tensor) -> None:
        for some in torch.split(payloads, at_once(len(total))):
            for indices, values in zip(*self._decoded(some, len(total)), strict=True):
                total[indices] += values  # of different indices, so no order matters

    def _decoded(self, payloads: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The indices, int64 of shape (..., k), ascending, and the values."""
        count = num_kept(length, self.ratio, self.count)
        stop = positions_bytes(length, count)
        values = bits.cast(payloads[..., stop:], torch.float32)
        if not count:
            return values.long(), values
        return decode_positions_tensor(payloads[..., HEADER_BYTES:stop], length, count), values
