"""The ring in virtual time: a real ring does the work, a described cluster's clock says how long it would take there.

A collective runs on the inner ring, over MPI or in lockstep, so its sums are the same bits as ever. Then every worker
tells the others when it began and what its computations took, and the programs of all are replayed on the cluster
(`ring.emulator`), once in each process: over MPI all ranks replay the same, so nobody has to be told the result, and
workers in lockstep have one emulator together.

Between collectives a worker's clock runs with the processor time of its thread, so that workers that share cores don't
disturb each other; or as `taking` says.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ring.algorithm import ChunkWork
from ring.cluster import Cluster, ClusterError
from ring.codec import Array, Codec
from ring.emulator import Emulator, chance, seconds_by_rate
from ring.errors import RingMismatch
from ring.handle import Ring
from ring.plan import CollectivePlan, Stats
from ring.program import SEND, WAIT, WAIT_SENT, record_all
from ring.timeline import Timeline

#: Most plans whose programs are kept.
MOST_PROGRAMS = 8


class _Meter(Timeline):
    """Timeline that passes everything on to the caller's, and measures the processor time of each computation."""

    def __init__(self, wall: Timeline, processor_time: Callable[[], float]) -> None:
        super().__init__(wall.clock, keep=wall.keep)
        self._wall, self._processor_time = wall, processor_time
        self.seconds: dict[tuple[str, ChunkWork], float] = defaultdict(float)
        self.mark_sent, self.mark_received = wall.mark_sent, wall.mark_received  # type: ignore[method-assign]
        self.record = wall.record  # type: ignore[method-assign]

    def compute(self, kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
        start_s = self._processor_time()
        self._wall.compute(kind, work, function, *args)
        self.seconds[kind, work] += self._processor_time() - start_s


class _Programs:
    """The programs of all workers in the calls of one plan.

    Attributes:
        by_rank: the programs.
        measured: by rank, kind and work of the computations that the cluster has no rate for.
        columns: the most of these that a rank has.
    """

    def __init__(self, plan: CollectivePlan, codec: Codec, vector: Array, cluster: Cluster) -> None:
        self.by_rank = record_all(codec, len(vector), vector.dtype, plan.operation, plan.segments, mean=plan.mean)
        self.measured = [
            [
                (instruction.kind, instruction.work)
                for instruction in program
                if instruction.kind not in (SEND, WAIT, WAIT_SENT)
                and seconds_by_rate(cluster, instruction.amounts) is None
            ]
            for program in self.by_rank
        ]
        self.columns = max(len(keys) for keys in self.measured)


class _Part(NamedTuple):
    """A worker's part in an emulation: the timeline to record in, and a state to go on from, if any."""

    timeline: Timeline | None
    loaded: Mapping[str, Any] | None


class _Emulation:
    """A cluster's emulator and the programs that it ran lately, for all workers of a process."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.emulator = cluster, Emulator(cluster)
        self._programs: OrderedDict[str, _Programs] = OrderedDict()
        self._lock = threading.Lock()

    def programs_of(self, plan: CollectivePlan, codec: Codec, vector: Array) -> _Programs:
        with self._lock:
            programs = self._programs.get(plan.description)
            if programs is not None:
                self._programs.move_to_end(plan.description)
            else:
                programs = self._programs[plan.description] = _Programs(plan, codec, vector, self.cluster)
                if len(self._programs) > MOST_PROGRAMS:
                    self._programs.popitem(last=False)
            return programs

    def replay(self, programs: _Programs, rows: npt.NDArray[np.float64], parts: Mapping[int, _Part]) -> Sequence[float]:
        """Run one collective of all workers.

        Args:
            rows: of each rank its clock at the beginning, then the seconds of what was measured.
            parts: by rank, those of this process.
        Returns:
            The clocks at the end, by rank.
        Raises:
            RingMismatch: workers of this process go on from different states.
        """
        self._go_on_from([part.loaded for part in parts.values()])
        measured = [
            dict(zip(keys, rows[rank, 1:].tolist(), strict=False)) for rank, keys in enumerate(programs.measured)
        ]
        speeds = [self.cluster.node_at(rank).compute_speed for rank in range(self.cluster.nodes)]
        return self.emulator.run(
            programs.by_rank,
            rows[:, 0].tolist(),
            [parts[rank].timeline if rank in parts else None for rank in range(self.cluster.nodes)],
            lambda rank, instruction: measured[rank][instruction.kind, instruction.work] / speeds[rank],
        )

    def _go_on_from(self, loaded: Sequence[Mapping[str, Any] | None]) -> None:
        if all(state is None for state in loaded):
            return
        current = self.emulator.state_dict()
        first, *others = (current if state is None else state for state in loaded)
        if any(state != first for state in others):
            raise RingMismatch("the workers have loaded different states of the cluster's links")
        self.emulator.load_state_dict(first)


class VirtualRing(Ring):
    """One worker of a ring on a described cluster. Every worker makes one.

    A timeline that is given to a collective gets this machine's seconds; its `virtual` one gets the cluster's. In
    virtual time there is one more kind of span, "overhead": the processor time of messages.

    Args:
        inner: the ring that does the work, of as many workers as the cluster has nodes.
        cluster: what to emulate.
        processor_time: seconds of processor time of the calling thread.
    Attributes:
        emulating_s: seconds of this machine that emulating has taken in all collectives, without what `inner` did.
    Raises:
        ClusterError: the cluster has another number of nodes, or is another one than that of other workers here.
    Cost of a collective: one exchange of a few numbers on `inner`, and the emulation of all workers in each process.
    """

    def __init__(
        self, inner: Ring, cluster: Cluster, *, processor_time: Callable[[], float] = time.thread_time
    ) -> None:
        if cluster.nodes != inner.size:
            raise ClusterError(
                f"cluster {cluster.name} has {cluster.nodes} nodes (`nodes`), the ring {inner.size} workers"
            )
        super().__init__(inner.rank, inner.size, inner.chunk_bytes)
        self.inner, self.cluster = inner, cluster
        self._processor_time = processor_time
        self._node = cluster.node_at(inner.rank)
        self._emulation = inner.shared(lambda: _Emulation(cluster))
        if self._emulation.cluster != cluster:
            raise ClusterError(
                f"rank {inner.rank} emulates the cluster {cluster.name}, other ranks {self._emulation.cluster.name} "
                "or one of that name that differs"
            )
        #: Collectives so far, and a state that the emulation goes on from at the next one. Both are this worker's own:
        #: others here may already have loaded what comes next.
        self._calls = 0
        self._loaded: Mapping[str, Any] | None = None
        self.emulating_s = 0.0
        self._base_s, self._mark_s = 0.0, processor_time()
        self._set_pace()

    def _set_pace(self) -> None:
        """Set how slow this node is until the end of the next collective.

        Where nodes share cores, all are taken to compute at the same time in between.
        """
        luck = chance(self.cluster, self._calls + 1)
        crowd = max(1.0, self.size / (self.cluster.shared_cores or self.size))
        self._slowdown = self._node.slowdown * float(luck.stragglers[self.rank]) * crowd

    def clock(self) -> float:
        """This worker's virtual time in seconds, from 0 on."""
        computed_s = self._processor_time() - self._mark_s
        return self._base_s + computed_s * self._slowdown / self._node.compute_speed

    @contextmanager
    def taking(self, seconds: float) -> Iterator[None]:
        """Let the body take `seconds` of virtual time on a node that is not slow, whatever it takes here.

        Raises:
            RuntimeError: there was a collective within, whose time would be lost.
        """
        end_s, calls = self.clock() + seconds * self._slowdown, self._calls
        try:
            yield
        finally:
            if self._calls == calls:
                self._set_clock(end_s)
        if self._calls != calls:
            raise RuntimeError("a collective can't be part of what `taking` gives a time to")

    def _set_clock(self, now_s: float) -> None:
        self._base_s, self._mark_s = now_s, self._processor_time()

    def empty(self, length: int, dtype: npt.DTypeLike = np.float32) -> Array:
        return self.inner.empty(length, dtype)

    def _execute(self, plan: CollectivePlan, codec: Codec, vector: Array, timeline: Timeline | None) -> Stats:
        start_s = self.clock()
        meter = _Meter(Timeline() if timeline is None else timeline, self._processor_time)
        stats = self.inner._execute(plan, codec, vector, meter)

        begun_s = time.perf_counter()
        programs = self._emulation.programs_of(plan, codec, vector)
        row = np.zeros(1 + programs.columns)
        row[0] = start_s
        for column, key in enumerate(programs.measured[self.rank]):
            row[1 + column] = meter.seconds.get(key, 0.0)
        part = _Part(None if timeline is None else timeline.virtual, self._loaded)
        end_s = self.inner.compute_once(row.tolist(), part, partial(self._emulation.replay, programs))
        self._calls, self._loaded = self._calls + 1, None
        self._set_pace()
        self._set_clock(end_s)
        self.emulating_s += time.perf_counter() - begun_s
        return stats

    def state_dict(self) -> dict[str, Any]:
        """This worker's clock and the links' state, for `load_state_dict` of a ring on the same cluster."""
        state = self._emulation.emulator.state_dict() if self._loaded is None else self._loaded
        return {"clock_s": self.clock(), "emulator": state}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state. Every worker loads the one of its rank, all of the same moment."""
        self._loaded = state["emulator"]
        self._calls = state["emulator"]["calls"]
        self._set_pace()
        self._set_clock(state["clock_s"])
