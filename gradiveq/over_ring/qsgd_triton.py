"""`gradiveq.over_ring.qsgd` on a GPU: one program decodes, adds and encodes a bucket, in one pass over memory.

The same format and, element by element, the same arithmetic as the host's loops: the same bits, but for an L2 norm, of
which the squares are added in another order (in float64: once in some 2^29 buckets its last bit differs). Therefore
products and sums aren't fused, and divisions are rounded to the nearest.

Triton comes with the builds of PyTorch for GPUs on Linux. Without a GPU, `TRITON_INTERPRET=1` in the environment before
this module is imported runs the kernels on CPU tensors, by NumPy: for tests.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradiveq.arrays.float32 import INFINITY_BITS, LARGEST
from gradiveq.over_ring.qsgd import QSGD

#: Elements of the largest bucket: a program has a whole one in its registers.
MOST_OF_A_BUCKET = 8192

_INFINITY = tl.constexpr(INFINITY_BITS)
_NAN = tl.constexpr(0x7FC00000)
_LARGEST = tl.constexpr(LARGEST)


@triton.jit
def _mix64(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _random24(index, low, high):
    x = index ^ low
    x = (x ^ (x >> 17)) * 0xED5AD4BB
    x = (x ^ (x >> 11)) + high
    x = x * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return ((x ^ (x >> 14)) >> 8).to(tl.int32)


@triton.jit
def _place(length, BITS: tl.constexpr, BUCKET: tl.constexpr, WORDS: tl.constexpr):
    """This program's bucket: its first element, its first word, its words of codes, and of each code's place in the
    tile (fields, WORDS) the word, the element and whether there is one."""
    bucket = tl.program_id(0).to(tl.int64)
    first = bucket * BUCKET
    count = tl.minimum(length - first, BUCKET).to(tl.int32)
    words = (count * BITS + 31) // 32
    word = tl.arange(0, WORDS)[None, :]
    index = tl.arange(0, 32 // BITS)[:, None] * words + word
    return first, bucket * (1 + (BUCKET * BITS + 31) // 32), words, word, index, (word < words) & (index < count)


@triton.jit
def _decoded(incoming, at, word, inside, BITS: tl.constexpr):
    norm = tl.load(incoming + at).to(tl.float32, bitcast=True)
    left = 32 - BITS - tl.arange(0, 32 // BITS)[:, None] * BITS
    code = (tl.load(incoming + at + 1 + word + 0 * left, mask=inside, other=0) << left) >> (32 - BITS)
    return code.to(tl.float32) * (1.0 / ((1 << (BITS - 1)) - 1)) * norm


@triton.jit(do_not_specialize=["base", "length"])
def _recode_kernel(
    incoming,
    values,
    outgoing,
    base,
    length,
    HAS_INCOMING: tl.constexpr,
    BITS: tl.constexpr,
    BUCKET: tl.constexpr,
    L2: tl.constexpr,
    WORDS: tl.constexpr,
):
    first, at, words, word, index, inside = _place(length, BITS, BUCKET, WORDS)
    total = tl.load(values + first + index, mask=inside, other=0.0)
    if HAS_INCOMING:
        total = _decoded(incoming, at, word, inside, BITS) + total
    # Magnitudes order like their bit patterns, NaNs above all.
    largest = tl.max(tl.max(total.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
    finite = largest < _INFINITY
    total = tl.where(finite, total, 0.0)
    if L2:
        wide = total.to(tl.float64)
        norm = tl.minimum(tl.sqrt(tl.sum(tl.sum(wide * wide, 1), 0)), _LARGEST).to(tl.float32)
        pattern = norm.to(tl.int32, bitcast=True)
    else:
        pattern = largest
    tl.store(outgoing + at, tl.where(finite, pattern, _NAN))
    divisor = tl.where(finite & (largest > 0), pattern, 0x3F800000).to(tl.float32, bitcast=True)
    key = _mix64((base + first).to(tl.uint64))
    random = _random24(index.to(tl.uint32), key.to(tl.uint32), (key >> 32).to(tl.uint32))
    scale = (((1 << (BITS - 1)) - 1) << 24) * 1.0
    code = ((tl.div_rn(total, divisor) * scale).to(tl.int32) + random) >> 24
    shift = tl.arange(0, 32 // BITS)[:, None] * BITS
    packed = tl.sum(tl.where(inside, (code & ((1 << BITS) - 1)) << shift, 0), 0)  # their bits are apart
    word = tl.arange(0, WORDS)
    tl.store(outgoing + at + 1 + word, packed, mask=word < words)


@triton.jit(do_not_specialize=["length"])
def _decode_kernel(incoming, values, length, divisor, BITS: tl.constexpr, BUCKET: tl.constexpr, WORDS: tl.constexpr):
    first, at, _, word, index, inside = _place(length, BITS, BUCKET, WORDS)
    value = _decoded(incoming, at, word, inside, BITS)
    tl.store(values + first + index, tl.div_rn(value, divisor), mask=inside)


def recode(incoming: Tensor | None, values: Tensor, base: int, codec: QSGD, out: Tensor) -> None:
    """out = encode(decode(incoming) + values); without `incoming`, encode(values).

    Args:
        incoming: payload of the same elements, int32 of shape (words,); may be `out`: a program has read all of its
            bucket before it knows the norm, and then writes. Otherwise not modified.
        values: float32 of shape (length,), from the beginning of a bucket on. Not modified.
        base: key of the random numbers plus position of the first element; counts modulo 2^64.
        out: int32 of shape (words,), overwritten.
    """
    grid, words = _sizes(values, codec)
    has_incoming = incoming is not None
    base = (base + 2**63) % 2**64 - 2**63  # as an int64, whatever its size
    with torch.cuda.device_of(values):  # where Triton launches, whatever device is this thread's
        _recode_kernel[grid](
            incoming if has_incoming else out,
            values,
            out,
            base,
            len(values),
            has_incoming,
            codec.bits,
            codec.bucket,
            codec.norm == "l2",
            words,
            enable_fp_fusion=False,
        )


def decode(incoming: Tensor, codec: QSGD, values: Tensor, divisor: int) -> None:
    """values = decode(incoming) / divisor.

    Args:
        incoming: int32 of shape (words,). Not modified.
        values: float32 of shape (length,), overwritten.
    """
    grid, words = _sizes(values, codec)
    with torch.cuda.device_of(values):
        _decode_kernel[grid](
            incoming, values, len(values), float(divisor), codec.bits, codec.bucket, words, enable_fp_fusion=False
        )


def _sizes(values: Tensor, codec: QSGD) -> tuple[tuple[int], int]:
    """Programs, and columns of a program's tile: a power of 2."""
    return (-(-len(values) // codec.bucket),), triton.next_power_of_2(codec.num_bytes(codec.bucket) // 4 - 1)
