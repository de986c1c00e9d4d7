"""The kernels of `gradiveq.exchange.kernels` as torch operations: a gradient on a device stays there.

No host synchronisation: shapes follow from lengths alone, and no element is looked at. All ranks of a group must be
alike, as the same operation on the same kind of device gives all of them the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.arrays.counter_random import Draw
from gradiveq.compressors.base import Compressor
from gradiveq.device.bits import copied
from gradiveq.exchange.flaws import flaw
from gradiveq.exchange.kernels import DrawOf
from gradiveq.exchange.parts import Part
from gradiveq.flatten import Block


class DeviceKernels:
    """Tensors on one device."""

    on_host = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def tensor(self, array: Any) -> Tensor:
        tensor: Tensor = array
        return tensor

    def array(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.device)

    def empty(self, length: int) -> Tensor:
        return torch.empty(length, dtype=torch.float32, device=self.device)

    def zeros(self, length: int) -> Tensor:
        return torch.zeros(length, dtype=torch.float32, device=self.device)

    def compress(self, compressor: Compressor, values: Tensor, draw: Draw, latest: Tensor) -> Tensor:
        return compressor.compress_tensor(values, draw)

    def decompress(self, compressor: Compressor, payload: Tensor, out: Tensor, draw: Draw, size: int = 1) -> None:
        compressor.decompress_tensor(payload, out, draw)

    def finish(self, compressor: Compressor, total: Tensor, size: int) -> None:
        compressor.finish_tensor(total, size)

    def pack(self, payloads: Sequence[Tensor], parts: Sequence[Part]) -> Tensor:
        if not payloads:
            return torch.empty(0, dtype=torch.uint8, device=self.device)
        return torch.cat([self.as_bytes(payload) for payload in payloads])

    def unpack(self, message: Tensor, parts: Sequence[Part], rank: int) -> Sequence[Tensor]:
        return message.split_with_sizes([_num_bytes(part) for part in parts], dim=-1)

    def add_gathered(self, parts: Sequence[Part], messages: Tensor, out: Tensor, draw_of: DrawOf) -> None:
        """All ranks' payloads of a part at once, as operations on short vectors take longer to be begun than to be
        done."""
        for part, rows in zip(parts, self.unpack(messages, parts, 0), strict=True):
            part.compressor.add_tensors(rows, out[part.where])

    def as_bytes(self, payload: Tensor) -> Tensor:
        return payload.view(torch.uint8)

    def from_bytes(self, message: Tensor, like: Tensor) -> Tensor:
        return message.clone().view(like.dtype)

    def all_finite(self, values: Tensor) -> Tensor:
        return values.isfinite().all()

    def choose(self, condition: Tensor, values: Tensor, other: Any) -> Tensor:
        return torch.where(condition, values, other)

    def flaw_of(self, values: Tensor, blocks: Sequence[Block], reason: int) -> Tensor:
        """The code of the last block of which there is one."""
        filled = [block for block in blocks if block.length]  # nothing has no largest element
        if not filled:
            return torch.zeros((), dtype=torch.int64, device=values.device)
        norms = torch.stack(torch._foreach_norm([values[block.where] for block in filled], torch.inf))
        codes = copied(np.array([flaw(reason, block.index) for block in filled]), values.device)
        return torch.where(norms.isfinite(), 0, codes).amax()

    def orthonormal(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        """QR decompositions (Householder's, in float64, all matrices of one shape at once).

        They have no step that depends on what it finds: column after column, as the host does it, would take about 20
        operations on the device for each. Signs may differ from the host's, and so may what replaces a column that
        depends on others; P Qᵀ differs by rounding.
        """
        found: dict[int, Tensor] = {}
        shapes: dict[torch.Size, list[int]] = {}
        for i, matrix in enumerate(matrices):
            shapes.setdefault(matrix.shape, []).append(i)
        for chosen in shapes.values():
            basis, _ = torch.linalg.qr(torch.stack([matrices[i] for i in chosen]).double())
            found.update(zip(chosen, basis.float().unbind(), strict=True))
        return [found[i] for i in range(len(matrices))]

    def normal(self, draw: Draw, shape: tuple[int, int]) -> Tensor:
        return copied(draw.generator(shared=True).standard_normal(shape, np.float32), self.device)

    def write_product(self, p: Tensor, q: Tensor, out: Tensor) -> None:
        out.copy_(p @ q.T)

    def subtract_product(self, p: Tensor, q: Tensor, out: Tensor) -> None:
        out -= p @ q.T


def _num_bytes(part: Part) -> int:
    return part.compressor.payload_bytes(part.length)
