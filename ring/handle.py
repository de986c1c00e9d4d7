"""A worker's handle: its place in the ring and the collectives, whatever driver carries them out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ring.codec import Array, Codec, IdentityCodec
from ring.plan import CHUNK_BYTES, CollectivePlan, Planner, Stats
from ring.segments import check_chunk_bytes
from ring.timeline import Timeline

IDENTITY = IdentityCodec()

T = TypeVar("T")
Own = TypeVar("Own")


class Ring(ABC):
    """One worker of a ring. Every worker calls the same collectives in the same order with the same arguments.

    Vectors are contiguous one-dimensional NumPy arrays of float16, float32, float64 or ml_dtypes' bfloat16, of any
    length, and are worked on in place. Those of int8, int16 and int32 can be summed and gathered, uint8 gathered. After
    `all_reduce` and `all_gather` every worker holds the same bits, after `reduce_scatter` its own segment. After a
    RingError a ring is of no further use: messages of the failed call may still be on their way.

    Attributes:
        rank, size: as in MPI.
        chunk_bytes: bytes of payload in one message, to within a unit of the codec, unless a call says otherwise.
    Raises:
        ValueError: `chunk_bytes` is below 1.
    """

    def __init__(self, rank: int, size: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        check_chunk_bytes(chunk_bytes)
        self.rank, self.size, self.chunk_bytes = rank, size, chunk_bytes
        self._planner = Planner(rank, size)

    def empty(self, length: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """Make a vector, uninitialised. Every worker calls this with the same arguments.

        A driver may place it where neighbours can read it without a copy; collectives take other vectors as well.

        Returns:
            Array of shape (length,) and of this dtype, contiguous.
        Raises:
            ValueError: the length is negative.
            TypeError: `dtype` is none.
        """
        return np.empty(length, dtype)

    def all_reduce(
        self,
        vector: Array,
        codec: Codec = IDENTITY,
        *,
        op: str = "sum",
        chunk_bytes: int | None = None,
        timeline: Timeline | None = None,
    ) -> Stats:
        """Replace `vector` by the sum (or mean) over all workers.

        Args:
            vector: shape (length,). Overwritten, on every rank with the same bits.
            codec: encodes the vector; by default it travels as it is.
            op: "sum" or "mean".
            chunk_bytes: bytes of payload in one message; `sys.maxsize` for one message per segment and step.
            timeline: gets the seconds of "encode", "add" (or "recode"), "decode" and "wait".
        Returns:
            Bytes and messages that this rank sent.
        Raises:
            TypeError, ValueError: this rank's arguments are invalid; nothing was sent.
            RingMismatch: ranks disagree about operation, length, dtype, codec or chunking.
            RingTimeout: a neighbour did nothing for as long as the ring's deadline allows.
            RingError: another rank failed.
        Cost: 2(N-1) steps; 2(N-1)/N of the payload's bytes sent per rank where N divides it.
        """
        plan = self._plan("all_reduce", vector, codec, op, chunk_bytes, None)
        return self._run(plan, codec, vector, timeline)

    def reduce_scatter(
        self,
        vector: Array,
        codec: Codec = IDENTITY,
        *,
        op: str = "sum",
        chunk_bytes: int | None = None,
        bounds: Sequence[int] | None = None,
        timeline: Timeline | None = None,
    ) -> Stats:
        """Finish segment (rank + 1) mod N on each rank; the rest of `vector` is left in an unspecified state.

        Args and errors as for `all_reduce`, and
            bounds: N + 1 elements at which the segments are cut; by default such that payloads are equal.
        Cost: N-1 steps; (N-1)/N of the payload's bytes sent per rank where N divides it.
        """
        plan = self._plan("reduce_scatter", vector, codec, op, chunk_bytes, bounds)
        return self._run(plan, codec, vector, timeline)

    def all_gather(
        self,
        vector: Array,
        codec: Codec = IDENTITY,
        *,
        chunk_bytes: int | None = None,
        bounds: Sequence[int] | None = None,
        timeline: Timeline | None = None,
    ) -> Stats:
        """Fill `vector` with everybody's segments; rank r contributes segment (r + 1) mod N, the one it finished.

        Args, errors and cost as for `reduce_scatter`.
        """
        plan = self._plan("all_gather", vector, codec, "sum", chunk_bytes, bounds)
        return self._run(plan, codec, vector, timeline)

    def all_reduce_directly(self, buffer: Any, *, timeline: Timeline | None = None) -> Stats:
        """Sum a buffer that is no NumPy vector, such as one in a GPU's memory, where the driver can: `ring.mpi`."""
        raise TypeError(f"{type(self).__name__} sums NumPy vectors; a ring over MPI gives other buffers to MPI")

    def barrier(self) -> None:
        """Wait until every worker is here. Collective.

        Raises:
            RingMismatch, RingTimeout, RingError: as `all_reduce`.
        Cost: that of an `all_reduce` of 4 bytes: 2(N-1) steps.
        """
        self.all_reduce(np.zeros(1, np.float32))

    def rows_of_all(self, row: Sequence[float]) -> npt.NDArray[np.float64]:
        """Exchange a few numbers: the rows of all workers, of shape (size, len(row)). Collective.

        Rows are of the same length everywhere. Errors and cost as for `all_reduce` of 8·size·len(row) bytes.
        """
        rows = np.zeros((self.size, len(row)))
        rows[self.rank] = row
        self.all_reduce(rows.reshape(-1))
        return rows

    def shared(self, make: Callable[[], T]) -> T:
        """One object for all workers of this process: what the first of them makes. Every worker calls this.

        Args:
            make: called without arguments, once in each process; here each worker is a process.
        """
        return make()

    def compute_once(
        self,
        row: Sequence[float],
        own: Own,
        function: Callable[[npt.NDArray[np.float64], Mapping[int, Own]], Sequence[T]],
    ) -> T:
        """Compute something from the rows of all workers, once in each process. Collective.

        Args:
            row: this worker's numbers, as for `rows_of_all`.
            own: what else is needed of this worker; it doesn't leave the process.
            function: gets all rows, of shape (size, len(row)), and `own` of each worker of this process by its rank;
                returns a value for each rank. That of any worker is called, so they must be alike.
        Returns:
            This worker's value.
        Errors and cost as for `rows_of_all`, and whatever `function` raises, on every worker of the process.
        """
        return function(self.rows_of_all(row), {self.rank: own})[self.rank]

    def _plan(
        self,
        operation: str,
        vector: Array,
        codec: Codec,
        op: str,
        chunk_bytes: int | None,
        bounds: Sequence[int] | None,
    ) -> CollectivePlan:
        return self._planner.plan(
            operation, vector, codec, op, self.chunk_bytes if chunk_bytes is None else chunk_bytes, bounds
        )

    def _run(self, plan: CollectivePlan, codec: Codec, vector: Array, timeline: Timeline | None) -> Stats:
        if timeline is not None:
            timeline.begin_call()
        return self._execute(plan, codec, vector, timeline)

    @abstractmethod
    def _execute(self, plan: CollectivePlan, codec: Codec, vector: Array, timeline: Timeline | None) -> Stats:
        """Run `ring.algorithm.ring` as planned."""
