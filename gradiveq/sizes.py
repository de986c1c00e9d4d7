"""What methods send, from sizes alone: the driver that carries nothing.

A family's own code runs on torch's meta device, whose tensors have shapes and no elements; what it asks for is counted.
Bounds, where a compressor's size depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradiveq.arrays.counter_random import Draw
from gradiveq.compressors.base import Compressor
from gradiveq.device.kernels import DeviceKernels
from gradiveq.exchange.families import make_family
from gradiveq.exchange.requests import Call, Exchange, Gather, Iteration, Round, Sum
from gradiveq.flatten import Block, Bucket, slice_sizes
from gradiveq.methods import GradiVeQ, Method
from gradiveq.pca.basis import Basis, LayerBasis
from gradiveq.pca.coding import Bases
from gradiveq.pca.config import groups, shared_floats


class Handed(NamedTuple):
    """Bytes that one rank hands to collectives of each kind."""

    all_reduce: float = 0.0
    all_gather: float = 0.0
    broadcast: float = 0.0

    def plus(self, other: Handed) -> Handed:
        return Handed(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Handed:
        return Handed(*(factor * value for value in self))

    def sent(self, size: int) -> float:
        """Bytes of it that a rank sends: 2(N-1)/N of what is summed, N-1 times what is gathered, and on average (N-1)/N
        of what is broadcast. Of a single rank, what one of two would."""
        others = max(2, size) - 1
        return others * (self.all_gather + (2 * self.all_reduce + self.broadcast) / (others + 1))


class SizeKernels(DeviceKernels):
    """Shapes and types of arrays, without their elements."""

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))

    def compress(self, compressor: Compressor, values: Tensor, draw: Draw, latest: Tensor) -> Tensor:
        return torch.empty(compressor.payload_bytes(len(values)), dtype=torch.uint8, device=self.device)

    def decompress(self, compressor: Compressor, payload: Tensor, out: Tensor, draw: Draw, size: int = 1) -> None:
        """Nothing: payloads have the right number of bytes, but no compressor's type."""

    def orthonormal(self, matrices: Sequence[Tensor]) -> list[Tensor]:
        return list(matrices)

    def normal(self, draw: Draw, shape: tuple[int, int]) -> Tensor:
        return torch.empty(shape, device=self.device)


def handed(method: Method | Compressor, blocks: Sequence[Block], size: int = 2) -> Handed:
    """What a rank hands over in an iteration that is compressed, without codes and control values.

    Args:
        blocks: of the model, as if they were in one vector.
        size: number of workers.
    Raises:
        ValueError: it depends on the data how many components GradiVeQ sends.
    """
    if isinstance(method, GradiVeQ):
        bases = Bases(sized_bases(method, blocks))
        floats = sum(block.length for block in blocks if block.name not in bases.by_name)
        return Handed(all_reduce=4 * floats + sum(basis.payload_bytes for basis in bases.by_name.values()))
    family = make_family(method, blocks, rank=0, size=size, min_ratio=1.0)
    length = blocks[-1].stop if blocks else 0
    kernels = SizeKernels()
    call = Call(Bucket(tuple(blocks), length), Iteration(0), kernels, 0, size, out=kernels.zeros(length), wanted=False)
    return _counted(family.exchange(call, kernels.zeros(length)), size)


def _counted(exchange: Exchange, size: int) -> Handed:
    total, results = Handed(), None
    while True:
        try:
            asked: Round = next(exchange) if results is None else exchange.send(results)
        except StopIteration:
            return total
        results = []
        for request in asked.requests:
            answer: Any = None
            if isinstance(request, Sum):
                total = total.plus(Handed(all_reduce=sum(payload.nbytes for payload in request.payloads)))
                answer = list(request.payloads)
            elif isinstance(request, Gather):
                total = total.plus(Handed(all_gather=request.message.nbytes))
                answer = request.message.expand(size, -1)
            results.append(answer)


def bases_handed(method: GradiVeQ, blocks: Sequence[Block], samples: int) -> Handed:
    """What is handed over once a window, to agree on the bases: everybody's share is broadcast."""
    sizes = slice_sizes(blocks, method.slice_size)
    floats = 0
    for block in blocks:
        if block.compressed:
            k = sizes[block.name]
            cut = groups(block.name, block.length, k, method.reuse)
            floats += len(cut) * shared_floats(method.pca, _components(method, k), k, samples)
    return Handed(broadcast=4.0 * floats)


def sized_bases(
    method: GradiVeQ, blocks: Sequence[Block], drawn: dict[tuple[int, int], Basis] | None = None
) -> list[LayerBasis]:
    """A basis for each layer, of the shape that a fit would give it, without elements of its own.

    Args:
        drawn: bases by (d, K) to be used instead of zeros.
    Raises:
        ValueError: it depends on the data how many components there will be.
    """
    sizes, zero = slice_sizes(blocks, method.slice_size), np.float32(0)
    bases = []
    for block in blocks:
        if block.compressed:
            k = sizes[block.name]
            d = _components(method, k)
            basis = (drawn or {}).get((d, k))
            if basis is None:
                basis = Basis(np.broadcast_to(zero, (d, k)), np.broadcast_to(zero, d), float(k))
            cut = groups(block.name, block.length, k, method.reuse)
            mean = np.broadcast_to(zero, block.length)
            bases.append(LayerBasis(block.name, block.length, k, mean, cut, (basis,) * len(cut)))
    return bases


def _components(method: GradiVeQ, slice_size: int) -> int:
    wanted = method.pca.wanted_components(slice_size)
    if wanted is None:
        raise ValueError("with a loss threshold it depends on the data what GradiVeQ sends: give it a ratio")
    return wanted
