"""What `ring.calibrate` times: messages between neighbours, and computing on one rank or on all.

Two ranks at a time are measured, a rank and its successor; the others sleep. With more ranks than cores MPI's own waits
would keep the cores from those that are measured, so everything here polls and yields, as `ring.mpi` does, and every
wait has a deadline. Another process that takes a core away for a moment lengthens a round trip a hundred times; so the
fastest of a few round trips in succession counts as one sample. What a message costs the processor is the thread's own
CPU time less what the polling took of it (polls are counted; what an idle one costs is measured first).

Token buckets let a burst pass at full speed after a pause. Where one is found, a message is timed right behind others
that have emptied it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any, Protocol

import numpy as np
from mpi4py import MPI

from ring.algorithm import Work
from ring.codec import Array
from ring.errors import RingTimeout
from ring.fit import Floats, quartiles
from ring.mpi import MPIRing, yield_core
from ring.plan import CHUNK_BYTES, POSTED_RECEIVES
from ring.timeline import Timeline

TAG, TELL = 11, 12
SPIN_S, SLEEP_S, HOLD_S = 0.005, 100e-6, 1e-3
#: The fastest of so many round trips is one sample, unless they take longer than this; and of so many streams,
#: which last so long, have so many messages and are repeated so often at most.
ROUND_TRIPS, SAMPLE_TRIPS_S = 10, 0.05
STREAMS, STREAM_S, MOST_STREAMED, STREAM_REPEATS = 3, 0.005, 4000, 11
LEAST_REPEATS = 3
#: Messages in flight: what the ring posts, and of small messages more, so that a link with some latency stays full.
SMALL_BYTES, SMALL_IN_FLIGHT = 64 * 1024, 16
#: Memory that messages are taken from in turn, so that they are not always in a cache.
MEMORY_BYTES = 16 << 20
#: To find a token bucket: a rest, then small messages for a while, so many times.
REST_S, BURST_S, BURST_BYTES, BURST_REPEATS = 0.1, 0.05, 4096, 7
#: Chunks of a few bytes, to find what the ring itself costs for each message.
TINY_CHUNK_BYTES, TINY_CHUNKS = 256, 256

#: Vectors that are computed on, and how long a sample of it takes.
RATES = ("add", "copy", "scale")
VECTOR_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
SAMPLE_S = 0.01


class Request(Protocol):
    def Test(self) -> bool: ...


@dataclass
class Stream:
    """Many messages from one rank to another, or both ways at once, as one of the two saw it.

    Attributes:
        seconds: per message (of one direction).
        busy_s: processor time per message that this rank sent or received.
        waiting: share of the time in which this rank had nothing to do but wait for the link.
    """

    seconds: float
    busy_s: float
    waiting: float


@dataclass
class LinkTimes:
    """All that was measured between a rank and its successor; seconds.

    Attributes:
        sizes: of messages, bytes.
        one_way: half round trips, shape (repeats, sizes); behind emptied buckets where `drained`.
        streams: per message, shape (repeats, sizes), by "one way" and "both ways"; only of `stream_sizes`.
        busy: processor time per message and end, both ways at once, shape (repeats, sizes).
        waiting: share of its time that the busier end waited for the link, one way, shape (repeats, sizes).
        bursts: bytes that seemed to pass at once after a rest, each repeat's.
        drained: whether a token bucket was found, so that it was emptied before each timed message.
    """

    sizes: list[int]
    stream_sizes: list[int]
    one_way: Floats = field(default_factory=lambda: np.empty((0, 0)))
    streams: dict[str, Floats] = field(default_factory=dict)
    busy: Floats = field(default_factory=lambda: np.empty((0, 0)))
    waiting: Floats = field(default_factory=lambda: np.empty((0, 0)))
    bursts: list[float] = field(default_factory=list)
    drained: bool = False

    @property
    def burst_bytes(self) -> int:
        """A token bucket's depth; 0 if there is none that can be told from the spread."""
        low, median, high = quartiles(self.bursts)
        return int(median) if median > max(BURST_BYTES, 3 * (high - low)) else 0


