"""The ring without MPI: N workers in one process, deterministic, for tests and for experiments with many workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from ring.algorithm import ChunkWork
from ring.codec import Array, Codec, Payload
from ring.errors import RingError, RingMismatch
from ring.handle import Ring
from ring.plan import CHUNK_BYTES, CollectivePlan, Stats
from ring.timeline import Timeline, compute_unmeasured

T = TypeVar("T")
Own = TypeVar("Own")


class _Message:
    """One side of a message. It is complete once the other side is there and the bytes were copied."""

    def __init__(self, buffer: Payload) -> None:
        self.buffer, self.complete = buffer, False

    def Test(self) -> bool:
        return self.complete


class _Link:
    """Link from one worker to its successor. Bytes move when both sides have posted, as late as MPI may move them."""

    def __init__(self) -> None:
        self._sent: deque[_Message] = deque()
        self._posted: deque[_Message] = deque()

    def send(self, buffer: Payload) -> _Message:
        return self._post(self._sent, buffer)

    def receive(self, buffer: Payload) -> _Message:
        return self._post(self._posted, buffer)

    def _post(self, queue: deque[_Message], buffer: Payload) -> _Message:
        message = _Message(buffer)
        queue.append(message)
        while self._sent and self._posted:
            sent, posted = self._sent.popleft(), self._posted.popleft()
            posted.buffer[:] = sent.buffer  # raises if the sizes differ
            sent.complete = posted.complete = True
        return message


class _Port:
    """One worker's ends of the links from its predecessor and to its successor, in one collective."""

    def __init__(self, upstream: _Link, downstream: _Link, timeline: Timeline | None) -> None:
        self._upstream, self._downstream = upstream, downstream
        self.compute = compute_unmeasured if timeline is None else timeline.compute
        self._kept = timeline if timeline is not None and timeline.keep else None
        self.bytes_sent = self.messages = 0

    def receive(self, buffer: Payload, work: ChunkWork) -> _Message:
        return self._upstream.receive(buffer)

    def send(self, buffer: Payload, work: ChunkWork) -> _Message:
        self.bytes_sent += len(buffer)
        self.messages += 1
        if self._kept is not None:
            self._kept.mark_sent(work)
        return self._downstream.send(buffer)

    def fetch(self, buffer: Payload, work: ChunkWork) -> Payload:
        if self._kept is not None:
            self._kept.mark_received(work)
        return buffer


class _Call:
    """One worker's part of a collective."""

    def __init__(self, plan: CollectivePlan, codec: Codec, vector: Array, timeline: Timeline | None) -> None:
        self.plan, self.codec, self.vector, self.timeline = plan, codec, vector, timeline

    @property
    def description(self) -> str:
        return self.plan.description

    @staticmethod
    def complete(calls: Sequence[_Call]) -> list[Stats]:
        """Advance every worker until it waits for a message that is not there, round after round."""
        size = len(calls)
        links = [_Link() for _ in range(size)]
        ports = [_Port(links[(rank - 1) % size], links[rank], call.timeline) for rank, call in enumerate(calls)]
        running = [
            call.plan.start(port, call.codec, call.vector, size) for port, call in zip(ports, calls, strict=True)
        ]
        waits = [next(algorithm, None) for algorithm in running]
        while any(waits):
            moved = False
            for rank, algorithm in enumerate(running):
                while (wait := waits[rank]) and wait.request.Test():
                    waits[rank], moved = next(algorithm, None), True
            if not moved:
                where = {rank: (wait.work.step, wait.work.segment) for rank, wait in enumerate(waits) if wait}
                raise RingError(f"every worker waits for another; (step, segment) by rank: {where}")
        return [Stats(port.bytes_sent, port.messages) for port in ports]


