"""Exchanges of workers in one process, carried out round by round, to see what travels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gradiveq.exchange.kernels import HOST
from gradiveq.exchange.requests import Call, Exchange, Gather, Iteration, Round, Spread, Sum
from gradiveq.here import Here

Vector = npt.NDArray[np.float32]


def begun(group: Here, rank: int, gradient: Vector, number: int, lr: float = 1.0) -> tuple[Call, Exchange, Round]:
    """One worker's exchange up to its first round."""
    out = np.empty(group.bucket.length, np.float32)
    size = len(group.families)
    call = Call(group.bucket, Iteration(number, lr), HOST, rank, size, out=out, measured=True)
    exchange = group.families[rank].exchange(call, gradient)
    return call, exchange, next(exchange)


def sent(asked: Round) -> tuple[Sequence[Any], Any]:
    """Of a round of compressed payloads: those that are summed, and the message that everybody gets."""
    summed, gather = asked.requests
    assert isinstance(summed, Sum)
    assert isinstance(gather, Gather)
    return summed.payloads, gather.message


def through_a_master(group: Here, vectors: Sequence[Vector], number: int, lr: float = 1.0) -> tuple[Vector, Any]:
    """What a worker gets by way of a master, and the master's message; the workers are as before."""
    begins = [begun(group, rank, vector, number, lr) for rank, vector in enumerate(vectors)]
    payloads = [sent(asked) for _, _, asked in begins]
    totals = [one.copy() for one in payloads[0][0]]
    for others, _ in payloads[1:]:
        for total, other in zip(totals, others, strict=True):
            total += other
    call, exchange, first = begins[0]
    assert first.to_master
    assert not first.last
    (spread,) = exchange.send([totals, [message for _, message in payloads]]).requests
    assert isinstance(spread, Spread)
    message = spread.make()
    with pytest.raises(StopIteration) as end:
        exchange.send([message])
    assert end.value.value is call.out
    for family in group.families:
        family.skip()
    return call.out, message
