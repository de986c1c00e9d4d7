"""AdaComp (Chen et al. 2018): the large elements of each bin, by what they are and by what they have just become."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from gradiveq.arrays.bits import UInt32, pack, packed_bytes, unpack
from gradiveq.arrays.jit import FLOATS, jit
from gradiveq.compressors.base import Array, Compressor, Constants, Draw, Float32
from gradiveq.compressors.sparse import add, decode_count, decode_positions, encode_positions, positions_bytes, put

_SCALE_BYTES = 4


@dataclass(frozen=True)
class AdaComp(Compressor):
    """Sends sign times scale of the elements that are as large as the largest of their bin, or are about to be.

    With G = residual + latest gradient, of which each bin of `bin_size` elements has the maximum g = max|G| (the
    paper's pack(), Algorithm 2):

        sent   where |H| >= g of its bin, H = G + latest gradient (the paper's scale factor 2)
        as     sign(G)·scale, scale = the mean of g over all bins

    The residual is G - C(G). So it is itself only with error feedback, which is where the residual comes from; without,
    G is the latest gradient and an element is sent from half its bin's maximum on. Not sent, as it would decode to the
    same: elements with G = 0.

    ‖x - C(x)‖² <= (1 + length/bins)·‖x‖², as no (|x| - scale)² is above x² + scale² and bins·scale² <= ‖x‖². No
    contraction: what is small in a large bin next to many empty ones may grow.

    Args:
        bin_size: the paper's L_T, which it sets to 50 for convolutions and to 500 for fully connected and recurrent
            layers.
    Raises:
        ValueError: if it is below 1.
    Cost on the wire: 2 to 3 bits + log2(length/count) of each sent element's index (`gradiveq.compressors.sparse`), a
    sign bit each, and a header with the scale. (The paper counts 8 bits an element for bins below 64 elements.)
    """

    bin_size: int = 50

    name = "adacomp"
    collective = "all_gather"
    biased = True
    fixed_size = False
    uses_latest = True

    def __post_init__(self) -> None:
        if self.bin_size < 1:
            raise ValueError(f"`bin_size`, in elements, must be at least 1, got {self.bin_size}")

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        indices, maxima = np.empty(len(values), np.uint32), np.empty(self._bins(len(values)), np.int32)
        found = _select(values, values if latest is None else latest, self.bin_size, indices, maxima)
        indices = indices[:found]
        scale = np.array([maxima.view(np.float32).mean(dtype=np.float64) if len(maxima) else 0], np.float32)
        positions = encode_positions(indices, len(values))
        signs = pack(np.signbit(values.take(indices)).astype(np.uint32), 1)
        return np.concatenate([scale.view(np.uint8), positions, signs])

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        indices, values = _decode(payload, len(out))
        out.fill(0)
        put(indices, values, out)

    def payload_bytes(self, length: int) -> int:
        return _SCALE_BYTES + positions_bytes(length, length) + packed_bytes(length, 1)

    def num_sent(self, payload: Array, length: int) -> int:
        return decode_count(payload[_SCALE_BYTES:], length)

    def add_to(self, payload: Array, total: Float32, draw: Draw, scratch: Float32) -> None:
        indices, values = _decode(payload, len(total))
        add(indices, values, total)

    def constants(self, length: int) -> Constants:
        if length == 0:
            return Constants(omega=0.0, delta=1.0, variance=0.0, absolute=0.0)
        share = length / self._bins(length)
        return Constants(omega=share - 1, variance=1 + share)

    def _bins(self, length: int) -> int:
        return -(-length // self.bin_size)


def _decode(payload: Array, length: int) -> tuple[UInt32, Float32]:
    """Which elements were sent, and as what."""
    if len(payload) < _SCALE_BYTES:
        raise ValueError(f"a payload of AdaComp begins with {_SCALE_BYTES} bytes of scale, got {len(payload)}")
    scale = payload[:_SCALE_BYTES].view(np.float32)[0]
    indices, signs = decode_positions(payload[_SCALE_BYTES:], length)
    negative = unpack(signs, 1, len(indices)).astype(bool)
    return indices, np.where(negative, -scale, scale)


@jit(types.int64(FLOATS, FLOATS, types.int64, types.uint32[::1], types.int32[::1]), cache=True)
def _select(values: Any, latest: Any, bin_size: int, indices: Any, maxima: Any) -> Any:
    """Write the indices of what is sent and the bins' maxima, as bit patterns, and return how many are sent."""
    found = np.uint64(0)
    changed = np.empty(bin_size, np.float32)
    magnitude = np.int32(0x7FFFFFFF)
    for index in range(len(maxima)):
        start = index * bin_size
        bin_values, bin_latest = values[start : start + bin_size], latest[start : start + bin_size]
        patterns, h = bin_values.view(np.int32), changed[: len(bin_values)]
        largest = np.int32(0)
        for i in range(len(patterns)):  # magnitudes order like their patterns, and a maximum of those is vector code
            largest = max(largest, np.int32(patterns[i] & magnitude))
            h[i] = bin_values[i] + bin_latest[i]
        maxima[index] = largest
        h_patterns = h.view(np.int32)
        for i in range(len(patterns)):
            indices[found] = np.uint32(start + i)
            found += np.uint64(((h_patterns[i] & magnitude) >= largest) & (patterns[i] & magnitude != 0))
    return np.int64(found)
