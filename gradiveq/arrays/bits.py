"""Codes of a fixed width, 1 ... 32 bits, packed without gaps.

    pack    n codes -> ceil(n·bits/8) bytes, no more            unpack    the inverse

The first floor(n/512)·512 codes go in blocks of 512: 16 lanes side by side, of which lane l takes the codes l, 16 + l,
32 + l, ... of the block, one behind another from the lowest bits upwards, into `bits` 32-bit words; so packing is the
same shift for a whole vector register, whatever the width. What is left is one lane: a plain stream of bits, lowest
first (NumPy's `packbits` with bitorder="little"), which ends with the byte that holds the last code. Words are
little-endian.

Cost: about two shifts and two ors for each code, in vector code; `python -m bench.compressor_throughput`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from gradiveq.arrays.jit import WORDS, jit

UInt32 = npt.NDArray[np.uint32]
UInt8 = npt.NDArray[np.uint8]

LANES = 16
BLOCK = 32 * LANES  # codes: 32 of them fill whole words at every width


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack(codes: UInt32, bits: int) -> UInt8:
    """The codes, `bits` bits each.

    Args:
        codes: contiguous uint32 of shape (n,), each below 2^bits. Not modified.
        bits: 1 ... 32.
    Returns:
        uint8 of shape (ceil(n·bits/8),).
    Raises:
        ValueError: a width or a code out of range.
    """
    _check_bits(bits)
    if codes.dtype != np.uint32 or codes.ndim != 1:
        raise ValueError(f"`codes` must be a vector of uint32, got {codes.ndim} dimensions of {codes.dtype}")
    whole = len(codes) // BLOCK * BLOCK
    rest = np.zeros(-(-(len(codes) - whole) // 32) * 32, np.uint32)
    rest[: len(codes) - whole] = codes[whole:]
    words = np.empty((whole + len(rest)) // 32 * bits, np.uint32)
    if int(_pack(np.ascontiguousarray(codes[:whole]), rest, bits, words)) >> bits:
        raise ValueError(f"`codes` must be below 2^{bits}, as they get {bits} bits, got {codes.max()}")
    return words.view(np.uint8)[: packed_bytes(len(codes), bits)]


def unpack(payload: UInt8, bits: int, count: int) -> UInt32:
    """The `count` codes that were packed, uint32.

    Args:
        payload: uint8, as `pack` returns it; any slice of a message. Not modified.
        bits: 1 ... 32.
        count: of the codes.
    Raises:
        ValueError: a width out of range, or a payload of another length.
    """
    _check_bits(bits)
    if count < 0 or payload.dtype != np.uint8 or payload.shape != (packed_bytes(count, bits),):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, "
            f"got {payload.dtype} of shape {payload.shape}"
        )
    whole = count // BLOCK * BLOCK
    cut = whole // 8 * bits
    words = payload[:cut]
    if not words.flags.c_contiguous or words.ctypes.data % 4:
        words = words.copy()
    rest = np.zeros(-(-(count - whole) // 32) * 4 * bits, np.uint8)
    rest[: len(payload) - cut] = payload[cut:]
    codes = np.empty(whole + len(rest) // (4 * bits) * 32, np.uint32)
    _unpack(words.view(np.uint32), rest.view(np.uint32), bits, codes)
    return codes[:count]


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 32:
        raise ValueError(f"`bits` must be in 1 ... 32, as codes are uint32, got {bits}")


@jit()
def _pack_block(codes: Any, bits: int, lanes: int, words: Any) -> Any:
    """32·lanes codes -> bits·lanes words; returns the bits that are used in any code."""
    for i in range(len(words)):
        words[i] = 0
    used = np.uint32(0)
    for j in range(32):
        row = codes[j * lanes : (j + 1) * lanes]
        place, shift = (j * bits >> 5) * lanes, np.uint32(j * bits & 31)
        first = words[place : place + lanes]
        for i in range(lanes):
            used |= row[i]
            first[i] |= np.uint32(row[i] << shift)
        if shift + bits > 32:  # so shift > 0
            second = words[place + lanes : place + 2 * lanes]
            for i in range(lanes):
                second[i] |= np.uint32(row[i] >> np.uint32(np.uint32(32) - shift))
    return used


@jit()
def _unpack_block(words: Any, bits: int, lanes: int, codes: Any) -> None:
    mask = np.uint32((1 << bits) - 1)
    for j in range(32):
        row = codes[j * lanes : (j + 1) * lanes]
        place, shift = (j * bits >> 5) * lanes, np.uint32(j * bits & 31)
        first = words[place : place + lanes]
        if shift + bits > 32:
            second = words[place + lanes : place + 2 * lanes]
            left = np.uint32(np.uint32(32) - shift)
            for i in range(lanes):
                row[i] = (np.uint32(first[i] >> shift) | np.uint32(second[i] << left)) & mask
        else:
            for i in range(lanes):
                row[i] = np.uint32(first[i] >> shift) & mask


@jit(types.uint32(WORDS, WORDS, types.int64, types.uint32[::1]), cache=True)
def _pack(blocks: Any, rest: Any, bits: int, words: Any) -> Any:
    used = np.uint32(0)
    for block in range(len(blocks) // BLOCK):
        out = words[block * LANES * bits : (block + 1) * LANES * bits]
        used |= _pack_block(blocks[block * BLOCK : (block + 1) * BLOCK], bits, LANES, out)
    words = words[len(blocks) // 32 * bits :]
    for block in range(len(rest) // 32):
        used |= _pack_block(rest[block * 32 : (block + 1) * 32], bits, 1, words[block * bits : (block + 1) * bits])
    return used


@jit(types.void(WORDS, WORDS, types.int64, types.uint32[::1]), cache=True)
def _unpack(blocks: Any, rest: Any, bits: int, codes: Any) -> None:
    whole = len(blocks) // (LANES * bits)
    for block in range(whole):
        source = blocks[block * LANES * bits : (block + 1) * LANES * bits]
        _unpack_block(source, bits, LANES, codes[block * BLOCK : (block + 1) * BLOCK])
    codes = codes[whole * BLOCK :]
    for block in range(len(rest) // bits):
        _unpack_block(rest[block * bits : (block + 1) * bits], bits, 1, codes[block * 32 : (block + 1) * 32])
