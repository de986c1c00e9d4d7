"""Compressors as torch operations, so that a gradient on a GPU stays there and nothing waits for it.

All whose payloads are of a fixed size. Each gives the payload that its NumPy form gives, and decodes it alike, bit by
bit; but for norms that are sums (`gradiveq.ddp.native_gathered`), which may be the float32 beside it. Where a size
depends on the data (threshold, adaptive, AdaComp), the host has to know it before it can send anything.

Random k draws its indices on the host, in a loop whose length depends on what it draws, and copies them from pinned
memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradiveq.compressors.base import Compressor, Draw
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.integer import Integer
from gradiveq.compressors.natural import Natural
from gradiveq.compressors.qsgd_gather import QSGDGather
from gradiveq.compressors.randomk import RandomK
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.terngrad import TernGrad
from gradiveq.compressors.topk import TopK
from gradiveq.ddp import native_gathered as gathered
from gradiveq.ddp.native_bits import constant, copied, random24
from gradiveq.float32 import LARGEST

_NATIVE = (Identity, Half, Integer, RandomK, Sign, TernGrad, Natural, QSGDGather, TopK)
#: Elements that are decoded at once, of several ranks; of a vector of more, one rank's.
_AT_ONCE = 1 << 22


def is_native(compressor: Compressor) -> bool:
    """Not of a class derived from one of them, which may do something else."""
    return type(compressor) in _NATIVE


def compress(compressor: Compressor, values: Tensor, draw: Draw) -> Tensor:
    """As `Compressor.compress`, on the device of `values`, float32 of shape (length,); may be a view of them."""
    match compressor:
        case Half():
            return values.clamp(-compressor.limit, compressor.limit).to(getattr(torch, compressor.dtype))
        case Integer():
            return _rounded(compressor, values, draw)
        case RandomK():
            return _chosen(compressor, values, draw)
        case Sign():
            return gathered.compress_sign(compressor, values)
        case TernGrad():
            return gathered.compress_terngrad(compressor, values, draw)
        case Natural():
            return gathered.compress_natural(compressor, values, draw)
        case QSGDGather():
            return gathered.compress_qsgd(compressor, values, draw)
        case TopK():
            return gathered.compress_top_k(compressor, values)
    return values


def decompress(compressor: Compressor, payload: Tensor, out: Tensor, draw: Draw) -> None:
    """As `Compressor.decompress`."""
    match compressor:
        case RandomK():
            out.zero_()
            out[_indices(compressor, out, draw)] = payload
        case TopK():
            indices, values = gathered.decode_top_k(compressor, payload, len(out))
            out.zero_()
            out[indices] = values
        case Integer():
            exact = payload.double()
            out.copy_(exact / constant(compressor.scale, exact))
        case Identity() | Half():
            out.copy_(payload)
        case _:
            out.copy_(_estimates(compressor, payload, len(out)))


def add_to(compressor: Compressor, payloads: Tensor, total: Tensor) -> None:
    """As `Compressor.add_to` of one payload after the other.

    Args:
        payloads: what was gathered, uint8 of shape (ranks, bytes).
    """
    at_once = max(1, _AT_ONCE // max(1, len(total)))
    for some in torch.split(payloads, at_once):
        if isinstance(compressor, TopK):
            for indices, values in zip(*gathered.decode_top_k(compressor, some, len(total)), strict=True):
                total[indices] += values  # of different indices, so no order matters
        else:
            for estimate in _estimates(compressor, some, len(total)):
                total += estimate


def finish(compressor: Compressor, total: Tensor, size: int) -> None:
    """As `Compressor.finish`."""
    if isinstance(compressor, Sign) and compressor.rule == "vote":
        total.sign_()
    else:
        total /= constant(size, total)


def _estimates(compressor: Compressor, payloads: Tensor, length: int) -> Tensor:
    """Of what is gathered, but for top-k: float32 of shape (..., length)."""
    match compressor:
        case Sign():
            return gathered.estimate_sign(compressor, payloads, length)
        case TernGrad():
            return gathered.estimate_terngrad(payloads, length)
        case Natural():
            return gathered.estimate_natural(payloads, length)
        case QSGDGather():
            return gathered.estimate_qsgd(compressor, payloads, length)
    raise TypeError(f"{compressor.name} has no torch form")


def _rounded(compressor: Integer, values: Tensor, draw: Draw) -> Tensor:
    """In float64, without which 32 bits can't be the host's."""
    u: Tensor | float = 0.5
    if compressor.rounding == "stochastic":
        u = random24(draw, len(values), values.device).double() * 2.0**-24
    # Two operations: with one, a GPU wouldn't round the product.
    steps = (values.double() * compressor.scale + u).floor_()
    return steps.clamp_(-compressor.most, compressor.most).to(getattr(torch, f"int{compressor.bits}"))


def _chosen(compressor: RandomK, values: Tensor, draw: Draw) -> Tensor:
    sent = values[_indices(compressor, values, draw)]
    if compressor.unbiased and len(sent):
        return (sent.double() * (len(values) / len(sent))).clamp_(-LARGEST, LARGEST).float()
    return sent


def _indices(compressor: RandomK, values: Tensor, draw: Draw) -> Tensor:
    return copied(compressor.indices(len(values), draw), values.device)