class Probe:
    """Times this rank's share of everything. All methods are collective.

    Args:
        timeout_s: how long a neighbour may do nothing before a wait gives up.
    """

    def __init__(self, comm: MPI.Intracomm, sizes: Sequence[int], timeout_s: float) -> None:
        self.comm, self._sizes, self._timeout_s = comm.Dup(), list(sizes), timeout_s
        self._memory = np.ones(max(MEMORY_BYTES, 2 * max(sizes)), np.uint8)
        most = max(max(sizes), SMALL_BYTES)
        self._inbox = np.empty((POSTED_RECEIVES, most), np.uint8)
        self._small_inbox = np.empty((SMALL_IN_FLIGHT, SMALL_BYTES), np.uint8)
        self._next = 0
        self._yields = self._sleeps = 0
        self._yield_s, self._sleep_s = self._poll_costs()

    def hold(self, most_s: float = 3600.0) -> None:
        """Sleep until all ranks are here: those that are measured may take long."""
        self._wait(self.comm.Ibarrier(), "for the other ranks", sleep_s=HOLD_S, spin_s=0.0, timeout_s=most_s)

    def _wait(
        self,
        request: Request,
        what: str,
        *,
        sleep_s: float = SLEEP_S,
        spin_s: float = SPIN_S,
        timeout_s: float | None = None,
    ) -> None:
        if request.Test():
            return
        start = time.perf_counter()
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        while not request.Test():
            self._idle(start, what, sleep_s, spin_s, timeout_s)

    def _idle(self, start: float, what: str, sleep_s: float, spin_s: float, timeout_s: float) -> None:
        """Once between two tests. Raises RingTimeout when there have been enough."""
        waited_s = time.perf_counter() - start
        if waited_s > timeout_s:
            raise RingTimeout(f"rank {self.comm.rank} waited {what} and gave up after {timeout_s:g} s")
        if waited_s < spin_s:
            self._yields += 1
            yield_core()
        else:
            self._sleeps += 1
            time.sleep(sleep_s)

    def _poll_costs(self) -> tuple[float, float]:
        """CPU seconds of a test with nothing to find, and a yield or a sleep behind it."""
        request = self.comm.Irecv((self._inbox[0], MPI.BYTE), self.comm.rank, TELL)
        costs = []
        for spin_s, polls in ((np.inf, 2000), (0.0, 100)):
            start, cpu = time.perf_counter(), time.thread_time()
            for _ in range(polls):
                request.Test()
                self._idle(start, "", SLEEP_S, spin_s, np.inf)
            costs.append((time.thread_time() - cpu) / polls)
        request.Cancel()
        self._wait(request, "for a receive to be cancelled")
        return costs[0], costs[1]

    def _tell(self, values: Sequence[float], peer: int, telling: bool) -> list[float]:
        """The telling rank's numbers, on both; as many as the other has."""
        numbers = np.array(values, np.float64)
        if telling:
            self._wait(self.comm.Isend((numbers, MPI.DOUBLE), peer, TELL), f"to tell rank {peer} some numbers")
        else:
            self._wait(self.comm.Irecv((numbers, MPI.DOUBLE), peer, TELL), f"for rank {peer} to tell some numbers")
        return [float(number) for number in numbers]

    def _outgoing(self, size: int) -> Array:
        """The next stretch of memory."""
        if self._next + size > len(self._memory):
            self._next = 0
        self._next += size
        return self._memory[self._next - size : self._next]

    def _send(self, size: int, peer: int) -> MPI.Request:
        return self.comm.Isend((self._outgoing(size), MPI.BYTE), peer, TAG)

    def _receive(self, size: int, peer: int, number: int = 0) -> MPI.Request:
        inbox = self._small_inbox if size <= SMALL_BYTES else self._inbox
        return self.comm.Irecv((inbox[number % len(inbox)][:size], MPI.BYTE), peer, TAG)

    # Round trips

    def _round_trips(self, size: int, count: int, peer: int, leading: bool) -> float:
        """Half the time of the fastest of `count` round trips; the leading rank's is the one to use."""
        fastest = np.inf
        what = f"for {size} bytes from rank {peer} (ping-pong)"
        for _ in range(count):
            answer = self._receive(size, peer)
            start = time.perf_counter()
            if leading:
                sent = self._send(size, peer)
                self._wait(answer, what)
                fastest = min(fastest, (time.perf_counter() - start) / 2)
            else:
                self._wait(answer, what)
                sent = self._send(size, peer)
            self._wait(sent, f"to send {size} bytes to rank {peer} (ping-pong)")
        return float(fastest)

    def _train(self, sizes: Sequence[int], peer: int, leading: bool) -> Floats:
        """When each of these messages was there, sent one right behind the other; the other rank's are the ones."""
        times = np.empty(len(sizes))
        what = f"for messages to or from rank {peer} (one behind the other)"
        if leading:
            pending: deque[MPI.Request] = deque()
            for size in sizes:
                pending.append(self._send(size, peer))
                if len(pending) >= SMALL_IN_FLIGHT:
                    self._wait(pending.popleft(), what)
            for request in pending:
                self._wait(request, what)
            self._wait(self._receive(0, peer), what)
        else:
            arriving = deque(self._receive(size, peer, number) for number, size in enumerate(sizes[:SMALL_IN_FLIGHT]))
            for number in range(len(sizes)):
                self._wait(arriving.popleft(), what)
                times[number] = time.perf_counter()
                if (following := number + SMALL_IN_FLIGHT) < len(sizes):
                    arriving.append(self._receive(sizes[following], peer, following))
            self._wait(self._send(0, peer), what)
        return times

    # Streams

    def _stream(self, size: int, count: int, peer: int, sends: bool, receives: bool) -> Stream:
        """`count` messages in each direction, and an empty one back if they go in one."""
        ways: list[Callable[[int], MPI.Request]] = []
        if receives:
            ways.append(lambda number: self._receive(size, peer, number))
        if sends:
            ways.append(lambda number: self._send(size, peer))
        in_flight = SMALL_IN_FLIGHT if size <= SMALL_BYTES else POSTED_RECEIVES
        what = f"for {size} bytes to or from rank {peer} (streaming)"
        pending: list[list[MPI.Request]] = [[] for _ in ways]
        posted = [0] * len(ways)
        self._yields = self._sleeps = 0
        start, cpu = time.perf_counter(), time.thread_time()
        idle_since = start
        waiting = False
        while True:
            moved = False
            for way, post in enumerate(ways):
                while posted[way] < count and len(pending[way]) < in_flight:
                    pending[way].append(post(posted[way]))
                    posted[way] += 1
                while pending[way] and pending[way][0].Test():
                    pending[way].pop(0)
                    moved = True
            if not any(pending) and min(posted) == count:
                break
            if moved:
                waiting = False
            else:
                if not waiting:
                    waiting, idle_since = True, time.perf_counter()
                self._idle(idle_since, what, SLEEP_S, SPIN_S, self._timeout_s)
        busy_s = time.thread_time() - cpu
        polls_s = self._yields * self._yield_s + self._sleeps * self._sleep_s
        idle_s = self._yields * self._yield_s + self._sleeps * (self._sleep_s + SLEEP_S)
        busy_s = max(0.0, busy_s - polls_s)
        if not (sends and receives):  # the sender's messages may have left, but not arrived
            self._wait(self._send(0, peer) if receives else self._receive(0, peer), what)
        seconds = (time.perf_counter() - start) / count
        return Stream(seconds, busy_s / (count * len(ways)), idle_s / max(idle_s + busy_s, 1e-12))

    # A link

    def link(self, first: int, repeats: int, seconds: float) -> LinkTimes | None:
        """Measure the link from rank `first` to its successor.

        Args:
            repeats: of everything, at most.
            seconds: about how long round trips may take, and streams in one and in both directions.
        Returns:
            What was measured, on rank `first`; None on the others.
        """
        second = (first + 1) % self.comm.size
        times = None
        if self.comm.rank in (first, second):
            leading = self.comm.rank == first
            times = self._measure_link(second if leading else first, leading, repeats, seconds)
            times = times if leading else None
        self.hold()
        return times

    def _measure_link(self, peer: int, leading: bool, repeats: int, seconds: float) -> LinkTimes:
        stream_sizes = [size for size in self._sizes if size <= CHUNK_BYTES]
        times = LinkTimes(self._sizes, stream_sizes)
        self._round_trips(0, ROUND_TRIPS, peer, leading)
        times.bursts = self._find_bursts(peer, leading)
        times.drained = times.burst_bytes > 0
        filling = 2 * times.burst_bytes

        def plan(
            once: Callable[[int], float], sizes: Sequence[int], trips: int, sample_s: float
        ) -> tuple[int, dict[int, int]]:
            """How many repeats of how many trips at each size fit into the time; the leading rank's word."""
            first_s = {size: min(once(size) for _ in range(2)) for size in sizes}
            counts = {size: max(1, min(trips, int(sample_s / max(first_s[size], 1e-9)))) for size in sizes}
            total_s = sum(counts[size] * first_s[size] for size in sizes)
            least = min(repeats, LEAST_REPEATS)
            told = [max(least, min(repeats, int(seconds / max(total_s, 1e-9)))), *counts.values()]
            count, *trips_of = (int(number) for number in self._tell(told, peer, leading))
            return count, dict(zip(sizes, trips_of, strict=True))

        def one_way(size: int, count: int) -> float:
            if not filling or size == 0:
                return self._round_trips(size, count, peer, leading)
            fill = [BURST_BYTES] * -(-filling // BURST_BYTES)
            gaps = []
            for last in (0, size):
                *_, before, there = self._train([*fill, last], peer, leading)
                gaps.append(there - before)
            # Only the receiver knows; and an empty message's way comes on top of what the bytes add to it.
            added_s = self._tell([gaps[1] - gaps[0]], peer, not leading)[0]
            return self._round_trips(0, 1, peer, leading) + max(0.0, added_s)

        count, trips = plan(lambda size: 2 * one_way(size, 1), times.sizes, ROUND_TRIPS, SAMPLE_TRIPS_S)
        times.one_way = np.array([[one_way(size, trips[size]) for size in times.sizes] for _ in range(count)])

        def stream(size: int, count: int, both: bool) -> tuple[Stream, Stream]:
            """This rank's view and the other's of one stream."""
            own = self._stream(size, count, peer, leading or both, not leading or both)
            theirs = [self._tell(list(astuple(own)), peer, leading is way) for way in (True, False)]
            return own, Stream(*theirs[leading])

        def fastest(size: int, count: int, both: bool) -> tuple[Stream, Stream]:
            return min(
                (stream(size, count, both) for _ in range(STREAMS)), key=lambda ends: max(end.seconds for end in ends)
            )  # fmt: skip

        count, trips = plan(
            lambda size: 2 * STREAMS * stream(size, 8, True)[0].seconds, stream_sizes, MOST_STREAMED, STREAM_S * STREAMS
        )
        streams: dict[str, list[list[float]]] = {"one way": [], "both ways": []}
        busy, waiting = [], []
        for _ in range(min(count, STREAM_REPEATS)):
            rows: dict[str, list[tuple[Stream, Stream]]] = {
                name: [fastest(size, max(4, trips[size]), name == "both ways") for size in stream_sizes]
                for name in streams
            }
            for name, row in rows.items():
                streams[name].append([max(ends[0].seconds, ends[1].seconds) for ends in row])
            busy.append([(ends[0].busy_s + ends[1].busy_s) / 2 for ends in rows["both ways"]])
            waiting.append([min(ends[0].waiting, ends[1].waiting) for ends in rows["one way"]])
        times.streams = {name: np.array(rows) for name, rows in streams.items()}
        times.busy, times.waiting = np.array(busy), np.array(waiting)
        return times

    def _find_bursts(self, peer: int, leading: bool) -> list[float]:
        """The bytes that seemed to pass at once after a rest, each repeat's."""
        count = SMALL_IN_FLIGHT
        while True:  # until it takes long enough
            start = time.perf_counter()
            self._train([0, *[BURST_BYTES] * count], peer, leading)
            enough = self._tell([time.perf_counter() - start > BURST_S], peer, leading)[0]
            if enough:
                break
            count *= 2
        bursts = []
        for _ in range(BURST_REPEATS):
            time.sleep(REST_S)
            start_s, *arrived_s = self._train([0, *[BURST_BYTES] * count], peer, leading)
            bursts.append(0.0 if leading else burst_bytes(np.array(arrived_s) - start_s, BURST_BYTES))
        return self._tell(bursts, peer, not leading)

    # Computing

    def rates(self, repeats: int, together: bool) -> dict[str, dict[int, list[float]]]:
        """Bytes per second of CPU time of "add", "copy" and "scale", by bytes of the vector, one number per repeat.

        Args:
            together: whether all ranks compute at once; otherwise one after the other.
        """
        rates: dict[str, dict[int, list[float]]] = {}
        for rank in range(1 if together else self.comm.size):
            self.hold()
            if together or rank == self.comm.rank:
                rates = {
                    name: {size: _rate(name, size, repeats) for size in VECTOR_BYTES}
                    for name in ("add", "copy", "scale")
                }
        self.hold()
        return rates

    def bookkeeping_s(self, repeats: int) -> list[float]:
        """CPU seconds of an all-reduce in chunks of a few bytes, per message sent or received, without the waiting.

        Includes what MPI does for such a message outside the waits.
        """
        ring = MPIRing(self.comm, chunk_bytes=TINY_CHUNK_BYTES, timeout_s=self._timeout_s)
        vector = np.zeros(self.comm.size * TINY_CHUNKS * TINY_CHUNK_BYTES // 4, np.float32)
        seconds = []
        for _ in range(repeats + 1):
            timeline = _Waits(time.thread_time)
            start_s = time.thread_time()
            stats = ring.all_reduce(vector, timeline=timeline)
            cpu_s = time.thread_time() - start_s - timeline.totals().get("wait", 0.0)
            seconds.append(cpu_s / (2 * stats.messages))
        self.hold()
        return seconds[1:]


def burst_bytes(arrived_s: Floats, size: int) -> float:
    """The depth of the token bucket that messages have come through, 0 where there is none; in bytes, and noisy.

    Once the bucket is empty, bytes = burst + rate * time. It has to be by the second half of the messages.

    Args:
        arrived_s: when each message was there, after the first could have been.
        size: of each.
    """
    sent = size * np.arange(1.0, len(arrived_s) + 1)
    late = slice(len(sent) // 2, None)
    time_s, late_sent = arrived_s[late] - arrived_s[late].mean(), sent[late] - sent[late].mean()
    spread = float(time_s @ time_s)
    if not spread > 0:
        return 0.0
    rate = float(time_s @ late_sent) / spread
    return float(sent[late].mean() - rate * arrived_s[late].mean())


class _Waits(Timeline):
    """Measures nothing but waits, so that it costs little itself."""

    def compute(self, kind: str, work: Work, function: Callable[..., Any], *args: Any) -> None:
        function(*args)


def _rate(name: str, size: int, repeats: int) -> list[float]:
    """Bytes per CPU second, over a vector of `size` bytes chunk by chunk, as the ring goes through it."""
    vector = np.ones(size // 4, np.float32)
    step = min(CHUNK_BYTES, size) // 4
    inbox = np.ones((POSTED_RECEIVES, step), np.float32)
    chunks = [vector[start : start + step] for start in range(0, len(vector), step)]

    def once(call: int) -> None:
        factor = (3.0, 1 / 3)[call % 2]  # so that the vector stays what it is
        for number, chunk in enumerate(chunks):
            incoming = inbox[number % POSTED_RECEIVES]
            if name == "add":
                np.add(chunk, incoming, chunk)
            elif name == "copy":
                np.copyto(chunk, incoming)
            else:
                np.divide(chunk, factor, chunk)

    def cpu_s(calls: int) -> float:
        start = time.thread_time()
        for call in range(calls):
            once(call)
        return time.thread_time() - start

    cpu_s(1)
    calls = max(1, int(SAMPLE_S / max(cpu_s(1), 1e-7)))
    return [calls * size / cpu_s(calls) for _ in range(repeats)]
