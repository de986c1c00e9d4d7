"""Some elements of a vector on the wire: which ones, and what they are.

    byte 0         how the positions are written: 0 "gaps", 1 "bitmap"
    bytes 1 - 4    count, uint32
    positions      of an ascending sequence of `count` indices below `length`; nothing if count = 0
    values         count·4 bytes, float32, as they are

**Positions.** An index alone takes log2(length) bits. Ascending ones take fewer: "gaps" is the code of Elias (1974) and
Fano (1971), of which each index takes 2 to 3 bits + log2(length/count): 9 instead of 24 of an index of 1% of 10 M
elements. Its size depends on length and count alone, so a fixed count has a fixed size. With
b = max(0, floor(log2(length/count))):

    * the lowest b bits of each index, packed (`gradiveq.arrays.bits`): ceil(count·b/8) bytes
    * of the rest, index >> b, which is ascending and at most h = (length - 1) >> b: bits of which number
      (index_i >> b) + i is set for i = 0, 1, ...: ceil((h + count)/8) bytes

"bitmap" is a bit for each element of the vector, ceil(length/8) bytes. Whatever is shorter is used, which is the bitmap
from about one element in four on. Bits begin with the lowest of a byte; numbers are little-endian.

**When a sum in the ring would send less.** Sparse payloads travel by an all-gather: each of N workers sends N - 1
payloads of k elements. In a ring all-reduce each hop would send the sum of what it has so far, one N-th of the vector:
first u_1 = k elements per N-th, u_s in the union of s workers' choices after s hops, at last u_N to everybody. So it
sends fewer elements if

    u_1 + u_2 + ... + u_(N-1) + (N - 1)·u_N  <  N·(N - 1)·k,

the left being 2/N of the right if all workers choose the same elements, and 3/2 of it if no two do. As
k <= u_s <= u_N, it is so whenever the union u_N of all is below N·k/2, and never if that is above (N - 1)·k: never with
2 workers. Random k, whose choice is the same on all workers, is added in the ring (`gradiveq.compressors.randomk`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import torch
from numba import types
from torch import Tensor

from gradiveq.arrays.bits import UInt8, UInt32, pack, packed_bytes, unpack
from gradiveq.arrays.jit import FLOATS, WORDS, jit
from gradiveq.compressors.base import Array, Compressor, Draw, Float32
from gradiveq.device import bits

HEADER_BYTES = 5
GAPS, BITMAP = 0, 1


def positions_bytes(length: int, count: int) -> int:
    """Bytes of the header and of the positions of `count` elements of a vector of `length`."""
    return HEADER_BYTES + min(_gaps_bytes(length, count), -(-length // 8))


def encode_positions(indices: UInt32, length: int) -> UInt8:
    """Header and positions.

    Args:
        indices: uint32, ascending, below `length`.
    Returns:
        uint8 of shape (positions_bytes(length, len(indices)),).
    """
    count = len(indices)
    form = form_of(length, count)
    header = np.empty(HEADER_BYTES, np.uint8)
    header[0] = form
    header[1:] = np.array([count], "<u4").view(np.uint8)
    if count == 0:
        return header
    if form == BITMAP:
        return np.concatenate([header, _bits_at(indices, length)])
    low, high = gaps_shape(length, count)
    places: UInt32 = indices >> np.uint32(low)
    places += np.arange(count, dtype=np.uint32)
    parts = [header, _bits_at(places, high)]
    if low:
        parts.insert(1, pack(indices & np.uint32((1 << low) - 1), low))
    return np.concatenate(parts)


def decode_positions(payload: Array, length: int) -> tuple[UInt32, UInt8]:
    """The indices, and the rest of the payload: what follows the positions.

    Args:
        payload: uint8, any slice of a message. Not modified.
        length: of the vector.
    Raises:
        ValueError: not positions in a vector of this length.
    """
    count = decode_count(payload, length)
    num_bytes = positions_bytes(length, count)
    if len(payload) < num_bytes:
        raise ValueError(f"positions of {count} of {length} elements take {num_bytes} bytes, got {len(payload)}")
    body, rest = payload[HEADER_BYTES:num_bytes], payload[num_bytes:]
    form = form_of(length, count)
    if payload[0] != form:
        raise ValueError(f"positions of {count} of {length} elements are written in form {form}, got {payload[0]}")
    if count == 0:
        return np.empty(0, np.uint32), rest
    if form == BITMAP:
        indices = _places(body, count)
    else:
        low, _ = gaps_shape(length, count)
        cut = packed_bytes(count, low)
        indices = _places(body[cut:], count)
        indices -= np.arange(count, dtype=np.uint32)
        if low:
            indices <<= np.uint32(low)
            indices |= unpack(body[:cut], low, count)
    if indices[-1] >= length or not (indices[1:] > indices[:-1]).all():
        raise ValueError(f"the positions of a payload must ascend to at most {length - 1}, these don't")
    return indices, rest


def decode_count(payload: Array, length: int) -> int:
    """Number of elements that a payload speaks of, from its header.

    Raises:
        ValueError: none, or more than the vector has.
    """
    if len(payload) < HEADER_BYTES:
        raise ValueError(f"a payload of positions has at least {HEADER_BYTES} bytes, got {len(payload)}")
    count = int.from_bytes(payload[1:HEADER_BYTES].tobytes(), "little")
    if count > length:
        raise ValueError(f"a payload speaks of {count} elements of a vector that has {length}")
    return count


class Sparsifier(Compressor):
    """Sends some elements as they are, and which ones; the others count as zero.

    Everybody gets everybody's by an all-gather; see the module for when a sum in the ring would send less.
    """

    collective = "all_gather"
    biased = True
    copies = True

    @abstractmethod
    def select(self, values: Float32) -> tuple[UInt32, Float32]:
        """Which elements to send: their indices, ascending, and what they are."""

    def compress(self, values: Float32, draw: Draw, latest: Float32 | None = None) -> Array:
        indices, chosen = self.select(values)
        return np.concatenate([encode_positions(indices, len(values)), chosen.view(np.uint8)])

    def decompress(self, payload: Array, out: Float32, draw: Draw, size: int = 1) -> None:
        indices, values = _decode(payload, len(out))
        out.fill(0)
        put(indices, values, out)

    def num_sent(self, payload: Array, length: int) -> int:
        return decode_count(payload, length)

    def add_to(self, payload: Array, total: Float32, draw: Draw, scratch: Float32) -> None:
        indices, values = _decode(payload, len(total))
        add(indices, values, total)


def _decode(payload: Array, length: int) -> tuple[UInt32, Float32]:
    indices, rest = decode_positions(payload, length)
    if len(rest) != 4 * len(indices):
        raise ValueError(f"{len(indices)} values take {4 * len(indices)} bytes, got {len(rest)}")
    # A copy, as compiled loops need it to begin at a multiple of 4 bytes.
    return indices, rest.copy().view(np.float32)


def form_of(length: int, count: int) -> int:
    """How positions are written: GAPS, or BITMAP where that is shorter."""
    return GAPS if _gaps_bytes(length, count) <= -(-length // 8) else BITMAP


def gaps_shape(length: int, count: int) -> tuple[int, int]:
    """The bits of each index that are written as they are, and the number of bits that the rest of all takes."""
    low = (length // count).bit_length() - 1
    return low, ((length - 1) >> low) + count


def _gaps_bytes(length: int, count: int) -> int:
    if count == 0:
        return 0
    low, high = gaps_shape(length, count)
    return packed_bytes(count, low) + -(-high // 8)


def _bits_at(places: UInt32, num_bits: int) -> UInt8:
    """ceil(num_bits/8) bytes with these bits set."""
    packed = np.zeros(-(-num_bits // 8), np.uint8)
    _set_bits(places, packed)
    return packed


def _places(packed: Array, count: int) -> UInt32:
    """The places of the bits that are set."""
    places = np.empty(count + 8, np.uint32)
    if _find_bits(packed, places) != count:
        raise ValueError(f"the positions of {count} elements have as many bits set, these have more or fewer")
    return places[:count]


@jit(types.void(WORDS, types.uint8[::1]), cache=True)
def _set_bits(places: Any, packed: Any) -> None:
    for i in range(len(places)):
        packed[places[i] >> np.uint32(3)] |= np.uint8(1 << (places[i] & np.uint32(7)))


@jit(types.int64(types.Array(types.uint8, 1, "C", readonly=True), types.uint32[::1]), cache=True)
def _find_bits(packed: Any, places: Any) -> Any:
    """Write the places of the bits that are set and return how many; -1 if there is no room for 8 more than those."""
    found = np.uint64(0)
    for byte in range(len(packed)):
        if found + np.uint64(8) > np.uint64(len(places)):
            return -1
        for bit in range(8):  # each is written, and overwritten by the next one unless it is set
            places[found] = np.uint32(8 * byte + bit)
            found += np.uint64((packed[byte] >> bit) & 1)
    return np.int64(found)


@jit(types.void(WORDS, FLOATS, types.float32[::1]), cache=True)
def put(indices: Any, values: Any, out: Any) -> None:
    """out[indices] = values; no bounds are checked."""
    for i in range(len(indices)):
        out[indices[i]] = values[i]


@jit(types.void(WORDS, FLOATS, types.float32[::1]), cache=True)
def add(indices: Any, values: Any, total: Any) -> None:
    """total[indices] += values, of different indices; no bounds are checked."""
    for i in range(len(indices)):
        total[indices[i]] += values[i]


def encode_positions_tensor(chosen: Tensor, indices: Tensor) -> list[Tensor]:
    """`encode_positions` without the header, as torch operations.

    Args:
        chosen: bool of shape (length,).
        indices: int64, where it is set, ascending.
    """
    length, count = len(chosen), len(indices)
    if form_of(length, count) != GAPS:
        return [bits.pack_bits(chosen)]
    low, high = gaps_shape(length, count)
    upper = torch.zeros(high, dtype=torch.bool, device=chosen.device)
    upper[(indices >> low) + torch.arange(count, device=chosen.device)] = True
    lower = [bits.pack(indices & ((1 << low) - 1), low)] if low else []
    return [*lower, bits.pack_bits(upper)]


def decode_positions_tensor(body: Tensor, length: int, count: int) -> Tensor:
    """The indices, int64 of shape (..., count), ascending, of several payloads' positions without their headers."""
    if form_of(length, count) != GAPS:
        return bits.places(bits.unpack_bits(body, length), count)
    low, high = gaps_shape(length, count)
    cut = packed_bytes(count, low)
    indices = bits.places(bits.unpack_bits(body[..., cut:], high), count) - torch.arange(count, device=body.device)
    return (indices << low) | bits.unpack(body[..., :cut], low, count) if low else indices
