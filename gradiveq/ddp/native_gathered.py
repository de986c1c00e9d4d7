"""What is gathered, as torch operations: signs, TernGrad, natural compression, QSGD and top-k.

Each function gives the payload, or what it decodes to, of the compressor of the same name, bit by bit; the arithmetic
is explained there. Payloads may come from ranks without a GPU, and go there. To check them would be to wait. Those of
several ranks, uint8 of shape (..., bytes), are decoded at once, as operations on short vectors take longer to be begun
than to be done.

**Norms.** Largest magnitudes are exact. Sums (of squares, magnitudes, differences) are in float64 as in
`gradiveq.compressors.reductions`, but in the device's order instead of 16 lanes one after another, which would leave
most of a GPU idle. Two orders of n numbers of one sign differ by less than n·2^-52 of the sum, so that QSGD's "l2" norm
and the scale of signs are the same float32, or for n < 2^28 the one beside it, and then codes may be one level off. Of
TernGrad's σ the same holds while the vector's first element is within 2^13/√n standard deviations of the mean and
n < 2^26. The scale travels with the payload, so that all ranks decode the same.

**Top-k** finds the k-th magnitude by `torch.topk`, and then takes what is larger and the first ones that are equal: the
same elements as on the host, whichever of equal ones `torch.topk` would have taken.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gradiveq.compressors.base import Draw
from gradiveq.compressors.bits import packed_bytes
from gradiveq.compressors.natural import Natural
from gradiveq.compressors.qsgd_gather import QSGDGather
from gradiveq.compressors.select import num_kept
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.sparse import GAPS, HEADER_BYTES, form_of, gaps_shape, positions_bytes
from gradiveq.compressors.terngrad import TRITS, TernGrad
from gradiveq.compressors.topk import TopK
from gradiveq.ddp.native_bits import cast, constant, pack, pack_bits, places, random24, unpack, unpack_bits
from gradiveq.float32 import INFINITY_BITS, LARGEST


def compress_sign(compressor: Sign, values: Tensor) -> Tensor:
    signs = pack_bits(values < 0)
    if compressor.rule != "scaled" or not len(values):
        return signs
    scale = (values.abs().sum(dtype=torch.float64) / len(values)).float()
    return torch.cat([_bytes(scale), signs])


def estimate_sign(compressor: Sign, payload: Tensor, length: int) -> Tensor:
    header = payload.shape[-1] - -(-length // 8)
    magnitude = cast(payload[..., :4], torch.float32) if header else payload.new_ones(1, dtype=torch.float32)
    return torch.where(unpack_bits(payload[..., header:], length), -magnitude, magnitude)


def compress_natural(compressor: Natural, values: Tensor, draw: Draw) -> Tensor:
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    powers = (magnitudes + (random24(draw, len(values), values.device) >> 1)) >> 23
    exponents = torch.where(magnitudes >= INFINITY_BITS, 255, powers.clamp(max=254)).to(torch.uint8)
    return torch.cat([exponents, pack_bits(values < 0)])


def estimate_natural(payload: Tensor, length: int) -> Tensor:
    magnitudes = (payload[..., :length].int() << 23).view(torch.float32)
    return torch.where(unpack_bits(payload[..., length:], length), -magnitudes, magnitudes)


def compress_terngrad(compressor: TernGrad, values: Tensor, draw: Draw) -> Tensor:
    length = len(values)
    if not length:
        return values.new_empty(0, dtype=torch.uint8)
    magnitudes = values.abs()
    scale = magnitudes.amax()
    if compressor.clip is not None:
        cut = torch.minimum(compressor.clip * _standard_deviation(values), scale.double()).float()
        scale = torch.where(cut > 0, cut, scale)
    divisor = torch.where(scale == 0, 1, scale)
    probability = (torch.minimum(magnitudes, divisor) / divisor * (1 << 24)).int()
    sent = (probability + random24(draw, length, values.device)) >> 24
    digits = torch.where(values < 0, 1 - sent, 1 + sent).to(torch.uint8)
    fields = F.pad(digits, (0, -length % TRITS)).view(TRITS, -1)
    trits = fields[0].clone()
    for field in range(1, TRITS):
        trits += fields[field] * 3**field
    return torch.cat([_bytes(scale), trits])


def estimate_terngrad(payload: Tensor, length: int) -> Tensor:
    if not length:
        return payload.float()
    weights = 3 ** torch.arange(TRITS, dtype=torch.int32, device=payload.device).view(-1, 1)
    digits = payload[..., None, 4:].int().div(weights, rounding_mode="floor") % 3
    return (digits.flatten(-2)[..., :length] - 1).float() * cast(payload[..., :4], torch.float32)


def compress_qsgd(compressor: QSGDGather, values: Tensor, draw: Draw) -> Tensor:
    length, bucket = len(values), compressor.bucket or len(values)
    if not length:
        return values.new_empty(0, dtype=torch.uint8)
    rows = F.pad(values, (0, -length % bucket)).view(-1, bucket)
    magnitudes = rows.abs()
    largest = magnitudes.amax(1)
    norms = largest
    if compressor.norm == "l2":
        lengths = torch.linalg.vector_norm(rows, 2, 1, dtype=torch.float64)
        norms = torch.where(largest.isfinite(), lengths.clamp(max=LARGEST).float(), largest)
    usable = (norms.isfinite() & (norms > 0)).view(-1, 1)
    y = torch.where(usable, magnitudes / norms.view(-1, 1), 0) * compressor.levels
    whole = y.int()
    fractions = ((y - whole.float()) * (1 << 24)).int()
    levels = whole + ((fractions + random24(draw, rows.numel(), values.device).view(rows.shape)) >> 24)
    codes = compressor.levels + torch.where(rows < 0, -levels, levels)
    return torch.cat([norms.view(torch.uint8), pack(codes.view(-1)[:length].long(), compressor.bits)])


def estimate_qsgd(compressor: QSGDGather, payload: Tensor, length: int) -> Tensor:
    header, bucket = payload.shape[-1] - packed_bytes(length, compressor.bits), compressor.bucket or length
    levels = (unpack(payload[..., header:], compressor.bits, length) - compressor.levels).float()
    norms = cast(payload[..., :header], torch.float32).unsqueeze(-1)
    norms = norms.expand(*norms.shape[:-1], bucket).flatten(-2)[..., :length]
    return levels / constant(compressor.levels, levels) * norms


def compress_top_k(compressor: TopK, values: Tensor) -> Tensor:
    length, count = len(values), num_kept(len(values), compressor.ratio, compressor.count)
    header = [
        torch.full((1,), form_of(length, count), dtype=torch.uint8, device=values.device),
        _bytes(torch.full((), count, dtype=torch.int32, device=values.device)),
    ]
    if not count:
        return torch.cat(header)
    magnitudes = values.view(torch.int32) & 0x7FFFFFFF
    kth = torch.topk(magnitudes, count, sorted=False).values.amin()
    larger, equal = magnitudes > kth, magnitudes == kth
    chosen = larger | (equal & (equal.cumsum(0) <= count - larger.sum()))
    indices = places(chosen, count)
    return torch.cat([*header, *_positions(chosen, indices), values[indices].view(torch.uint8)])


def decode_top_k(compressor: TopK, payload: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The indices, int64 of shape (..., k), ascending, and the values."""
    count = num_kept(length, compressor.ratio, compressor.count)
    body = payload[..., HEADER_BYTES : positions_bytes(length, count)]
    values = cast(payload[..., positions_bytes(length, count) :], torch.float32)
    if not count:
        return values.long(), values
    if form_of(length, count) != GAPS:
        return places(unpack_bits(body, length), count), values
    low, high = gaps_shape(length, count)
    cut = packed_bytes(count, low)
    indices = places(unpack_bits(body[..., cut:], high), count) - torch.arange(count, device=payload.device)
    if low:
        indices = (indices << low) | unpack(body[..., :cut], low, count)
    return indices, values


def _positions(chosen: Tensor, indices: Tensor) -> list[Tensor]:
    """`gradiveq.compressors.sparse.encode_positions` without the header."""
    length, count = len(chosen), len(indices)
    if form_of(length, count) != GAPS:
        return [pack_bits(chosen)]
    low, high = gaps_shape(length, count)
    upper = torch.zeros(high, dtype=torch.bool, device=chosen.device)
    upper[(indices >> low) + torch.arange(count, device=chosen.device)] = True
    lower = [pack(indices & ((1 << low) - 1), low)] if low else []
    return [*lower, pack_bits(upper)]


def _standard_deviation(values: Tensor) -> Tensor:
    """`reductions.standard_deviation`, float64; exactly 0 of a constant vector too."""
    differences = values.double() - values[0].double()
    mean = differences.sum() / len(values)
    return (differences.square().sum() / len(values) - mean * mean).clamp(min=0).sqrt()


def _bytes(number: Tensor) -> Tensor:
    return number.view(1).view(torch.uint8)
