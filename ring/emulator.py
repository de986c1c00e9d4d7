"""A collective on a described cluster, event by event, in virtual time.

Each worker has a clock and goes through its program (`ring.program`). What moves the clocks:

    computing       by the amounts over the cluster's rates, or by the processor time that it took when it was done
                    for real; times the node's slowdown, and `overlap_slowdown` for as long as the node is sending
    beginning       `call_us` of processor time
    sending         `overhead_us` and `copy_us_per_mib` of processor time; then the message is posted
    a message       leaves when it was posted and those before it on the same link have left:
                    left = max(posted, left of the one before) + bytes / bandwidth, arrived = left + latency
    waiting         to max(own clock, arrived), then again overhead and copying
    waiting to have sent       to max(own clock, left)

So overlap needs no rule of its own: it is what the order of posting and waiting leaves of it. A token bucket lets up to
`burst_bytes` of a rested link leave at once. Links of several nodes that lead out of a rack share its uplink, and into
one its downlink: messages pass them one after the other, in the order in which they depart, and switches never run
out of memory. Ports that are not full duplex send or receive one message at a time, whichever can depart first. Nodes
that are hosts of one machine share its cores evenly: with n computing on c cores, each proceeds at min(1, c/n).

Where nothing is shared, a worker runs ahead to its next wait for a message that nobody has sent yet. Where something
is, everything that touches it happens in the order of time.

Cost: about 4 us per instruction of a program, 10 with shared cores.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ring.algorithm import ChunkWork
from ring.cluster import Cluster, ClusterError
from ring.program import SEND, WAIT, WAIT_SENT, Instruction
from ring.timeline import ReceivedMessage, SentMessage, Timeline
from ring.token_bucket import Floats, TokenBuckets

MIB = 1 << 20


class Chance(NamedTuple):
    """Random draws of one collective: each node's slowdown, 1 for none, and the generator of the messages' jitter."""

    stragglers: Floats
    generator: np.random.Generator


def chance(cluster: Cluster, call: int) -> Chance:
    """Draw what is random in the collective number `call`.

    The draws depend on the cluster's seed and `call` alone: they are the same whatever runs the collective.
    """
    generator = np.random.Generator(np.random.Philox(key=[cluster.seed, call]))
    slow = generator.random(cluster.nodes) < cluster.stragglers.probability
    return Chance(np.where(slow, cluster.stragglers.slowdown, 1.0), generator)


def seconds_by_rate(cluster: Cluster, amounts: Sequence[tuple[str, float]]) -> float | None:
    """Seconds that the amounts take at the cluster's rates; None if a rate is missing."""
    total = 0.0
    for name, amount in amounts:
        rate = cluster.rates.get(name)
        if rate is None:
            return None
        total += amount / rate
    return total


def missing_rates(cluster: Cluster, amounts: Sequence[tuple[str, float]]) -> ClusterError:
    """The error for amounts that have no rate in the cluster and were not measured."""
    missing = ", ".join(name for name, _ in amounts if name not in cluster.rates)
    return ClusterError(f"cluster {cluster.name} has no `rates` for {missing}, and nothing was measured")


class _Cores:
    """Cores that computing workers share evenly."""

    def __init__(self, cores: int) -> None:
        self._cores, self._now_s = cores, 0.0
        self._left_s: dict[int, float] = {}

    def begin(self, rank: int, now_s: float, seconds: float) -> None:
        self._advance(now_s)
        self._left_s[rank] = seconds

    def next_end(self) -> tuple[float, int]:
        """The next end of a computation if no other begins: when, and of which rank."""
        rank = min(self._left_s, key=self._left_s.__getitem__)
        return self._now_s + self._left_s[rank] * max(1.0, len(self._left_s) / self._cores), rank

    def end(self, rank: int, now_s: float) -> None:
        self._advance(now_s)
        del self._left_s[rank]

    @property
    def busy(self) -> bool:
        return bool(self._left_s)

    def _advance(self, now_s: float) -> None:
        if self._left_s:
            done_s = (now_s - self._now_s) * min(1.0, self._cores / len(self._left_s))
            for rank in self._left_s:
                self._left_s[rank] -= done_s
        self._now_s = now_s


def draw_jitter(jitters_s: Sequence[float], generator: np.random.Generator, steps: int, messages: int) -> Floats:
    """Random additions to the latency in seconds, of shape (steps, messages in a step, nodes)."""
    draws: Floats = generator.exponential(1.0, (steps, messages, len(jitters_s)))
    draws *= np.asarray(jitters_s)
    return draws