class _Question:
    """One worker's part of what is computed once for all (`Ring.compute_once`)."""

    def __init__(self, row: Sequence[float], own: Any, function: Callable[[Any, Any], Sequence[Any]]) -> None:
        self.row, self.own, self.function = row, own, function

    @property
    def description(self) -> str:
        return f"what is computed once from {len(self.row)} numbers of each rank"

    @staticmethod
    def complete(questions: Sequence[_Question]) -> Sequence[Any]:
        rows = np.array([question.row for question in questions], np.float64)
        return questions[0].function(rows, {rank: question.own for rank, question in enumerate(questions)})


class _Meeting:
    """Meeting of the workers' threads: the last to come does the work for all."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._parts: dict[int, _Call | _Question] = {}
        self._results: Sequence[Any] = []
        self._error: BaseException | None = None
        #: Objects that not all workers have taken yet: by their number, the object and how many have it.
        self._shared: dict[int, tuple[Any, int]] = {}
        self._lock = threading.Lock()
        self.barrier = threading.Barrier(size, action=self._act)

    def _act(self) -> None:
        try:
            parts: list[Any] = [self._parts[rank] for rank in range(self.size)]
            said: dict[str, list[int]] = {}
            for rank, part in enumerate(parts):
                said.setdefault(part.description, []).append(rank)
            if len(said) > 1:
                raise RingMismatch("; ".join(f"ranks {ranks} call {text}" for text, ranks in said.items()))
            self._results = parts[0].complete(parts)
            self._error = None
        except Exception as error:
            self._error = error

    def attend(self, rank: int, part: _Call | _Question) -> Any:
        """Hand over one worker's part, and return its result when all are here."""
        self._parts[rank] = part
        self.barrier.wait(self.timeout_s)
        if self._error is not None:
            raise self._error
        return self._results[rank]

    def share(self, number: int, make: Callable[[], T]) -> T:
        """The object with this number, made by the worker that asks first and forgotten when all have it."""
        with self._lock:
            found, takers = self._shared.pop(number) if number in self._shared else (make(), 0)
            if takers + 1 < self.size:
                self._shared[number] = found, takers + 1
            return found


class LockstepRing(Ring):
    """A worker of a ring whose workers are threads of this process."""

    def __init__(self, rank: int, meeting: _Meeting, chunk_bytes: int) -> None:
        super().__init__(rank, meeting.size, chunk_bytes)
        self._meeting, self._shared = meeting, 0

    def _execute(self, plan: CollectivePlan, codec: Codec, vector: Array, timeline: Timeline | None) -> Stats:
        stats: Stats = self._meeting.attend(self.rank, _Call(plan, codec, vector, timeline))
        return stats

    def shared(self, make: Callable[[], T]) -> T:
        self._shared += 1
        return self._meeting.share(self._shared, make)

    def compute_once(
        self,
        row: Sequence[float],
        own: Own,
        function: Callable[[npt.NDArray[np.float64], Mapping[int, Own]], Sequence[T]],
    ) -> T:
        """As in the base class, but nothing is sent: all workers are here."""
        value: T = self._meeting.attend(self.rank, _Question(row, own, function))
        return value


def run(
    size: int, function: Callable[[LockstepRing], T], *, chunk_bytes: int = CHUNK_BYTES, timeout_s: float = 300.0
) -> list[T]:
    """Call `function` with each of `size` workers' rings, and return what the calls return, by rank.

    Each call runs in a thread of its own; collectives bring the threads together. The first exception of any worker
    ends all of them and is raised here.

    Args:
        size: number of workers.
        function: what each worker does; called with its ring.
        chunk_bytes: payload of a message, as of `ring.handle.Ring`.
        timeout_s: seconds that a worker waits for the others in a collective before it gives up.
    Raises:
        ValueError: `size` or `chunk_bytes` is below 1.
        RingError: a worker didn't join the others in time, or left; all wait for each other.
        Whatever `function` raises first.
    """
    if size < 1:
        raise ValueError(f"`size` must be at least 1, got {size}")
    meeting = _Meeting(size, timeout_s)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(LockstepRing(rank, meeting, chunk_bytes))
        except BaseException as error:
            errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        raise causes[0] if causes else RingError(f"a worker did not join the others within {timeout_s:g} s")
    return results
