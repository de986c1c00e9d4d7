"""All workers in one process, without a ring or a process group: for tests, experiments and the probe.

Gathered payloads give the bits that a ring gives; sums are added in the order of the ranks, where a ring adds each
segment in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from gradiveq.arrays.float32 import Float32
from gradiveq.exchange.error_memory import Measures
from gradiveq.exchange.family import Family
from gradiveq.exchange.kernels import HOST, overflows_allowed
from gradiveq.exchange.requests import MASTER, Call, Compare, Exchange, Gather, Iteration, Round, Spread, Sum
from gradiveq.flatten import Bucket
from gradiveq.pca.coding import Bases


class Here:
    """Workers of one method and one vector.

    Args:
        family: makes a rank's side; called once for each.
        bucket: what the vector holds.
        size: number of workers.

    Attributes:
        families: by rank.
        measures: by rank, of the last aggregation.
    """

    def __init__(self, family: Callable[[int], Family], bucket: Bucket, size: int) -> None:
        self.families, self.bucket = [family(rank) for rank in range(size)], bucket
        self.measures: list[Measures | None] = [None] * size

    def aggregate(self, gradients: Sequence[Float32], out: Float32, number: int, lr: float = 1.0) -> None:
        """What an aggregator does in one iteration.

        Args:
            gradients: by rank, finite float32 of shape (length,). Not modified.
            out: float32 of shape (length,): what every worker would have; overwritten.
            number: of the iteration, from 0 on.
            lr: learning rate of the step that follows.
        Raises:
            OverflowError: a gradient isn't finite together with what is remembered, or the mean isn't; no worker's
                state has changed.
        """
        size = len(self.families)
        times = [Iteration(number, lr) for _ in range(size)]
        calls = [
            Call(
                self.bucket,
                now,
                HOST,
                rank,
                size,
                out=out if rank == 0 else None,
                wanted=rank == 0,  # the others would compute the same
                measured=True,
            )
            for rank, now in enumerate(times)
        ]
        exchanges = [
            family.exchange(call, gradient)
            for family, call, gradient in zip(self.families, calls, gradients, strict=True)
        ]
        mean = carry(exchanges, calls)
        for call in calls:
            if call.flaw:
                self._skip()
                raise OverflowError(
                    f"gradient and memory of rank {call.rank} together overflow float32 in iteration {number}"
                )
        if not np.isfinite(mean).all():
            self._skip()
            raise OverflowError(f"the mean of what the workers send overflows float32 in iteration {number}")
        if mean is not out:
            out[:] = mean
        following = [family.accept(now, out) for family, now in zip(self.families, times, strict=True)]
        self.measures = [now.measures for now in times]
        if following[0] is not None:
            carry([one for one in following if one is not None], ())

    def _skip(self) -> None:
        for family in self.families:
            family.skip()

    def state_dict(self) -> dict[str, Any]:
        return {"workers": [family.state_dict() for family in self.families]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for family, part in zip(self.families, state["workers"], strict=True):
            family.load_state_dict(part)


def carry(exchanges: Sequence[Exchange], calls: Sequence[Call]) -> Any:
    """Run the workers' exchanges side by side, to their end.

    Args:
        calls: of gradients' exchanges, by rank; none for what follows an iteration.
    Returns:
        What the first one ends with; None if a worker finds a flaw.
    """
    results: list[list[Any]] | None = None
    while True:
        rounds: list[Round] = []
        ended: list[Any] = []
        for rank, exchange in enumerate(exchanges):
            try:
                rounds.append(next(exchange) if results is None else exchange.send(results[rank]))
            except StopIteration as end:
                ended.append(end.value)
        if ended:
            return ended[0]
        if any(call.flaw for call in calls):
            return None
        with overflows_allowed():
            answers = [_answers([one.requests[i] for one in rounds], calls) for i in range(len(rounds[0].requests))]
        results = [[answer[rank] for answer in answers] for rank in range(len(exchanges))]


def _answers(requests: Sequence[Any], calls: Sequence[Call]) -> list[Any]:
    """The workers' results of one request, by rank: the same arrays for all."""
    first, size = requests[0], len(requests)
    match first:
        case Sum(codec=None):
            payloads = zip(*(request.payloads for request in requests), strict=True)
            return [[_total(of_all, first.mean) for of_all in payloads]] * size
        case Sum(codec=Bases()):
            return [[_coded(requests, calls)]] * size
        case Sum():
            return [[_total([request.payloads[0] for request in requests], True)]] * size
        case Gather():
            return [[request.message for request in requests]] * size
        case Spread():
            return [requests[MASTER].make()] * size
        case Compare():
            for rank, request in enumerate(requests):
                if (request.numbers != first.numbers).any():
                    raise RuntimeError(f"what ranks 0 and {rank} hold of {', '.join(first.names)} differs")
    return [None] * size


def _total(payloads: Sequence[Any], mean: bool) -> Any:
    total = payloads[0].copy()
    for payload in payloads[1:]:
        total += payload
    if mean:
        total /= total.dtype.type(len(payloads))
    return total


def _coded(requests: Sequence[Sum], calls: Sequence[Call]) -> Any:
    """The mean of vectors that are projected on bases."""
    device = torch.device("cpu")
    codings = [
        request.codec.coding(call.bucket, device)  # type: ignore[union-attr]
        for request, call in zip(requests, calls, strict=True)
    ]
    payloads = [
        coding.encode(torch.from_numpy(request.payloads[0])).numpy()
        for coding, request in zip(codings, requests, strict=True)
    ]
    mean = np.empty(calls[0].bucket.length, np.float32)
    codings[0].decode(torch.from_numpy(_total(payloads, True)), torch.from_numpy(mean))
    for call, request in zip(calls, requests, strict=True):
        call.now.ratio = request.payloads[0].nbytes / payloads[0].nbytes
    return mean
