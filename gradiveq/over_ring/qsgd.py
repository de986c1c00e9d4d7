"""QSGD in the ring: every hop decodes what arrives, adds its own gradient and quantises the sum again.

Alistarh et al. 2017, section 3.1, on buckets of 512 elements. b bits are a sign and s = 2^(b-1) - 1 levels. With the
bucket's norm m (its largest magnitude, or its L2 norm), an element x is sent as the integer

    q = floor(s·x/m + u),  u uniform on [0, 1),    and decodes to    m·(q/s),    so that    E[m·q/s] = x.

On the wire a bucket is m (float32) followed by its codes, packed into 32-bit words: with W words, word i holds the
elements i, i + W, i + 2W, ... from its lowest bits upwards, so that packing is the same shift for a whole vector
register. 512 elements at 4 bits take 260 bytes: 4.06 bits per element. Words are in the machine's own byte order.

**Rounding.** u has 24 random bits: a hash of the element's position in the vector, keyed by (seed, call, rank, step).
s·x/m is a fixed-point number with 24 fractional bits and the addition is exact, so no code exceeds s, the element of
largest magnitude decodes exactly with norm="max", and the bias is that of the float32 arithmetic around it: at most
m·2^-21. Nothing depends on how a vector is cut into chunks, nor on their order.

**Special values.** A bucket of zeros decodes to zeros. Denormal norms work (x/m is a true division: 1/m could
overflow). A bucket with a NaN or an infinity decodes to NaN in all of its elements, here and at every later hop; so
does one whose sum overflows. An L2 norm beyond float32 is sent as the largest float32, which keeps it unbiased.

**Cost.** Per element and hop: one division, one hash (three 32-bit multiplications) and one rounding to encode, two
multiplications to decode; `reduce` does it all bucket by bucket in the L1 cache, reading and writing memory once.

**Why Numba.** NumPy and torch run these ~30 operations per element as that many passes over memory. On one Zen 4 core
NumPy encodes 25 M elements/s with this counter-based generator (200 with its fastest sequential one), torch 100 with
its own. Here LLVM turns the loops over a bucket into vector code: about 800 M elements/s encode *and* decode together
(`python -m bench.qsgd_throughput`). It is compiled on the first import, which takes a few seconds, and cached; without
fast-math, so that all call sites and processors round alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numba import types

from gradiveq.arrays.counter_random import mix64, random24, stream_key
from gradiveq.arrays.float32 import INFINITY_BITS, LARGEST
from gradiveq.arrays.jit import FLOATS, WORDS, jit
from gradiveq.arrays.levels import Norm, check_format
from gradiveq.methods import QSGDRing
from ring.codec import Array, Codec, Hop, Payload
from ring.segments import Region


@jit()
def _encode_bucket(values: Array, key: np.uint64, bits: int, l2: bool, wire: Array) -> None:
    # Magnitudes order like their bit patterns, NaNs above all: a maximum of integers, which LLVM may reorder.
    patterns = values.view(np.int32)
    largest = np.int32(0)
    for i in range(len(values)):
        largest = max(largest, np.int32(patterns[i] & np.int32(0x7FFFFFFF)))
    for i in range(len(wire)):
        wire[i] = 0
    codes = wire[1:]
    norm = wire.view(np.float32)
    if largest == 0:
        return
    if largest >= INFINITY_BITS:
        norm[0] = np.nan
        return
    if l2:
        squares = 0.0  # in float64 nothing over- or underflows, and the root is never below the largest magnitude
        for i in range(len(values)):
            squares += np.float64(values[i]) * np.float64(values[i])
        norm[0] = min(np.sqrt(squares), np.float64(LARGEST))
    else:
        wire[0] = largest
    divisor = norm[0]
    scale = np.float32(((1 << (bits - 1)) - 1) << 24)
    mask = np.uint32((1 << bits) - 1)
    low, high = np.uint32(key), np.uint32(key >> np.uint64(32))
    for field in range(32 // bits):
        first = field * len(codes)
        part = values[first : first + len(codes)]
        shift = np.uint32(field * bits)
        for i in range(len(part)):
            fixed_point = np.int32(part[i] / divisor * scale)
            code = np.int32(fixed_point + random24(np.uint32(first + i), low, high)) >> np.int32(24)
            codes[i] |= np.uint32((np.uint32(code) & mask) << shift)


@jit()
def _decode_bucket(wire: Array, bits: int, values: Array) -> None:
    norm = wire.view(np.float32)[0]
    level = np.float32(1) / np.float32((1 << (bits - 1)) - 1)  # in float32, s times this is exactly 1
    codes = wire[1:].view(np.int32)
    right = np.int32(32 - bits)
    for field in range(32 // bits):
        first = field * len(codes)
        part = values[first : first + len(codes)]
        left = np.int32(32 - bits - field * bits)
        for i in range(len(part)):
            code = np.int32(codes[i] << left) >> right
            part[i] = np.float32(code) * level * norm


@jit(
    types.void(WORDS, FLOATS, types.uint64, types.uint64, types.int64, types.int64, types.boolean, types.uint32[::1]),
    cache=True,
)
def _recode(
    incoming: Array,
    values: Array,
    start: np.uint64,
    key: np.uint64,
    bits: int,
    bucket: int,
    l2: bool,
    outgoing: Array,
) -> None:
    """outgoing = encode(decode(incoming) + values); an empty `incoming` counts as zeros.

    One function for `encode` and `reduce`, so that both round with the same machine code and it is compiled once.
    """
    words = 1 + (bucket * bits + 31) // 32
    scratch = np.empty(min(bucket, len(values)), np.float32)
    for index in range((len(values) + bucket - 1) // bucket):
        own = values[index * bucket : (index + 1) * bucket]
        total = scratch[: len(own)]
        if len(incoming) > 0:
            _decode_bucket(incoming[index * words : (index + 1) * words], bits, total)
            for i in range(len(own)):
                total[i] += own[i]
        else:
            for i in range(len(own)):
                total[i] = own[i]
        bucket_key = mix64(key + start + np.uint64(index * bucket))
        _encode_bucket(total, bucket_key, bits, l2, outgoing[index * words : (index + 1) * words])


@jit(types.void(WORDS, types.int64, types.int64, types.float32[::1]), cache=True)
def _decode(incoming: Array, bits: int, bucket: int, values: Array) -> None:
    words = 1 + (bucket * bits + 31) // 32
    for index in range((len(values) + bucket - 1) // bucket):
        part = values[index * bucket : (index + 1) * bucket]
        _decode_bucket(incoming[index * words : (index + 1) * words], bits, part)


@dataclass(frozen=True)
class QSGD(Codec):
    """Stochastic quantisation of each bucket to b bits, re-quantised at every hop of the ring.

    Codecs of several parts of one vector (`Composite`) should differ in `seed`: positions count from a part's start.

    Args:
        bits: 2, 4 or 8 bits for an element: a sign and 2^(bits-1) - 1 levels.
        bucket: elements that share a norm.
        norm: "max" (largest magnitude) or "l2", as in the paper. With 4 bits and buckets of 512, the relative variance
            after a ring of 6 is 0.13 and 16.6.
        seed: key of the random numbers. Rank and step of the hop are part of the key as well.
        call: the iteration, to be changed at every all-reduce (`dataclasses.replace`).
    Raises:
        ValueError: if a value is out of its range.
    Cost on the wire: 4 + 4·ceil(bits·bucket / 32) bytes per bucket.
    """

    bits: int = 4
    bucket: int = 512
    norm: Norm = "max"
    seed: int = 0
    call: int = 0

    linear = False

    def __post_init__(self) -> None:
        check_format(self.bits, self.bucket, self.norm)
        for name in ("seed", "call"):
            if not 0 <= getattr(self, name) < 2**64:
                raise ValueError(f"`{name}` must be in [0, 2^64), as it keys 64-bit hashes, got {getattr(self, name)}")

    @classmethod
    def of(cls, method: QSGDRing, seed: int = 0, call: int = 0) -> QSGD:
        """The codec of one all-reduce; the random numbers depend on both arguments."""
        return cls(method.bits, method.bucket, method.norm, seed, call)

    def describe(self, dtype: np.dtype[Any]) -> str:
        return f"QSGD bits={self.bits} bucket={self.bucket} norm={self.norm} seed={self.seed}"

    def regions(self, length: int, dtype: np.dtype[Any]) -> Sequence[Region]:
        self._check_dtype(dtype)
        return (Region(length, self.bucket, self.num_bytes(self.bucket), self.num_bytes(length % self.bucket)),)

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        self._recode(payload[:0], values, start, payload, hop)

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        self._recode(self._words(incoming, values), values, start, payload, hop)

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        _decode(self._words(payload, values), self.bits, self.bucket, values)

    def _recode(self, incoming: Array, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        words = self._words(payload, values)
        _recode(
            incoming.view(np.uint32),
            values,
            np.uint64(start),
            self.key(hop),
            self.bits,
            self.bucket,
            self.norm == "l2",
            words,
        )

    def key(self, hop: Hop) -> np.uint64:
        """The key of one encoding's random numbers."""
        key = stream_key(np.uint64(self.seed), np.uint64(self.call), np.uint64(hop.rank), np.uint64(hop.step))
        return np.uint64(key)

    def num_bytes(self, length: int) -> int:
        """Bytes of one bucket of `length` elements: the norm, and the codes filled up to whole words."""
        return 4 + 4 * -(-length * self.bits // 32) if length else 0

    def _words(self, payload: Payload, values: Array) -> Array:
        """`payload` as 32-bit words. The compiled loops check no bounds, so its size is checked here."""
        self._check_dtype(values.dtype)
        full, rest = divmod(len(values), self.bucket)
        num_bytes = full * self.num_bytes(self.bucket) + self.num_bytes(rest)
        if len(payload) != num_bytes:
            raise ValueError(f"{len(values)} elements take a payload of {num_bytes} bytes, got {len(payload)}")
        return payload.view(np.uint32)

    def _check_dtype(self, dtype: np.dtype[Any]) -> None:
        if dtype != np.float32:
            raise ValueError(f"QSGD quantises float32 vectors, got {dtype}")
