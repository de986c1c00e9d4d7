"""Programs: what a worker does in a collective, in order, recorded from the algorithm as it runs without data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ring.algorithm import ChunkWork, ring, schedule, steps
from ring.codec import Array, Codec, Payload
from ring.segments import Chunk

SEND, WAIT, WAIT_SENT = "send", "wait", "wait sent"


class Instruction(NamedTuple):
    """One instruction of a program.

    Attributes:
        kind: SEND; WAIT for the predecessor's message; WAIT_SENT until an earlier one has left; else a computation.
        work: the chunk and step that it is for.
        amounts: how much is computed, as `Codec.amounts` says; "scale" are the bytes of a vector that a mean divides.
    """

    kind: str
    work: ChunkWork
    amounts: tuple[tuple[str, float], ...] = ()


#: The type of `Codec.amounts`.
Amounts = Callable[[str, Array, int, Payload], Sequence[tuple[str, float]]]


def amounts_of(
    amounts: Amounts, kind: str, work: ChunkWork, function: Callable[..., Any], vector: Array, payload: Payload
) -> Sequence[tuple[str, float]]:
    """Amounts of a computation that the algorithm asks its port for: `Codec.amounts`, or those of a mean's division.

    Args:
        amounts: the codec's, or what is called instead.
        kind, work, function: as `Port.compute` gets them.
        vector, payload: the whole vector and its payload; neither is looked into.
    """
    chunk = work.chunk
    values = vector[chunk.start : chunk.stop]
    if function is np.divide:
        return [("scale", values.nbytes)]
    return amounts(kind, values, chunk.start, payload[chunk.first_byte : chunk.last_byte])


class _Pending:
    """A request that is never complete, so that the algorithm yields every wait."""

    def Test(self) -> bool:
        return False


PENDING = _Pending()


class _Recorder:
    """Port that writes down what the algorithm asks for, and does none of it."""

    def __init__(self, amounts: Amounts, vector: Array, payload: Payload) -> None:
        self.instructions: list[Instruction] = []
        self._amounts, self._vector, self._payload = amounts, vector, payload

    def receive(self, buffer: Payload, work: ChunkWork) -> _Pending:
        return PENDING

    def send(self, buffer: Payload, work: ChunkWork) -> _Pending:
        self.instructions.append(Instruction(SEND, work))
        return PENDING

    def fetch(self, buffer: Payload, work: ChunkWork) -> Payload:
        return buffer

    def compute(self, kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
        amounts = amounts_of(self._amounts, kind, work, function, self._vector, self._payload)
        last = self.instructions[-1] if self.instructions else None
        if last is not None and (last.kind, last.work) == (kind, work):
            self.instructions[-1] = last._replace(amounts=(*last.amounts, *amounts))
        else:
            self.instructions.append(Instruction(kind, work, tuple(amounts)))


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
    """Record the program of one worker.

    Args:
        codec: the vector's codec, which encodes and decodes nothing here.
        operation, segments: as for `ring.algorithm.schedule`; there is a segment for each worker.
        amounts: called instead of the codec's own.
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
        recorder.instructions.append(Instruction(WAIT_SENT if wait.sending else WAIT, wait.work))
    return recorder.instructions


def record_all(
    codec: Codec,
    length: int,
    dtype: np.dtype[Any],
    operation: str,
    segments: Sequence[Sequence[Chunk]],
    *,
    mean: bool,
) -> list[list[Instruction]]:
    """Record the programs of all workers, by rank; see `record`."""
    return [record(codec, length, dtype, operation, segments, rank, mean=mean) for rank in range(len(segments))]
