"""Compressors as an aggregator's strategy: what `gradiveq.exchange` says, over a ring.

    1. encode          each part of this worker's gradient, corrected by its memory
    2. all-gather      4 bytes a worker: the length of what it has to be gathered, or that its gradient is not finite.
                       In that case all stop here.
    3. all-reduce      what can be added, a vector for each dtype
    4. all-gather      the other payloads, those of a worker in one message
    5. decode          everybody's payloads, and take the mean: the same bits on all

Step 2 is left out where no length depends on the data. Then a worker whose gradient is not finite sends zeros, and says
so in one more element of the first vector of step 3, in which all others have 0 (as many fit in its type as payloads
may be added), or where nothing is added, in one more byte of its message in step 4.

Steps 2 and 4 take N - 1 steps of the ring each, step 3 takes 2(N - 1) for each dtype. What is gathered is sent N - 1
times, once by each worker that it passes, so a payload of p bytes a worker costs each (N - 1)p on average, where an
all-reduce costs 2(N - 1)/N times the vector: with many workers a moderate compression sends more than none at all.
`gradiveq.compressors.sparse` says when a sparse sum in the ring would send less.

With a master (rank 0) step 2 is always there, as the others don't hear what comes of step 3, and 3 to 5 are replaced by

    3. reduce          what can be added, hop by hop to the master: a reduce-scatter of which all is its segment
    4. all-gather      as above, as the ring has no cheaper way to one worker; the others don't decode
    5. decode, encode  at the master: the mean, and Q_M of it
    6. all-gather      4 bytes: the length of the master's message, or that the mean is not finite
    7. all-gather      the master's message, of which all is its segment, N - 1 steps
    8. decode          it, on all
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from gradiveq.compressors.base import Array
from gradiveq.exchange import Master, Outgoing, Part, Worker, check_size
from gradiveq.flatten import Layout, Vector
from gradiveq.methods import Compressed
from gradiveq.report import Ongoing
from gradiveq.strategy import FLOAT32, WorkerStrategy
from ring.algorithm import owned_segment
from ring.handle import Ring

#: Of those that compress both ways.
MASTER = 0
#: In place of a length: there is nothing to send, as a number is not finite.
NOT_FINITE = 2**32 - 1


class CompressedStrategy(WorkerStrategy):
    """An exchange of payloads, with a memory of what they lack.

    Raises:
        ValueError: a pattern of the method doesn't fit the layers, or a compressor not the number of workers.

    Attributes:
        worker: this rank's side. Its `parts` may be replaced between calls by parts with the same boundaries.
        master: on every rank, as all decode what it sends; None without one.
    """

    worker: Worker

    def __init__(self, method: Compressed, ring: Ring, layout: Layout, seed: int, chunk_bytes: int) -> None:
        self.ring, self.length, self.chunk_bytes = ring, layout.length, chunk_bytes
        parts = method.parts(layout.blocks)
        check_size((part.compressor for part in parts), ring.size)
        self.worker = Worker(parts, self.length, rank=ring.rank, size=ring.size, seed=seed, feedback=method.feedback)
        self.master: Master | None = None
        if method.master is not None:
            self.master = Master(method.master_parts(layout.blocks), self.length, seed=seed)

    def exchange(self, vector: Vector, flawed: bool, now: Ongoing) -> bool:
        gradient = vector[: self.length]
        with np.errstate(over="ignore", invalid="ignore"):  # looked for by the aggregator, on all ranks alike
            if self.master is not None or any(_varies(part) for part in self.worker.parts):
                return self._exchange_after_lengths(gradient, flawed, now)
            return self._exchange_at_once(gradient, flawed, now)

    def _exchange_after_lengths(self, gradient: Vector, flawed: bool, now: Ongoing) -> bool:
        """Steps 2 to 5, or with a master 2 to 8."""
        outgoing = None if flawed else self._encode(gradient, now)
        lengths = self._gather_numbers(NOT_FINITE if outgoing is None else len(outgoing.gathered), now)
        if outgoing is None or NOT_FINITE in lengths:
            return True
        reduced_bytes = sum(payload.nbytes for payload in outgoing.reduced.values())
        mean_bytes = reduced_bytes + sum(lengths) / self.ring.size
        if self.master is None:
            for payload in outgoing.reduced.values():
                self._count(self.ring.all_reduce, payload, None, now)
            messages = self._gather(outgoing.gathered, lengths, now)
            self._decode(outgoing, messages, gradient, now)
            now.ratio = _ratio(self.length, mean_bytes)
        else:
            master_bytes = self._through(self.master, outgoing, lengths, gradient, now)
            now.ratio = _ratio(2 * self.length, mean_bytes + master_bytes)
        return False

    def _exchange_at_once(self, gradient: Vector, flawed: bool, now: Ongoing) -> bool:
        """Steps 3 to 5; what all send is as long."""
        outgoing = None if flawed else self._encode(gradient, now, room=True)
        if outgoing is None:
            with now.timeline.span("encode"):
                outgoing = self.worker.send_nothing(now.iteration)
        for payload in outgoing.reduced.values():
            self._count(self.ring.all_reduce, payload, None, now)
        if outgoing.reduced and outgoing.room[0]:
            return True
        messages = self._gather(outgoing.gathered, [len(outgoing.gathered)] * self.ring.size, now)
        if not outgoing.reduced:
            if any(message[-1] for message in messages):
                return True
            messages = [message[:-1] for message in messages]
        self._decode(outgoing, messages, gradient, now)
        assert self.worker.measures is not None
        now.ratio = _ratio(self.length, self.worker.measures.payload_bytes)
        return False

    def _decode(self, outgoing: Outgoing, messages: Sequence[Array], gradient: Vector, now: Ongoing) -> None:
        with now.timeline.span("decode"):
            self.worker.receive(outgoing.reduced, messages, gradient, now.iteration)

    def _encode(self, gradient: Vector, now: Ongoing, *, room: bool = False) -> Outgoing | None:
        """What this worker sends; None if gradient and memory together overflow."""
        with now.timeline.span("encode"):
            try:
                return self.worker.send(gradient, now.iteration, now.lr, room=room)
            except OverflowError:
                now.overflowed = True
                return None

    def _through(
        self, master: Master, outgoing: Outgoing, lengths: Sequence[int], gradient: Vector, now: Ongoing
    ) -> int:
        """The mean by way of the master; how long its message is."""
        for payload in outgoing.reduced.values():
            self._count(self.ring.reduce_scatter, payload, self._only_masters(len(payload)), now)
        messages = self._gather(outgoing.gathered, lengths, now)
        message: Array = np.empty(0, np.uint8)
        num_bytes = 0
        if self.ring.rank == MASTER:
            self._decode(outgoing, messages, gradient, now)
            if np.isfinite(gradient).all():
                with now.timeline.span("encode"):
                    message = master.send(gradient, now.iteration)
                num_bytes = len(message)
            else:
                num_bytes = NOT_FINITE
        num_bytes = self._gather_numbers(num_bytes, now)[MASTER]
        if num_bytes == NOT_FINITE:
            gradient.fill(np.nan)  # which the aggregator finds, on all ranks alike
            return 0
        if self.ring.rank != MASTER:
            message = np.empty(num_bytes, np.uint8)
        self._count(self.ring.all_gather, message, self._only_masters(num_bytes), now)
        with now.timeline.span("decode"):
            master.receive(message, gradient, now.iteration)
        return num_bytes

    def _gather_numbers(self, number: int, now: Ongoing) -> list[int]:
        """Every worker's, by rank."""
        own = np.array([number], np.uint32).view(np.uint8)
        said = self._gather(own, [own.nbytes] * self.ring.size, now)
        return [int(np.frombuffer(one.tobytes(), np.uint32)[0]) for one in said]

    def _gather(self, message: Array, lengths: Sequence[int], now: Ongoing) -> list[Array]:
        """Every worker's message, by rank.

        Args:
            lengths: of the messages, by rank; the same everywhere.
        """
        size = self.ring.size
        places = [owned_segment(rank, size) for rank in range(size)]
        by_segment = [0] * size
        for place, length in zip(places, lengths, strict=True):
            by_segment[place] = length
        bounds = [0, *accumulate(by_segment)]
        everything = np.empty(bounds[-1], np.uint8)
        messages = [everything[bounds[place] : bounds[place + 1]] for place in places]
        messages[self.ring.rank][:] = message
        self._count(self.ring.all_gather, everything, bounds, now)
        return messages

    def _only_masters(self, length: int) -> list[int]:
        """Bounds with which the whole vector is the master's segment."""
        place = owned_segment(MASTER, self.ring.size)
        return [0] * (place + 1) + [length] * (self.ring.size - place)

    def _count(self, collective: Any, vector: Array, bounds: Sequence[int] | None, now: Ongoing) -> None:
        """Carry out one of the ring's collectives on a vector, unless it is empty, as all ranks know."""
        if len(vector):
            options: dict[str, Any] = {} if bounds is None else {"bounds": bounds}
            stats = collective(vector, chunk_bytes=self.chunk_bytes, timeline=now.timeline, **options)
            now.bytes_sent += stats.bytes_sent


def _varies(part: Part) -> bool:
    """Whether the length of what is gathered of a part depends on the data."""
    return part.compressor.collective == "all_gather" and not part.compressor.fixed_size


def _ratio(length: int, num_bytes: float) -> float:
    """Bytes of a float32 vector / bytes of its payload."""
    return FLOAT32.itemsize * length / num_bytes if num_bytes else float("inf")
