"""What a worker does in a collective, in order: written down by the algorithm itself, run without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ring.algorithm import Work, ring
from ring.codec import Array, Codec, Payload

SEND, WAIT, WAIT_SENT = "send", "wait", "wait sent"


class Operation(NamedTuple):
    """One step of a program.

    Attributes:
        kind: SEND; WAIT for the predecessor's message; WAIT_SENT until an earlier one has left; else a computation.
        work: what it belongs to.
        amounts: of a computation, see `Codec.amounts`; "scale" are the bytes of a vector that a mean divides.
    """

    kind: str
    work: Work
    amounts: tuple[tuple[str, float], ...] = ()


def amounts_of(
    codec: Codec, kind: str, work: Work, function: Callable[..., Any], vector: Array, payload: Payload
) -> Sequence[tuple[str, float]]:
    """How much a computation that the algorithm asks its port for computes; `Codec.amounts`, or a mean's division.

    Args:
        vector, payload: as a whole; neither is looked into.
    """
    chunk = work.chunk
    values = vector[chunk.start : chunk.stop]
    if function is np.divide:
        return [("scale", values.nbytes)]
    return codec.amounts(kind, values, chunk.start, payload[chunk.first_byte : chunk.last_byte])


class _Pending:
    """A message of which nothing is known, so that the algorithm says that it waits."""

    def Test(self) -> bool:
        return False


PENDING = _Pending()


class _Recorder:
    """The port of an algorithm that only says what it would do."""

    def __init__(self, codec: Codec, vector: Array, payload: Payload) -> None:
        self.operations: list[Operation] = []
        self._codec, self._vector, self._payload = codec, vector, payload

    def receive(self, buffer: Payload, work: Work) -> _Pending:
        return PENDING

    def send(self, buffer: Payload, work: Work) -> _Pending:
        self.operations.append(Operation(SEND, work))
        return PENDING

    def fetch(self, buffer: Payload, work: Work) -> Payload:
        return buffer

    def compute(self, kind: str, work: Work, function: Callable[..., Any], *args: Any) -> None:
        amounts = amounts_of(self._codec, kind, work, function, self._vector, self._payload)
        last = self.operations[-1] if self.operations else None
        if last is not None and (last.kind, last.work) == (kind, work):
            self.operations[-1] = last._replace(amounts=(*last.amounts, *amounts))
        else:
            self.operations.append(Operation(kind, work, tuple(amounts)))


def record(
    codec: Codec, length: int, dtype: np.dtype[Any], work: Sequence[Work], *,
    first: int, last: int, mean: bool, size: int,
) -> list[Operation]:  # fmt: skip
    """The program of the worker whose `work` this is; see `ring.algorithm.ring` for the other arguments.

    Cost: the algorithm's own steps, no memory as long as the vector.
    """
    num_bytes = max((item.chunk.last_byte for item in work), default=0)
    vector: Array = np.broadcast_to(np.zeros(1, dtype), (length,))
    payload: Payload = np.broadcast_to(np.zeros(1, np.uint8), (num_bytes,))
    recorder = _Recorder(codec, vector, payload)
    for wait in ring(
        recorder, codec, vector, payload, [payload], work, first=first, last=last, mean=mean, size=size
    ):  # fmt: skip
        recorder.operations.append(Operation(WAIT_SENT if wait.sending else WAIT, wait.work))
    return recorder.operations
