"""Payloads as a process group carries them, for the host's and the device's forms of compressors alike.

Sums: int16 becomes int32 (no backend adds int16), and where the bucket itself has 16 bits (a half-precision model, or
the fp16/bf16 wrappers) float32 payloads are sent in its type. Those of one type follow one another in one message.

What is gathered travels as in `gradiveq.message`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor
from torch.futures import Future

from gradiveq.compressors.base import Array
from gradiveq.ddp.scheme import Work


class Sums:
    """The messages of one bucket's sums, codes included.

    Args:
        payloads: by the index of their part, as compressors give them, on any device.
    """

    def __init__(self, work: Work, payloads: Mapping[int, Tensor]) -> None:
        self._work, self._dtypes = work, {i: payload.dtype for i, payload in payloads.items()}
        kinds: dict[torch.dtype, list[int]] = {}
        wires = {i: to_wire(payload, work) for i, payload in payloads.items()}
        for i, wire in wires.items():
            kinds.setdefault(wire.dtype, []).append(i)
        self._kinds = [[(i, len(wires[i])) for i in chosen] for chosen in kinds.values()]
        self._messages = []
        for kind, chosen in kinds.items():
            lengths = [len(wires[i]) for i in chosen]
            message = work.message(sum(lengths), kind)
            torch._foreach_copy_(message[: sum(lengths)].split_with_sizes(lengths), [wires[i] for i in chosen])
            self._messages.append(message)

    def begin(self) -> list[Future[Any]]:
        return [self._work.all_reduce(message) for message in self._messages]

    def hear(self) -> None:
        first = self._messages[0]
        self._work.hear(first, len(first) - self._work.codes.length)

    def totals(self, device: torch.device) -> Iterator[tuple[int, Tensor]]:
        """What each part's compressor decodes, once the sums are there."""
        for message, kind in zip(self._messages, self._kinds, strict=True):
            there, start = message.to(device), 0
            for i, length in kind:
                yield i, from_wire(there[start : start + length], self._dtypes[i], self._work)
                start += length


def to_wire(payload: Tensor, work: Work) -> Tensor:
    """As it is added."""
    if work.half and payload.dtype == torch.float32:
        return work.to_wire(payload)
    return payload.int() if payload.dtype == torch.int16 else payload


def from_wire(total: Tensor, dtype: torch.dtype, work: Work) -> Tensor:
    """The sum of payloads of this type, in that type again."""
    return work.from_wire(total) if work.half and dtype == torch.float32 else total.to(dtype)


def seen(payload: Tensor, work: Work) -> Tensor:
    """What the others will see of a payload, so that error feedback knows of the rounding too."""
    if not work.half or payload.dtype != torch.float32:
        return payload
    return from_wire(to_wire(payload, work), payload.dtype, work)


def tensor_of(payload: Array) -> Tensor:
    """The same memory; NumPy's bfloat16 is a stranger to torch."""
    if payload.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(payload.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(payload)


def array_of(tensor: Tensor) -> Array:
    """The inverse."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
