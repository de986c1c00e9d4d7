"""Several ranks of the hook in one thread: their process groups carry out what all of them have begun."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.futures import Future

from gradiveq import here
from gradiveq.ddp.driver import Delivery, carried
from gradiveq.exchange.family import Family
from gradiveq.exchange.flaws import Codes
from gradiveq.exchange.requests import Iteration
from gradiveq.flatten import Block, Bucket
from tests.support.ddp_harness import staying


class Member:
    """A rank's process group: its collectives wait until all ranks have begun theirs."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size, self.device = rank, size, torch.device("cpu")
        self.begun: list[tuple[Tensor, Tensor | None]] = []

    def all_reduce(self, tensor: Tensor) -> Future[Any]:
        self.begun.append((tensor, None))
        return Future()

    def all_gather(self, tensor: Tensor) -> tuple[Tensor, Future[Any]]:
        out = torch.empty(self.size, len(tensor), dtype=tensor.dtype, device=tensor.device)
        self.begun.append((tensor, out))
        return out, Future()


def carry_out(members: Sequence[Member]) -> None:
    for calls in zip(*(member.begun for member in members), strict=True):
        inputs = torch.stack([tensor for tensor, _ in calls])
        for tensor, out in calls:
            if out is None:
                tensor.copy_(inputs.sum(0, dtype=tensor.dtype))
            else:
                out.copy_(inputs)
    for member in members:
        member.begun.clear()


def bucket_of(*shapes: tuple[int, ...]) -> Bucket:
    stops = np.cumsum([math.prod(shape) for shape in shapes]).tolist()
    blocks = [
        Block(
            f"layer{i}", stop - math.prod(shape), math.prod(shape), shape, False, i, tuple(torch.empty(shape).stride())
        )
        for i, (shape, stop) in enumerate(zip(shapes, stops, strict=True))
    ]
    return Bucket(tuple(blocks), stops[-1])


VECTORS = bucket_of((40,), (0,), (1300,), (9,), (1,))
#: Two matrices of one shape, one that has not the rank, and vectors.
MATRICES = bucket_of((12, 3, 3, 2), (12,), (7, 40), (0, 4), (40, 7), (2, 30), (12, 18), (1,))


class Ranks:
    """One bucket of some ranks, iteration by iteration.

    Args:
        families: by rank.
        on_device: whether a rank's gradient is exchanged by torch operations, by rank.
    """

    def __init__(
        self, families: Sequence[Family], bucket: Bucket, on_device: Sequence[bool], scale: float | None = None
    ) -> None:
        self.families, self.bucket, self.on_device, self.scale = families, bucket, on_device, scale
        self.members = [Member(rank, len(families)) for rank in range(len(families))]

    def exchange(self, iteration: int, gradients: Sequence[Tensor], count: bool = True) -> list[Delivery]:
        """The deliveries when all is over, their buffers the means; with `count`, memories are kept."""
        deliveries, carryings, now = [], [], Iteration(iteration)
        for family, member, gradient, there in zip(self.families, self.members, gradients, self.on_device, strict=True):
            codes, group = Codes(member.size, len(self.bucket.blocks)), cast(Any, member)
            delivery = Delivery(self.bucket, gradient.clone(), now, 2, 0, self.scale, group, codes)
            deliveries.append(delivery)
            with staying(there):
                carryings.append(carried(family, delivery))
        while None not in [next(one, None) for one in carryings]:  # all of them, one step
            carry_out(self.members)
        if not count:
            for family in self.families:
                family.skip()
            return deliveries
        following = [one for family in self.families if (one := family.accept(now)) is not None]
        if following:
            here.carry(following, ())
        return deliveries
