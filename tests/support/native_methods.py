"""Methods as torch operations, and the bits of their NumPy forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.compressors.base import Compressor, Draw, Float32
from gradiveq.exchange.kernels import HOST
from gradiveq.methods import Compressed, takes_mean
from gradiveq.specs import parse

SPECS = (
    "identity",
    "half",
    "half:bfloat16",
    "integer",
    "integer:1000.3:bits=16:rounding=stochastic",
    "integer:3:bits=8",
    "integer:1e30",
    "randomk:0.2",
    "randomk:0.7:unbiased=true",
    "topk:0.01",
    "topk:0.2",
    "topk:0.6",
    "topk:1",
    "topk:count=3",
    "sign",
    "sign:mean",
    "sign:scaled",
    "natural",
    "terngrad",
    "terngrad:2.5",
    "qsgd-gather",
    "qsgd-gather:3",
    "qsgd-gather:100:norm=max:bucket=64",
    "qsgd-gather:65536:bucket=512",
    "qsgd-gather:1:norm=max:bucket=7",
)
#: What vectors are made of: both zeros, denormals, the ends of float32, few magnitudes and many.
TINY, HUGE = np.float32(1e-45), np.finfo(np.float32).max
PALETTES: dict[str, Sequence[Any]] = {
    "zeros": (0.0, -0.0),
    "denormals": (0.0, TINY, -3 * TINY, 1e-40, -9e-39, 1.2e-38),
    "ends": (HUGE, -HUGE, 3e38, 2.0**127, -1e-38, -0.0, TINY, 1.0),
    "equal": (0.3, -0.3),
    "few": (1.0, -2.0, 2.0, 0.5, 0.0),
}


def compressor_of(spec: str) -> Compressor:
    method = parse(spec)
    assert isinstance(method, Compressed)
    return method.compressor


def assert_same_bits(got: Tensor, expected: Any) -> None:
    theirs = HOST.array(got.cpu().contiguous())
    assert (theirs.dtype, theirs.shape) == (expected.dtype, expected.shape)
    assert theirs.tobytes() == expected.tobytes(), f"{(theirs != expected).sum()} of {theirs.size} differ"


def check_bits(spec: str, values: Float32, draw: Draw, device: torch.device) -> None:
    """Compress, decompress, add and finish on the device and in NumPy."""
    compressor = compressor_of(spec)
    there = torch.from_numpy(values).to(device)
    payload = compressor.compress(values, draw)
    assert_same_bits(compressor.compress_tensor(there, draw), payload)
    assert_same_bits(there, values)

    expected, got = np.full(len(values), 7, np.float32), torch.full((len(values),), 7.0, device=device)
    compressor.decompress(payload, expected, draw)
    compressor.decompress_tensor(HOST.tensor(payload).to(device), got, draw)
    assert_same_bits(got, expected)
    if compressor.collective == "all_gather":  # of two ranks, at any byte of a message
        other = compressor.compress(values[::-1].copy(), draw)
        messages = np.stack([np.concatenate([np.zeros(3, np.uint8), one]) for one in (payload, other)])
        with np.errstate(over="ignore"):
            for one in (payload, other):
                compressor.add_to(one, expected, draw, np.empty_like(expected))
        compressor.add_tensors(torch.from_numpy(messages).to(device)[:, 3:], got)
        assert_same_bits(got, expected)
    compressor.finish(expected, 3)
    compressor.finish_tensor(got, 3)
    assert_same_bits(got, expected)


METHODS = {
    **{spec: parse(f"{spec}+ef" if takes_mean(compressor_of(spec)) else spec) for spec in SPECS},
    "whole buckets": parse("topk:0.1@model+ef"),
    "several": parse("topk:0.1/layer0=half/layer3=identity/layer4=integer:bits=16+ef"),
    "both ways": parse("sign:scaled^topk:0.1"),
    "both ways, added": parse("randomk:0.5^terngrad"),
}
