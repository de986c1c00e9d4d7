"""Random numbers, packed codes and packed bits as torch operations, on any device.

What `gradiveq.arrays.counter_random`, `gradiveq.arrays.bits` and `gradiveq.arrays.signs` define, bit by bit. Shapes
follow from lengths alone and no element is looked at on the host, so that nothing waits for the device; for the same
reason nothing here finds out that a payload is broken.

torch has hardly any operation on unsigned integers of more than 8 bits. Where only the lowest 32 bits count, int32,
which wraps around, does as well; where bits are moved between words int64 has room for two of them.

Numbers known on the host are made on the device by filling: a copy from memory that isn't pinned would wait.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gradiveq.arrays.bits import BLOCK, LANES, packed_bytes
from gradiveq.arrays.counter_random import Draw, stream_key
from gradiveq.arrays.float32 import Array

_WORD = 0xFFFFFFFF


def copied(array: Array, device: torch.device) -> Tensor:
    """An array on a device, without waiting: on its way there it is in pinned memory."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def constant(value: float, like: Tensor) -> Tensor:
    """A number to divide by. Torch multiplies by the reciprocal of a Python number on a GPU: another last bit."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


def cast(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes of any slice of messages as numbers of another type; a copy, as it may begin at any byte."""
    numbers = payload.clone(memory_format=torch.contiguous_format).view(-1).view(dtype)
    return numbers.view(*payload.shape[:-1], payload.shape[-1] // dtype.itemsize)


def as_bytes(number: Tensor) -> Tensor:
    """The bytes of one number, uint8."""
    return number.view(1).view(torch.uint8)


def random24(draw: Draw, length: int, device: torch.device) -> Tensor:
    """24 random bits for each element, int32 of shape (length,): `counter_random.random24` of 0, 1, ..."""
    key = int(stream_key(*map(np.uint64, draw)))
    x = torch.arange(length, dtype=torch.int32, device=device)
    x ^= _signed(key & _WORD)
    x ^= _shifted(x, 17)
    x *= _signed(0xED5AD4BB)
    x ^= _shifted(x, 11)
    x += _signed(key >> 32)
    x *= _signed(0xAC4C1B51)
    x ^= _shifted(x, 15)
    x *= _signed(0x31848BAB)
    x ^= _shifted(x, 14)
    return _shifted(x, 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`bits.pack`: uint8 of shape (ceil(n·bits/8),).

    Args:
        codes: int64 of shape (n,), each below 2^bits.
        bits: 1 ... 32.
    """
    whole = len(codes) // BLOCK * BLOCK
    rest = F.pad(codes[whole:], (0, -len(codes) % 32))
    words = [_pack(codes[:whole].view(-1, 32, LANES), bits), _pack(rest.view(-1, 32, 1), bits)]
    return torch.cat(words).view(torch.uint8)[: packed_bytes(len(codes), bits)]


def unpack(payload: Tensor, bits: int, count: int) -> Tensor:
    """`bits.unpack` of several payloads of one length: the codes, int64 of shape (..., count)."""
    whole = count // BLOCK * BLOCK
    cut = whole // 8 * bits
    rest = F.pad(payload[..., cut:], (0, -(payload.shape[-1] - cut) % (4 * bits)))
    blocks = _unpack(cast(payload[..., :cut], torch.int32), bits, LANES), _unpack(cast(rest, torch.int32), bits, 1)
    return torch.cat(blocks, dim=-1)[..., :count]


def pack_bits(bits: Tensor) -> Tensor:
    """Bit i % 8 of byte i // 8: uint8 of shape (ceil(n/8),).

    Args:
        bits: bool of shape (n,).
    """
    eights = F.pad(bits.to(torch.uint8), (0, -len(bits) % 8)).view(-1, 8)
    return (eights << _eight(bits)).sum(1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """The inverse, of several: bool of shape (..., count)."""
    return ((packed.unsqueeze(-1) >> _eight(packed)) & 1).flatten(-2)[..., :count].bool()


def places(bits: Tensor, count: int) -> Tensor:
    """Indices of the bits that are set, int64 of shape (..., count), ascending: `nonzero` of a known number of bits."""
    target = torch.where(bits, bits.cumsum(-1) - 1, count)
    found = target.new_zeros(*bits.shape[:-1], count + 1)  # the last one takes what isn't set
    every = torch.arange(bits.shape[-1], device=bits.device).expand_as(target)
    return found.scatter_(-1, target, every)[..., :count]


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(groups, 32, lanes) -> the words, int32: what of each code is in the word where it begins, and in the next."""
    start = bits * torch.arange(32, device=codes.device)
    word, shifted = start >> 5, codes << (start & 31).view(32, 1)
    words = codes.new_zeros(len(codes), bits + 1, codes.shape[2])
    words.index_add_(1, word, shifted & _WORD)
    words.index_add_(1, word + 1, shifted >> 32)
    return words[:, :bits].to(torch.int32).view(-1)


def _unpack(words: Tensor, bits: int, lanes: int) -> Tensor:
    """The inverse of `_pack`: (..., groups·bits·lanes) -> (..., groups·32·lanes)."""
    start = bits * torch.arange(32, device=words.device)
    word = start >> 5
    words = words.view(*words.shape[:-1], words.shape[-1] // (bits * lanes), bits, lanes).long() & _WORD
    first, second = words.index_select(-2, word), words.index_select(-2, (word + 1).clamp(max=bits - 1))
    return (((second << 32 | first) >> (start & 31).view(32, 1)) & ((1 << bits) - 1)).flatten(-3)


def _eight(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def _shifted(x: Tensor, by: int) -> Tensor:
    """A right shift of int32 as if it had no sign."""
    return (x >> by) & ((1 << (32 - by)) - 1)


def _signed(word: int) -> int:
    """The number whose int32 has the bits of this uint32."""
    return word - (1 << 32) if word >> 31 else word
