"""Payloads as a process group carries them.

Sums: NumPy's types become torch's, int16 becomes int32 (no backend adds int16), and where the bucket itself has 16 bits
(a half-precision model, or the fp16/bf16 wrappers) float32 payloads are sent in its type.

What is gathered travels as in `gradiveq.message`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.compressors.base import Array
from gradiveq.ddp.scheme import Work


def wire_dtype(payload: Array, work: Work) -> torch.dtype:
    """In which sums travel."""
    if payload.dtype == np.float32:
        return work.buffer.dtype if work.half else torch.float32
    if payload.dtype == np.int16:
        return torch.int32
    return getattr(torch, payload.dtype.name)  # type: ignore[no-any-return]


def to_wire(payload: Array, work: Work) -> Tensor:
    """For a sum, on the CPU."""
    if payload.dtype.name == "bfloat16":
        return torch.from_numpy(payload.view(np.int16)).view(torch.bfloat16)
    tensor = torch.from_numpy(payload)
    if work.half and payload.dtype == np.float32:
        return work.to_wire(tensor)
    return tensor.to(wire_dtype(payload, work))


def from_wire(total: Tensor, dtype: np.dtype[Any], work: Work) -> Array:
    """What a compressor decodes, from a sum on the CPU."""
    if dtype.name == "bfloat16":
        return total.view(torch.int16).numpy().view(dtype)
    if work.half and dtype == np.float32:
        return work.from_wire(total).numpy()
    return total.numpy().astype(dtype, copy=False)


def seen(payload: Array, work: Work) -> Array:
    """What the others will see of a payload, so that error feedback knows of the rounding too."""
    if not work.half or payload.dtype != np.float32:
        return payload
    return from_wire(to_wire(payload, work), payload.dtype, work)
