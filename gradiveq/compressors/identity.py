"""No compression, as one compressor among others: for layers that are to be left alone, and as the baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32


@dataclass(frozen=True)
class Identity(Compressor):
    """Sends every element as it is."""

    name = "identity"
    collective = "all_reduce"
    biased = False
    copies = True

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        return values.copy()

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        if len(payload) != len(out):  # one alone would be copied to all of them
            raise ValueError(f"{len(out)} elements are sent as they are, got {len(payload)}")
        out[:] = payload

    def payload_bytes(self, length: int) -> int:
        return 4 * length

    def constants(self, length: int) -> Constants:
        return Constants(omega=0.0, delta=1.0, variance=0.0, absolute=0.0)

    def compress_tensor(self, values: Tensor, draw: Draw) -> Tensor:
        return values

    def decompress_tensor(self, payload: Tensor, out: Tensor, draw: Draw) -> None:
        out.copy_(payload)
