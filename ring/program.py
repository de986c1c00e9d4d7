"""What a worker does in a collective, in order: written down by the algorithm itself, run without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ring.algorithm import ChunkWork, ring, schedule, steps
from ring.codec import Array, Codec, Payload
from ring.segments import Chunk

SEND, WAIT, WAIT_SENT = "send", "wait", "wait sent"


class Instruction(NamedTuple):
    """One step of a program.

    Attributes:
        kind: SEND; WAIT for the predecessor's message; WAIT_SENT until an earlier one has left; else a computation.
        work: what it belongs to.
        amounts: of a computation, see `Codec.amounts`; "scale" are the bytes of a vector that a mean divides.
    """

    kind: str
    work: ChunkWork
    amounts: tuple[tuple[str, float], ...] = ()


#: What `Codec.amounts` is called with, and what it returns.
Amounts = Callable[[str, Array, int, Payload], Sequence[tuple[str, float]]]


def amounts_of(
    amounts: Amounts, kind: str, work: ChunkWork, function: Callable[..., Any], vector: Array, payload: Payload
) -> Sequence[tuple[str, float]]:
    """How much a computation that the algorithm asks its port for computes; `Codec.amounts`, or a mean's division.

    Args:
        vector, payload: as a whole; neither is looked into.
    """
    chunk = work.chunk
    values = vector[chunk.start : chunk.stop]
    if function is np.divide:
        return [("scale", values.nbytes)]
    return amounts(kind, values, chunk.start, payload[chunk.first_byte : chunk.last_byte])


class _Pending:
    """A message of which nothing is known, so that the algorithm says that it waits."""

    def Test(self) -> bool:
        return False


PENDING = _Pending()


class _Recorder:
    """The port of an algorithm that only says what it would do."""

    def __init__(self, amounts: Amounts, vector: Array, payload: Payload) -> None:
        self.operations: list[Instruction] = []
        self._amounts, self._vector, self._payload = amounts, vector, payload

    def receive(self, buffer: Payload, work: ChunkWork) -> _Pending:
        return PENDING

    def send(self, buffer: Payload, work: ChunkWork) -> _Pending:
        self.operations.append(Instruction(SEND, work))
        return PENDING

    def fetch(self, buffer: Payload, work: ChunkWork) -> Payload:
        return buffer

    def compute(self, kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
        amounts = amounts_of(self._amounts, kind, work, function, self._vector, self._payload)
        last = self.operations[-1] if self.operations else None
        if last is not None and (last.kind, last.work) == (kind, work):
            self.operations[-1] = last._replace(amounts=(*last.amounts, *amounts))
        else:
            self.operations.append(Instruction(kind, work, tuple(amounts)))


def record(
    codec: Codec,
    length: int,
    dtype: np.dtype[Any],
    operation: str,
    segments: Sequence[Sequence[Chunk]],
    rank: int,
    *,
    mean: bool,
    amounts: Amounts | None = None,
) -> list[Instruction]:
    """The program of one worker.

    Args:
        codec: it encodes and decodes nothing here.
        operation, segments: as for `ring.algorithm.schedule`; there is a segment for each worker.
        amounts: instead of the codec's own.
    Cost: the algorithm's own steps, no memory as long as the vector.
    """
    size = len(segments)
    first, last = steps(operation, size)
    num_bytes = max((chunk.last_byte for segment in segments for chunk in segment), default=0)
    vector: Array = np.broadcast_to(np.zeros(1, dtype), (length,))
    payload: Payload = np.broadcast_to(np.zeros(1, np.uint8), (num_bytes,))
    recorder = _Recorder(amounts or codec.amounts, vector, payload)
    for wait in ring(
        recorder,
        codec,
        vector,
        payload,
        [payload],
        schedule(operation, segments, rank, size),
        first=first,
        last=last,
        mean=mean,
        size=size,
    ):
        recorder.operations.append(Instruction(WAIT_SENT if wait.sending else WAIT, wait.work))
    return recorder.operations


def record_all(
    codec: Codec,
    length: int,
    dtype: np.dtype[Any],
    operation: str,
    segments: Sequence[Sequence[Chunk]],
    *,
    mean: bool,
) -> list[list[Instruction]]:
    """The programs of all workers, by rank; see `record`."""
    return [record(codec, length, dtype, operation, segments, rank, mean=mean) for rank in range(len(segments))]