class _Links:
    """Links, ports and uplinks: when each is free again. `Emulator` keeps them from one collective to the next."""

    def __init__(self, cluster: Cluster) -> None:
        nodes = cluster.nodes
        links = [cluster.link_from(rank) for rank in range(nodes)]
        self.buckets = TokenBuckets([link.bytes_per_s for link in links], [link.burst_bytes for link in links])
        self.latencies_s = [link.latency_us * 1e-6 for link in links]
        self._jitters_s = [link.jitter_us * 1e-6 for link in links]
        self.half_duplex = not cluster.link.full_duplex and nodes > 1
        self._ports_s = [0.0] * nodes
        self._paths: list[list[tuple[str, int]]] = [[] for _ in range(nodes)]
        self._uplink_s: dict[tuple[str, int], float] = {}
        if cluster.racks is not None:
            racks = [cluster.racks.of(rank, nodes) for rank in range(nodes)]
            self._uplink_rate = cluster.racks.uplink_gbps * 1e9 / 8
            for rank, rack in enumerate(racks):
                if (to := racks[(rank + 1) % nodes]) != rack:
                    self._paths[rank] = [("up", rack), ("down", to)]
        self.shared = self.half_duplex or any(self._paths)

    def state(self) -> dict[str, Any]:
        return {
            **self.buckets.state_dict(),
            "ports": list(self._ports_s),
            "uplinks": [[way, rack, free_s] for (way, rack), free_s in self._uplink_s.items()],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.buckets.load_state_dict(state)
        self._ports_s = list(state["ports"])
        self._uplink_s = {(way, rack): free_s for way, rack, free_s in state["uplinks"]}

    def jitter_s(self, generator: np.random.Generator, programs: Sequence[Sequence[Instruction]]) -> list[Any] | None:
        """Random additions to the latency in seconds, by step, number of the message in the step, and sender.

        None if no link has jitter.
        """
        if not any(self._jitters_s):
            return None
        counts = [Counter(work.step for kind, work, _ in program if kind == SEND) for program in programs]
        last = max((max(count, default=0) for count in counts), default=0)
        most = max((max(count.values(), default=1) for count in counts), default=1)
        jitter_s: list[Any] = draw_jitter(self._jitters_s, generator, last + 1, most).tolist()
        return jitter_s

    def ready_s(self, rank: int) -> float:
        """Earliest moment at which the next message from `rank` to its successor may depart."""
        ready_s = self.buckets.free_s(rank)
        if self.half_duplex:  # both ends are busy with it
            ready_s = max(ready_s, self._ports_s[rank], self._ports_s[(rank + 1) % len(self._ports_s)])
        return ready_s

    def transmit(self, rank: int, departed_s: float, num_bytes: int) -> tuple[float, float]:
        """Let a message depart, at `ready_s` or later.

        Returns:
            When it has left, and when it would arrive without latency.
        """
        left_s = self.buckets.transmit(rank, departed_s, num_bytes)
        if self.half_duplex:
            self._ports_s[rank] = self._ports_s[(rank + 1) % len(self._ports_s)] = left_s
        arrived_s, reached_s = left_s, departed_s
        for uplink in self._paths[rank]:
            reached_s = max(reached_s, self._uplink_s.get(uplink, 0.0))
            self._uplink_s[uplink] = reached_s + num_bytes / self._uplink_rate
            arrived_s = max(arrived_s, self._uplink_s[uplink])
        return left_s, arrived_s


#: A worker on its way through its program. It yields the moment at which to resume it, or None if another event will;
#: its return value is its clock at the end.
Steps = Generator[float | None, None, float]
#: Stand in the place of a rank, in the queue of events, for what happens to the shared cores and to a link.
CORES, LINK = -1, -2
#: Moments that a worker can wait for: a message has ARRIVED, or has LEFT. A moment is that, the rank and the step of
#: the worker that waits, and the first element of the chunk.
ARRIVED, LEFT = "arrived", "left"
Moment = tuple[str, int, int, int]


class Emulator:
    """A cluster in virtual time; links keep what they are busy with from one collective to the next.

    Attributes:
        cluster: what is emulated.
        calls: collectives so far.
    """

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.calls = cluster, 0
        self.links = _Links(cluster)
        nodes = [cluster.node_at(rank) for rank in range(cluster.nodes)]
        self.call_s = [node.call_us * 1e-6 for node in nodes]
        self._overhead_s = [node.overhead_us * 1e-6 for node in nodes]
        self._copy_s = [node.copy_us_per_mib * 1e-6 / MIB for node in nodes]
        self.slowdown = [node.slowdown for node in nodes]
        self.overlap = [node.overlap_slowdown for node in nodes]

    def handling_s(self, rank: int, num_bytes: int) -> float:
        """Processor seconds of a message, at either end."""
        return self._overhead_s[rank] + self._copy_s[rank] * num_bytes

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "links": self.links.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls = state["calls"]
        self.links.load_state(state["links"])

    def run(
        self,
        programs: Sequence[Sequence[Instruction]],
        starts_s: Sequence[float],
        timelines: Sequence[Timeline | None],
        measured: Callable[[int, Instruction], float] | None = None,
    ) -> list[float]:
        """Let every worker go through its program.

        Args:
            programs: the workers' programs, by rank.
            starts_s: the workers' clocks when they begin.
            timelines: where each worker's spans and messages are recorded; None where they are not.
            measured: called with a rank and an instruction for which the cluster has no rate; returns the seconds that
                it takes on the rank's node.
        Returns:
            The workers' clocks at the end.
        Raises:
            ClusterError: a rate is missing, and nothing was measured.
        """
        self.calls += 1
        return _Run(self, programs, starts_s, timelines, measured).run()


class _Run:
    """One collective."""

    def __init__(
        self,
        emulator: Emulator,
        programs: Sequence[Sequence[Instruction]],
        starts_s: Sequence[float],
        timelines: Sequence[Timeline | None],
        measured: Callable[[int, Instruction], float] | None,
    ) -> None:
        cluster, self._links, self._emulator = emulator.cluster, emulator.links, emulator
        self._programs, self._starts_s, self._timelines = programs, starts_s, timelines
        self._measured = measured
        luck = chance(cluster, emulator.calls)
        self._slowdown = [own * bad for own, bad in zip(emulator.slowdown, luck.stragglers.tolist(), strict=True)]
        self._jitter_s = self._links.jitter_s(luck.generator, programs)
        self._cores = None if cluster.shared_cores is None else _Cores(cluster.shared_cores)
        self._now_s = 0.0
        self._events: list[tuple[float, int, int]] = []
        #: Predictions so far of when the cores will have done something; only the last one holds.
        self._plans = 0
        #: Messages that were posted and have not departed, by sender; used only where links share something.
        self._posted: list[deque[tuple[ChunkWork, int, float]]] = [deque() for _ in programs]
        #: The moments that are known, with their times; and those that a rank waits for, with the rank.
        self._moments: dict[Moment, float] = {}
        self._waiting: dict[Moment, int] = {}

    def run(self) -> list[float]:
        workers = [self._worker(rank) for rank in range(len(self._programs))]
        ends_s = list(self._starts_s)
        for rank, start_s in enumerate(self._starts_s):
            heapq.heappush(self._events, (start_s, rank, 0))
        while self._events:
            self._now_s, rank, number = heapq.heappop(self._events)
            if rank == CORES:
                assert self._cores is not None
                if number < self._plans:
                    continue
                _, rank = self._cores.next_end()
                self._cores.end(rank, self._now_s)
                self._plan_cores()
            elif rank == LINK:
                self._depart_if_ready(number)
                continue
            try:
                resume_s = next(workers[rank])
                if resume_s is not None:
                    heapq.heappush(self._events, (resume_s, rank, 0))
            except StopIteration as stop:
                ends_s[rank] = stop.value
        assert not self._waiting, f"nobody sends what (rank, step, chunk) wait for: {sorted(self._waiting)}"
        return ends_s

    def _plan_cores(self) -> None:
        assert self._cores is not None
        self._plans += 1
        if self._cores.busy:
            heapq.heappush(self._events, (self._cores.next_end()[0], CORES, self._plans))

    def _worker(self, rank: int) -> Steps:
        """Go through the program; the return value is the clock at the end."""
        links, timeline, emulator = self._links, self._timelines[rank], self._emulator
        clock_s = self._starts_s[rank]
        sending, number = -1, 0
        if emulator.call_s[rank] and self._programs[rank]:
            clock_s = yield from self._compute(rank, clock_s, "overhead", None, emulator.call_s[rank])
        for instruction in self._programs[rank]:
            kind, work, _ = instruction
            if kind == SEND:
                handling_s = emulator.handling_s(rank, work.chunk.num_bytes)
                if handling_s:
                    clock_s = yield from self._compute(rank, clock_s, "overhead", work, handling_s)
                sending, number = work.step, number + 1 if work.step == sending else 0
                if not links.shared:
                    self._depart(rank, work, number, clock_s, max(clock_s, links.ready_s(rank)))
                else:
                    if clock_s > self._now_s:
                        yield clock_s
                    self._posted[rank].append((work, number, clock_s))
                    self._depart_if_ready(rank)
            elif kind in (WAIT, WAIT_SENT):
                moment = (ARRIVED if kind == WAIT else LEFT, rank, work.step, work.chunk.start)
                if moment not in self._moments:
                    self._waiting[moment] = rank
                    yield None
                there_s = self._moments.pop(moment)
                if kind == WAIT and timeline is not None and timeline.keep:
                    timeline.received.append(ReceivedMessage(timeline.call, work, there_s))
                if there_s > clock_s:
                    if timeline is not None:
                        timeline.record("wait", clock_s, there_s, work)
                    clock_s = there_s
                    if self._cores is not None and clock_s > self._now_s:
                        yield clock_s
                if kind == WAIT and (handling_s := emulator.handling_s(rank, work.chunk.num_bytes)):
                    clock_s = yield from self._compute(rank, clock_s, "overhead", work, handling_s)
            else:
                clock_s = yield from self._compute(rank, clock_s, kind, work, self._seconds(rank, instruction))
        return clock_s

    def _depart_if_ready(self, rank: int) -> None:
        """Let the next message that `rank` has posted depart, if there is one, now or when it can."""
        if not self._posted[rank]:
            return
        ready_s = self._links.ready_s(rank)
        if ready_s > self._now_s:  # and look again then, as somebody else may be faster
            heapq.heappush(self._events, (ready_s, LINK, rank))
            return
        self._depart(rank, *self._posted[rank].popleft(), self._now_s)
        if self._posted[rank]:
            heapq.heappush(self._events, (self._links.ready_s(rank), LINK, rank))

    def _depart(self, rank: int, work: ChunkWork, number: int, posted_s: float, departed_s: float) -> None:
        """Let a message depart; `number` is its place among the messages of its step."""
        left_s, arrived_s = self._links.transmit(rank, departed_s, work.chunk.num_bytes)
        arrived_s += self._links.latencies_s[rank]
        if self._jitter_s is not None:
            arrived_s += self._jitter_s[work.step][number][rank]
        start, successor = work.chunk.start, (rank + 1) % len(self._programs)
        for moment, when_s in (
            ((ARRIVED, successor, work.step + 1, start), arrived_s),
            ((LEFT, rank, work.step, start), left_s),
        ):
            self._moments[moment] = when_s
            if moment in self._waiting:
                heapq.heappush(self._events, (when_s, self._waiting.pop(moment), 0))
        timeline = self._timelines[rank]
        if timeline is not None and timeline.keep:
            timeline.sent.append(SentMessage(timeline.call, work, posted_s, departed_s, left_s))

    def _seconds(self, rank: int, instruction: Instruction) -> float:
        """Seconds of a computation on a node that is not slow."""
        cluster = self._emulator.cluster
        seconds = seconds_by_rate(cluster, instruction.amounts)
        if seconds is None:
            if self._measured is None:
                raise missing_rates(cluster, instruction.amounts)
            seconds = self._measured(rank, instruction)
        return seconds

    def _compute(self, rank: int, clock_s: float, kind: str, work: ChunkWork | None, seconds: float) -> Steps:
        """Compute for `seconds`, as counted on a node that is not slow; the return value is the clock at the end."""
        seconds *= self._slowdown[rank]
        slow, busy_s = self._emulator.overlap[rank], self._links.buckets.free_s(rank) - clock_s
        if slow > 1 and busy_s > 0:
            seconds = seconds * slow if seconds * slow < busy_s else busy_s + seconds - busy_s / slow
        end_s = clock_s + seconds
        if self._cores is not None:
            self._cores.begin(rank, self._now_s, seconds)
            self._plan_cores()
            yield None
            end_s = self._now_s
        timeline = self._timelines[rank]
        if timeline is not None:
            timeline.record(kind, clock_s, end_s, work)
        return end_s
