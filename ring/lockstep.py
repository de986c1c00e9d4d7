"""The ring without MPI: N workers in one process, deterministic, for tests and for experiments with many workers."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ring.algorithm import Work
from ring.codec import Array, Codec, Payload
from ring.errors import RingError, RingMismatch
from ring.handle import Ring
from ring.plan import CHUNK_BYTES, Plan, Stats
from ring.timeline import Timeline, compute_unmeasured

T = TypeVar("T")


class _Message:
    """One side of a message; complete once the other side is there and the bytes were copied."""

    def __init__(self, buffer: Payload) -> None:
        self.buffer, self.complete = buffer, False

    def Test(self) -> bool:
        return self.complete


class _Link:
    """From one worker to its successor. Bytes move when both sides have posted, as late as MPI may move them."""

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
    def __init__(self, upstream: _Link, downstream: _Link, timeline: Timeline | None) -> None:
        self._upstream, self._downstream = upstream, downstream
        self.compute = compute_unmeasured if timeline is None else timeline.compute
        self._kept = timeline if timeline is not None and timeline.keep else None
        self.bytes_sent = self.messages = 0

    def receive(self, buffer: Payload, work: Work) -> _Message:
        return self._upstream.receive(buffer)

    def send(self, buffer: Payload, work: Work) -> _Message:
        self.bytes_sent += len(buffer)
        self.messages += 1
        if self._kept is not None:
            self._kept.mark_sent(work)
        return self._downstream.send(buffer)

    def fetch(self, buffer: Payload, work: Work) -> Payload:
        if self._kept is not None:
            self._kept.mark_received(work)
        return buffer


class _Call:
    """One worker's part of a collective."""

    def __init__(self, plan: Plan, codec: Codec, vector: Array, timeline: Timeline | None) -> None:
        self.plan, self.codec, self.vector, self.timeline = plan, codec, vector, timeline


def _run_in_lockstep(calls: Sequence[_Call]) -> list[Stats]:
    """Advance every worker until it waits for a message that is not there, round after round."""
    size = len(calls)
    said: dict[str, list[int]] = {}
    for rank, call in enumerate(calls):
        said.setdefault(call.plan.description, []).append(rank)
    if len(said) > 1:
        raise RingMismatch("; ".join(f"ranks {ranks} call {text}" for text, ranks in said.items()))
    links = [_Link() for _ in range(size)]
    ports = [_Port(links[(rank - 1) % size], links[rank], call.timeline) for rank, call in enumerate(calls)]
    running = [call.plan.start(port, call.codec, call.vector, size) for port, call in zip(ports, calls, strict=True)]
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


class _Meeting:
    """Where the workers' threads meet: the last to come does the work for all."""

    def __init__(self, size: int, timeout_s: float) -> None:
        self.size, self.timeout_s = size, timeout_s
        self._calls: dict[int, _Call] = {}
        self._stats: list[Stats] = []
        self._error: BaseException | None = None
        self.barrier = threading.Barrier(size, action=self._act)

    def _act(self) -> None:
        try:
            self._stats = _run_in_lockstep([self._calls[rank] for rank in range(self.size)])
            self._error = None
        except Exception as error:
            self._error = error

    def attend(self, rank: int, call: _Call) -> Stats:
        self._calls[rank] = call
        self.barrier.wait(self.timeout_s)
        if self._error is not None:
            raise self._error
        return self._stats[rank]


class LockstepRing(Ring):
    """One worker's handle."""

    def __init__(self, rank: int, meeting: _Meeting, chunk_bytes: int) -> None:
        super().__init__(rank, meeting.size, chunk_bytes)
        self._meeting = meeting

    def _execute(self, plan: Plan, codec: Codec, vector: Array, timeline: Timeline | None) -> Stats:
        return self._meeting.attend(self.rank, _Call(plan, codec, vector, timeline))


def run(
    size: int, function: Callable[[LockstepRing], T], *, chunk_bytes: int = CHUNK_BYTES, timeout_s: float = 300.0
) -> list[T]:
    """Call `function` with each of `size` workers' rings, and return what the calls return, by rank.

    Each call runs in a thread of its own; collectives bring the threads together. The first exception of any worker
    ends all of them and is raised here.

    Args:
        chunk_bytes: of the rings (`ring.handle.Ring`).
        timeout_s: how long a worker waits for the others in a collective before it gives up.
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
