"""Plans of collectives, the same for every driver: checked arguments, where the vector is cut, and memory."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ring.algorithm import ChunkWork, Port, Wait, ring, schedule, steps
from ring.codec import BYTES, DTYPES, INTEGERS, Array, Codec, Hop, Payload
from ring.segments import Chunk, check_chunk_bytes, cut_segments

#: Default payload of a message: large enough to make the cost of a message small, small enough to pipeline and to stay
#: in a second-level cache.
CHUNK_BYTES = 512 * 1024
#: Receives that are posted ahead.
POSTED_RECEIVES = 3


@dataclass(frozen=True)
class Stats:
    """Traffic of one rank in one call.

    Attributes:
        bytes_sent: bytes of payload; headers are not counted.
        messages: messages that carried them.
    """

    bytes_sent: int
    messages: int


@dataclass
class CollectivePlan:
    """One call's cuts and memory; the same for every call of equal arguments.

    Attributes:
        operation: "all_reduce", "reduce_scatter" or "all_gather".
        description: the call in words, which ranks compare.
        mean: whether the sum is divided by the number of workers.
        first, last: the steps of the ring that the operation runs.
        segments: the chunks of each segment.
        work: this rank's chunks and steps, in order.
        sent: the chunks that this rank sends, in order.
        arriving: the chunks that the predecessor sends, in order.
        stats: bytes and messages of `sent`.
        num_bytes: length of the whole vector's payload.
        inbox: memory for chunks that arrive, shape (posted receives, largest chunk).
        payload: memory for the payload; None if that is the vector's own.
        staged: whether the codec is.
    """

    operation: str
    description: str
    mean: bool
    first: int
    last: int
    segments: Sequence[Sequence[Chunk]]
    work: Sequence[ChunkWork]
    sent: Sequence[Chunk]
    arriving: Sequence[Chunk]
    stats: Stats
    num_bytes: int
    inbox: Sequence[Payload]
    payload: Payload | None
    staged: bool

    @property
    def greeting_work(self) -> ChunkWork:
        """The work that a wait for the call's first message counts for."""
        return self.work[0] if self.work else ChunkWork(self.first, 0, Chunk(0, 0, 0, 0), Hop(0, 1, self.first))

    def start(self, port: Port, codec: Codec, vector: Array, size: int) -> Generator[Wait, None, None]:
        """The algorithm, ready to run on `vector`."""
        payload = vector.view(np.uint8) if self.payload is None else self.payload
        return ring(
            port,
            codec,
            vector,
            payload,
            self.inbox,
            self.work,
            first=self.first,
            last=self.last,
            mean=self.mean,
            size=size,
        )


def _brief(text: str, most: int = 160) -> str:
    """The text, or if it is long its beginning and a digest, by which texts that differ anywhere are told apart."""
    if len(text) <= most:
        return text
    return (
        f"{text[:most]}… ({len(text)} characters, digest {hashlib.blake2b(text.encode(), digest_size=8).hexdigest()})"
    )


class Planner:
    """Makes and keeps the plans of one rank.

    Memory: a few chunks per plan, and a whole payload where the codec does not work in place. Only the last
    `keep` plans are kept, because a codec that is fitted anew is a new plan.
    """

    def __init__(self, rank: int, size: int, keep: int = 8) -> None:
        self.rank, self.size, self._keep = rank, size, keep
        self._plans: OrderedDict[tuple[Any, ...], CollectivePlan] = OrderedDict()

    def plan(
        self, operation: str, vector: Array, codec: Codec, op: str, chunk_bytes: int, bounds: Sequence[int] | None
    ) -> CollectivePlan:
        """The plan of a call, made or kept.

        Raises:
            ValueError, TypeError: this rank's own arguments are invalid.
        """
        if not isinstance(vector, np.ndarray):
            raise TypeError(f"`vector` must be a NumPy array, got {type(vector).__name__}")
        if not isinstance(codec, Codec):
            raise TypeError(
                f"`codec` must be a ring.Codec, got {type(codec).__name__}: a payload that can be neither added nor "
                "encoded again on its way is gathered (`all_gather` of uint8)"
            )
        key = (
            operation,
            vector.shape,
            vector.dtype,
            codec.describe(vector.dtype),
            op,
            chunk_bytes,
            None if bounds is None else tuple(bounds),
        )
        flags = vector.flags
        if not (flags.c_contiguous and flags.writeable):
            raise ValueError("`vector` must be contiguous and writable, got one that is not")
        plan = self._plans.get(key)
        if plan is not None:
            self._plans.move_to_end(key)
        else:
            plan = self._plans[key] = self._make(operation, vector, codec, op, chunk_bytes, bounds)
            if len(self._plans) > self._keep:
                self._plans.popitem(last=False)
        return plan

    def _make(
        self, operation: str, vector: Array, codec: Codec, op: str, chunk_bytes: int, bounds: Sequence[int] | None
    ) -> CollectivePlan:
        if not vector.dtype.isnative:
            raise TypeError(f"`vector` must have this machine's byte order, got dtype {vector.dtype.str}")
        if vector.ndim != 1:
            raise ValueError(f"`vector` must have one dimension, got shape {vector.shape}")
        dtype = vector.dtype.name
        known = (*DTYPES, *INTEGERS, *((BYTES,) if operation == "all_gather" else ()))
        if dtype not in known:
            only = f"; {BYTES} can be gathered, not added" if dtype == BYTES else ""
            raise TypeError(f"`vector` must be one of {', '.join(known)}, got {dtype}{only}")
        if op not in ("sum", "mean"):
            raise ValueError(f"`op` must be 'sum' or 'mean', got {op!r}")
        if op == "mean" and dtype in INTEGERS:
            raise ValueError(f"`op` must be 'sum' for {dtype}, whose mean is none, got 'mean'")
        check_chunk_bytes(chunk_bytes)
        segments = cut_segments(codec.regions(len(vector), vector.dtype), self.size, chunk_bytes, bounds)
        first, last = steps(operation, self.size)
        work = schedule(operation, segments, self.rank, self.size)
        sent = [item.chunk for item in work if item.step < last]
        chunks = [chunk for segment in segments for chunk in segment]
        num_bytes = sum(chunk.num_bytes for chunk in chunks)
        return CollectivePlan(
            operation=operation,
            description=f"{operation}({op}) of {len(vector)} {vector.dtype.name}, chunks of {chunk_bytes} bytes, "
            + ("" if bounds is None else f"segments at {_brief(str(list(bounds)))}, ")
            + f"as {_brief(codec.describe(vector.dtype))}",
            mean=op == "mean",
            first=first,
            last=last,
            segments=segments,
            work=work,
            sent=sent,
            arriving=[item.chunk for item in work if item.step > first],
            stats=Stats(sum(chunk.num_bytes for chunk in sent), len(sent)),
            num_bytes=num_bytes,
            inbox=list(np.empty((POSTED_RECEIVES, max((c.num_bytes for c in chunks), default=0)), np.uint8)),
            payload=None if codec.in_place else np.empty(num_bytes, np.uint8),
            staged=codec.staged,
        )
