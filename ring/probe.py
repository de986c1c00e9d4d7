"""The measurements of `ring.calibrate`: messages between neighbours, and computing on one rank or on all.

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ring.algorithm import ChunkWork, Request
from ring.codec import Array
from ring.errors import RingTimeout
from ring.fit import Floats, fit_line, quartiles
from ring.mpi import MPIRing, yield_core
from ring.plan import CHUNK_BYTES, POSTED_RECEIVES
from ring.timeline import Timeline
from ring.world import MPI

TAG, TELL = 11, 12
#: Share of its time that a stream must have waited for the link, for the link to be what limits it.
LINK_LIMITED = 0.3
#: A wait for one message yields the core between tests for so long, then sleeps. In a stream it is time to sleep
#: sooner, and longer, so that what the polling costs can be told from what the messages cost.
SPIN_S, SLEEP_S, STREAMING_SPIN_S, STREAMING_SLEEP_S, HOLD_S = 0.1, 100e-6, 200e-6, 1e-3, 1e-3
#: One sample is the fastest of so many round trips, or of those that fit into so many seconds.
ROUND_TRIPS, SAMPLE_TRIPS_S = 10, 0.05
#: One sample is the fastest of so many streams, each of so many seconds and of so many messages at least and at most.
STREAMS, STREAM_S, LEAST_STREAMED, MOST_STREAMED = 3, 0.01, 8, 4000
#: Most samples of a stream; least samples of anything.
STREAM_REPEATS = 11
LEAST_REPEATS = 3
#: Most messages in flight up to this size, so that a link with some latency stays full. Of larger ones it is what the
#: ring posts.
SMALL_BYTES, SMALL_IN_FLIGHT = 64 * 1024, 16
#: Size of the memory that messages are taken from in turn, so that they are not always in a cache.
MEMORY_BYTES = 16 << 20
#: How a token bucket is found: a rest of so many seconds, then one message of at least so many bytes that takes at most
#: so many seconds, so many times.
REST_S, LEAST_BURST, LONGEST_RESTED_S, BURST_REPEATS = 0.03, 4096, 0.1, 7
#: Size of the messages that empty a token bucket.
BURST_BYTES = 4096
#: Size and number of the chunks that tell what the ring itself costs for each message.
TINY_CHUNK_BYTES, TINY_CHUNKS = 256, 256

#: What is computed, on vectors of which sizes, and how many seconds a sample takes.
RATES = ("add", "copy", "scale")
VECTOR_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
SAMPLE_S = 0.01


@dataclass
class Stream:
    """Many messages from one rank to another, or both ways at once, as one of the two saw it; seconds per message.

    Attributes:
        seconds: time from the first post until the last message was there.
        late_s: time from one message to the next, of those that this rank received after the first quarter; 0 if it
            only sent.
        busy_s: processor time of a message that was sent or received.
        queued_s: time in which this rank was ready to run, but other processes had the cores.
    """

    seconds: float
    late_s: float
    busy_s: float
    queued_s: float


@dataclass
class LinkTimes:
    """All that was measured between a rank and its successor; times are in seconds.

    Attributes:
        sizes: sizes of the messages of round trips, bytes.
        stream_sizes: sizes of the messages of streams, bytes: those of `sizes` that the ring sends.
        one_way: half round trips, shape (repeats, sizes).
        streams: times of a message, shape (repeats, stream sizes), by "one way" and "both ways".
        busy: processor times of a message at an end, both ways at once, shape (repeats, stream sizes).
        waiting: share of a stream's time, one way, in which both ends waited for the link, shape as `busy`.
        burst_bytes: bytes that a rested link passes at once; 0 if nothing can be told. If it is not 0, the token bucket
            was emptied before each message of `one_way`.
    """

    sizes: list[int]
    stream_sizes: list[int]
    one_way: Floats = field(default_factory=lambda: np.empty((0, 0)))
    streams: dict[str, Floats] = field(default_factory=dict)
    busy: Floats = field(default_factory=lambda: np.empty((0, 0)))
    waiting: Floats = field(default_factory=lambda: np.empty((0, 0)))
    burst_bytes: int = 0

    @property
    def link_limited(self) -> bool:
        """Whether both ends of a stream of the largest messages wait, so that it shows what the link can do."""
        return bool(np.median(self.waiting[:, -1]) > LINK_LIMITED)

    @property
    def bytes_per_s(self) -> float:
        """Rate of a stream of the largest messages in one direction."""
        large = slice(-3, None)
        line = fit_line(
            self.stream_sizes[large], np.median(self.streams["one way"], axis=0)[large], through_origin=True
        )
        return 1 / line.slope


class CalibrationProbe:
    """This rank's share of all measurements. All public methods are collective.

    Args:
        comm: the ranks that are measured.
        sizes: sizes of the messages, bytes.
        timeout_s: seconds that a neighbour may do nothing before a wait gives up.
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
        """Yield the core or sleep, once between two tests of a request.

        Raises:
            RingTimeout: the wait that began at `start` has lasted for `timeout_s`.
        """
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
        """CPU seconds of a test that finds nothing and the yield behind it, and the same with a sleep, at the least."""
        request = self.comm.Irecv((self._small_inbox[0], MPI.BYTE), self.comm.rank, TELL)
        costs = []
        for spin_s, polls in ((np.inf, 500), (0.0, 10)):
            samples = []
            for _ in range(5):
                start, cpu = time.perf_counter(), time.thread_time()
                for _ in range(polls):
                    request.Test()
                    self._idle(start, "", STREAMING_SLEEP_S, spin_s, np.inf)
                samples.append((time.thread_time() - cpu) / polls)
            costs.append(min(samples))
        request.Cancel()
        self._wait(request, "for a receive to be cancelled")
        return costs[0], costs[1]

    def _tell(self, values: Sequence[float], peer: int, telling: bool) -> list[float]:
        """Tell numbers to the peer. Returns the telling rank's on both; both have to give as many."""
        numbers = np.array(values, np.float64)
        if telling:
            self._wait(self.comm.Isend((numbers, MPI.DOUBLE), peer, TELL), f"to tell rank {peer} some numbers")
        else:
            self._wait(self.comm.Irecv((numbers, MPI.DOUBLE), peer, TELL), f"for rank {peer} to tell some numbers")
        return [float(number) for number in numbers]

    def _outgoing(self, size: int) -> Array:
        """The next stretch of the memory that messages are taken from."""
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
        """Half the time of the fastest of `count` round trips; only the leading rank's return value is valid."""
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
        """Send messages of these sizes one right behind the other, from the leading rank to its peer.

        Returns:
            When each of them was there; only the peer's return value is valid.
        """
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
        """Stream `count` messages in each direction, and an empty one back if they go in one.

        A token bucket is empty when a quarter of them is there.
        """
        ways: list[Callable[[int], MPI.Request]] = []
        if receives:
            ways.append(lambda number: self._receive(size, peer, number))
        if sends:
            ways.append(lambda number: self._send(size, peer))
        in_flight = SMALL_IN_FLIGHT if size <= SMALL_BYTES else POSTED_RECEIVES
        what = f"for {size} bytes to or from rank {peer} (streaming)"
        pending: list[deque[MPI.Request]] = [deque() for _ in ways]
        posted = [0] * len(ways)
        self._yields = self._sleeps = 0
        skipped, done = count // 4, 0
        idle_since = start = quarter = time.perf_counter()
        queued_s, cpu = _queued_s(), time.thread_time()
        waiting = False
        while True:
            moved = False
            for way, post in enumerate(ways):
                while posted[way] < count and len(pending[way]) < in_flight:
                    pending[way].append(post(posted[way]))
                    posted[way] += 1
                while pending[way] and pending[way][0].Test():
                    pending[way].popleft()
                    moved = True
                    if way == 0 and receives:
                        done += 1
                        if done == skipped:
                            quarter = time.perf_counter()
            if not any(pending) and min(posted) == count:
                break
            if moved:
                waiting = False
            else:
                if not waiting:
                    waiting, idle_since = True, time.perf_counter()
                self._idle(idle_since, what, STREAMING_SLEEP_S, STREAMING_SPIN_S, self._timeout_s)
        late_s = (time.perf_counter() - quarter) / (count - skipped) if receives else 0.0
        busy_s = time.thread_time() - cpu
        queued_s = _queued_s() - queued_s
        busy_s = max(0.0, busy_s - self._yields * self._yield_s - self._sleeps * self._sleep_s)
        if not (sends and receives):  # the sender's messages may have left, but not arrived
            self._wait(self._send(0, peer) if receives else self._receive(0, peer), what)
        seconds = (time.perf_counter() - start) / count
        return Stream(seconds, late_s, busy_s / (count * len(ways)), queued_s / count)

    # A link

    def link(self, first: int, repeats: int, seconds: float) -> LinkTimes | None:
        """Measure the link from rank `first` to its successor.

        Args:
            repeats: most samples of everything.
            seconds: about how many seconds round trips may take, and streams in one and in both directions.
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
        times = LinkTimes(self._sizes, [size for size in self._sizes if size <= CHUNK_BYTES])
        self._round_trips(0, ROUND_TRIPS, peer, leading)
        self._measure_streams(times, peer, leading, repeats, seconds)
        # The leading rank has the last word on what is decided from timings.
        limited, rate = self._tell([times.link_limited, times.bytes_per_s], peer, leading)
        if limited:
            self._find_burst(times, rate, peer, leading)
        filling = [BURST_BYTES] * -(-2 * times.burst_bytes // BURST_BYTES)

        def one_way(size: int, count: int) -> float:
            if not (filling and size):
                return self._round_trips(size, count, peer, leading)
            gaps = []
            for last in (0, size):
                *_, before, there = self._train([*filling, last], peer, leading)
                gaps.append(there - before)
            # Only the receiver knows. What the bytes add comes on top of what an empty message takes.
            added_s = self._tell([gaps[1] - gaps[0]], peer, not leading)[0]
            return self._round_trips(0, ROUND_TRIPS, peer, leading) + max(0.0, added_s)

        first_s = {size: min(one_way(size, 1) for _ in range(2)) for size in times.sizes}
        repeats, trips = self._plan(
            {size: 2 * first_s[size] for size in first_s},
            peer,
            leading,
            repeats=repeats,
            seconds=seconds,
            most=1 if filling else ROUND_TRIPS,
            sample_s=SAMPLE_TRIPS_S,
        )
        times.one_way = np.array([[one_way(size, trips[size]) for size in times.sizes] for _ in range(repeats)])
        return times

    def _plan(
        self,
        once_s: Mapping[int, float],
        peer: int,
        leading: bool,
        *,
        repeats: int,
        seconds: float,
        most: int,
        sample_s: float,
    ) -> tuple[int, dict[int, int]]:
        """Number of samples, and of trips in a sample by size, that fit into the time; the leading rank decides."""
        counts = [max(1, min(most, int(sample_s / max(cost_s, 1e-9)))) for cost_s in once_s.values()]
        total_s = sum(count * cost_s for count, cost_s in zip(counts, once_s.values(), strict=True))
        fitting = max(min(repeats, LEAST_REPEATS), min(repeats, int(seconds / max(total_s, 1e-9))))
        told = [int(number) for number in self._tell([fitting, *counts], peer, leading)]
        return told[0], dict(zip(once_s, told[1:], strict=True))

    def _measure_streams(self, times: LinkTimes, peer: int, leading: bool, repeats: int, seconds: float) -> None:
        def stream(size: int, count: int, both: bool) -> tuple[Stream, Stream]:
            """One stream, as this rank saw it and as the other did."""
            own = self._stream(size, count, peer, leading or both, not leading or both)
            told = [self._tell(astuple(own), peer, leading is way) for way in (True, False)]
            return own, Stream(*told[leading])

        def seconds_of(ends: tuple[Stream, Stream]) -> float:
            return max(end.seconds for end in ends)

        once_s = {size: STREAMS * 2 * seconds_of(stream(size, LEAST_STREAMED, True)) for size in times.stream_sizes}
        repeats, counts = self._plan(
            once_s,
            peer,
            leading,
            repeats=min(repeats, STREAM_REPEATS),
            seconds=2 * seconds,
            most=MOST_STREAMED,
            sample_s=STREAMS * STREAM_S,
        )
        whole: dict[str, list[list[float]]] = {"one way": [], "both ways": []}
        late: dict[str, list[list[float]]] = {"one way": [], "both ways": []}
        busy, waiting = [], []
        for _ in range(repeats):
            fastest = {}
            for name in whole:
                samples = [
                    [stream(size, max(LEAST_STREAMED, counts[size]), name == "both ways") for _ in range(STREAMS)]
                    for size in times.stream_sizes
                ]
                fastest[name] = [min(sample, key=seconds_of) for sample in samples]
                whole[name].append([seconds_of(ends) for ends in fastest[name]])
                late[name].append(
                    [float(np.median([max(a.late_s, b.late_s) for a, b in sample])) for sample in samples]
                )
            busy.append([(ends[0].busy_s + ends[1].busy_s) / 2 for ends in fastest["both ways"]])
            waiting.append([_waiting(*ends) for ends in fastest["one way"]])
        times.busy, times.waiting = np.array(busy), np.array(waiting)
        # The fastest are the least disturbed. Where the link has a token bucket they are also those that found it
        # fullest, so there it is what comes behind the first quarter that counts; and not the fastest of that, as
        # messages may have piled up before a receiver that was kept from its core.
        times.streams = {name: np.array(row) for name, row in (late if times.link_limited else whole).items()}

    def _find_burst(self, times: LinkTimes, rate: float, peer: int, leading: bool) -> None:
        """Time messages after a rest, and set `times.burst_bytes` to how many bytes have not waited for the link."""
        sizes = [size for size in times.sizes if size >= LEAST_BURST and size / rate <= LONGEST_RESTED_S]
        rested_s = []
        for size in (0, *sizes):
            samples = []
            for _ in range(BURST_REPEATS):
                time.sleep(REST_S)
                samples.append(self._round_trips(size, 1, peer, leading))
            rested_s.append(min(samples))
        found = burst_bytes(sizes, np.array(rested_s[1:]) - rested_s[0], rate) if leading and sizes else 0
        times.burst_bytes = int(self._tell([found], peer, leading)[0])

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

    def bookkeeping_s(self, repeats: int) -> tuple[float, float]:
        """CPU seconds of a reduce-scatter in chunks of a few bytes, without the waiting: per call, and per message.

        A line through calls with one chunk in a segment and with many, the least of the repeats of each. What MPI does
        for such a message outside the waits is part of it; a message is counted at both ends.
        """
        ring = MPIRing(self.comm, chunk_bytes=TINY_CHUNK_BYTES, timeout_s=self._timeout_s)
        found = []
        for chunks in (1, TINY_CHUNKS):
            vector = np.zeros(self.comm.size * chunks * TINY_CHUNK_BYTES // 4, np.float32)
            seconds = []
            for _ in range(repeats + 1):
                timeline = _Waits(time.thread_time)
                start_s = time.thread_time()
                stats = ring.reduce_scatter(vector, timeline=timeline)
                seconds.append(time.thread_time() - start_s - timeline.totals().get("wait", 0.0))
            found.append((2 * stats.messages, min(seconds[1:])))
        self.hold()
        (few, few_s), (many, many_s) = found
        message_s = max(0.0, (many_s - few_s) / (many - few))
        return max(0.0, few_s - few * message_s), message_s


def _queued_s() -> float:
    """Seconds in which this thread was ready to run while others had the cores; 0 where the kernel doesn't tell."""
    try:
        return int(Path("/proc/thread-self/schedstat").read_text().split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0


def _waiting(first: Stream, second: Stream) -> float:
    """Share of a stream's time in which neither end worked, nor was kept from it by other processes."""
    seconds = max(first.seconds, second.seconds)
    return max(0.0, 1 - (max(first.busy_s, second.busy_s) + first.queued_s + second.queued_s) / max(seconds, 1e-12))


def burst_bytes(sizes: Sequence[int], added_s: npt.ArrayLike, rate: float) -> int:
    """The depth of the token bucket that messages have come through after a rest; 0 if there seems to be none.

    A message larger than the bucket waits for all of its bytes but those: size = burst + rate * time.

    Args:
        sizes: sizes of the messages, ascending.
        added_s: seconds that each message took longer than an empty one.
        rate: bytes per second of the link.
    """
    free = np.asarray(sizes) - rate * np.asarray(added_s, np.float64)
    # A message of which more than half has not waited may have passed as a whole.
    beyond = free[free < np.asarray(sizes) / 2]
    if not len(beyond):
        return int(free[-1])
    low, burst, high = quartiles(beyond[:3])  # the smallest of them, as an error of the rate counts least there
    return int(burst) if burst > max(LEAST_BURST / 2, 2 * (high - low)) else 0


class _Waits(Timeline):
    """Timeline that measures nothing but waits, so that it costs little itself."""

    def compute(self, kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
        function(*args)


def _rate(name: str, size: int, repeats: int) -> list[float]:
    """Bytes per CPU second over a vector of `size` bytes, chunk by chunk as in the ring; one per repeat."""
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
