"""Compressors as torch operations, so that a gradient on a GPU stays there and nothing waits for it.

identity, half and random k: their payloads are added, are of a fixed size, and take no sorting. Each gives what its
NumPy form gives, bit by bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gradiveq.compressors.base import Compressor, Draw
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.randomk import RandomK


def is_native(compressor: Compressor) -> bool:
    return isinstance(compressor, Identity | Half) or (isinstance(compressor, RandomK) and not compressor.unbiased)


def compress(compressor: Compressor, values: Tensor, draw: Draw) -> Tensor:
    """As `Compressor.compress`, on the device of `values`, float32 of shape (length,)."""
    match compressor:
        case Half():
            return values.clamp(-compressor.limit, compressor.limit).to(getattr(torch, compressor.dtype))
        case RandomK():
            return values[_indices(compressor, values, draw)]
    return values


def decompress(compressor: Compressor, payload: Tensor, out: Tensor, draw: Draw) -> None:
    """As `Compressor.decompress`."""
    if isinstance(compressor, RandomK):
        out.zero_()
        out[_indices(compressor, out, draw)] = payload.float()
    else:
        out.copy_(payload)


def _indices(compressor: RandomK, values: Tensor, draw: Draw) -> Tensor:
    """Drawn on the host and copied without waiting."""
    drawn = torch.from_numpy(compressor.indices(len(values), draw))
    return drawn.pin_memory().to(values.device, non_blocking=True) if values.is_cuda else drawn
