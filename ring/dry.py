"""Cost of an all-reduce on a described cluster, from sizes alone: for planning, up to millions of nodes.

Three ways to the same number:

* `ring.emulator`, event by event, where nodes share uplinks, ports or cores. For some hundred nodes.
* The same rules for all nodes at once, where nothing is shared: then a worker's clock depends on its own past and on
  its predecessor's messages only, so the program of one worker is gone through once, with an array of clocks. The
  numbers are the emulator's; 1,024 nodes that send 4 million messages take less than a second.
* `closed_form`, where nodes are alike as well: a few maxima, whatever the number of nodes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ring.cluster import Cluster, ClusterError
from ring.codec import Array, Codec, Payload
from ring.emulator import MIB, Emulator, chance, draw_jitter, missing_rates, seconds_by_rate
from ring.plan import CHUNK_BYTES
from ring.program import SEND, WAIT, WAIT_SENT, record, record_all
from ring.segments import Chunk, PayloadMap, check_chunk_bytes, cut_segment
from ring.timeline import Timeline
from ring.token_bucket import Floats, TokenBuckets

#: Most nodes for which `all_reduce` counts messages. If there are more, and all alike, it takes the closed form.
MOST_NODES = 4096
#: Most messages that are counted where nodes share something (half a minute), where they don't (some minutes), and
#: where they don't but have jitter (some gigabytes).
MOST_SHARED_MESSAGES, MOST_MESSAGES, MOST_JITTERED_MESSAGES = 1_000_000, 1_000_000_000, 200_000_000
#: Name of the codec's share of a computation, in a program that was recorded without sizes.
CODEC = "codec"
#: Fewest nodes of the closed form. From here on it is within 1 %: what it neglects doesn't grow with their number.
LEAST_NODES = 64
#: Most segments that the closed form looks at one by one; of more it takes a sample, evenly spaced.
MOST_SEGMENTS = 1024


@dataclass(frozen=True)
class Estimate:
    """Cost of an all-reduce.

    Attributes:
        time_s: seconds from when all begin until the last has ended.
        seconds: a worker's seconds by kind of span, mean over the workers; "wait" is exposed communication.
        bytes_sent, messages: of all workers together.
        closed_form: whether the closed form gave the numbers.
    """

    time_s: float
    seconds: dict[str, float]
    bytes_sent: int
    messages: int
    closed_form: bool


def all_reduce(
    cluster: Cluster,
    codec: Codec,
    length: int,
    *,
    dtype: npt.DTypeLike = np.float32,
    op: str = "sum",
    chunk_bytes: int = CHUNK_BYTES,
) -> Estimate:
    """Estimate an all-reduce of a vector of `length` elements between all nodes of the cluster, on rested links.

    Args:
        codec: the codec of the vector; only its sizes are asked for (`regions` and `amounts`).
        op, chunk_bytes: as for `Ring.all_reduce`.
    Raises:
        ClusterError: the cluster has no rate for something that is computed, or more messages than can be counted.
        ValueError: the codec can't code such a vector, or an argument is invalid.
    """
    if cluster.nodes > MOST_NODES and cluster.homogeneous:
        return closed_form(cluster, codec, length, dtype=dtype, op=op, chunk_bytes=chunk_bytes)
    sizes = _Sizes(cluster, codec, length, dtype=dtype, op=op, chunk_bytes=chunk_bytes)
    shared = cluster.shared_cores is not None or Emulator(cluster).links.shared
    jittered = cluster.link.jitter_us > 0 or any(link.jitter_us for link in cluster.other_links.values())
    most = MOST_SHARED_MESSAGES if shared else MOST_JITTERED_MESSAGES if jittered else MOST_MESSAGES
    messages = 2 * (cluster.nodes - 1) * int(sizes.present.sum())
    if messages > most:
        raise ClusterError(
            f"cluster {cluster.name}: {cluster.nodes} nodes send {messages:,} messages, at most {most:,} can be "
            "counted where nodes differ, share something or vary; take fewer nodes, or larger chunks"
        )
    if shared:
        return _event_by_event(sizes)
    return _AllNodes(sizes).run()


def closed_form(
    cluster: Cluster,
    codec: Codec,
    length: int,
    *,
    dtype: npt.DTypeLike = np.float32,
    op: str = "sum",
    chunk_bytes: int = CHUNK_BYTES,
) -> Estimate:
    """Estimate an all-reduce without counting messages, between `LEAST_NODES` nodes or more that are all alike.

    Each of the 2(N-1) steps takes what holds it up: the link, with C messages; the processor, with encoding, adding and
    handling of C messages; or the way of one chunk from worker to worker. In the reduce-scatter and in the all-gather:

        step = max(C·wire, C·(encode + add + 2·handling), wire + latency + add + 2·handling)
        step = max(C·wire, C·(decode + 2·handling), wire + latency + 2·handling)

    (a per-hop codec encodes only in the first step). The first two of a maximum are means over the segments, the last
    is that of the largest chunk, as nobody can overtake it. To N-1 of both steps comes what fills and empties the
    pipeline. That is within 1 % of what `all_reduce` counts where one codec takes the whole vector. Where segments
    differ in what they cost to compute, as with another K and d in each layer, it is up to 12 % too low if computing is
    what holds the ring up (ResNet-32 at ratio 8 on 60 random clusters; median 0.1 %).

    Raises:
        ClusterError: nodes or links differ (`Cluster.homogeneous`), are too few, or a rate is missing.
        ValueError: as for `all_reduce`.
    """
    size, node, link = cluster.nodes, cluster.node, cluster.link
    if not cluster.homogeneous:
        raise ClusterError(f"cluster {cluster.name}: the closed form is for nodes and links that are all alike")
    if size < LEAST_NODES:
        raise ClusterError(f"cluster {cluster.name}: the closed form needs {LEAST_NODES} `nodes` or more, got {size}")
    sizes = _Sizes(cluster, codec, length, dtype=dtype, op=op, chunk_bytes=chunk_bytes, most_segments=MOST_SEGMENTS)
    if not sizes.most_chunks:
        return sizes.estimate(0.0, {}, closed_form=True)
    nothing = np.zeros_like(sizes.bytes)
    encode = nothing if codec.in_place else node.slowdown * sizes.seconds("encode", CODEC)
    add = node.slowdown * sizes.seconds("add" if codec.linear else "recode", CODEC)
    decode = (
        nothing
        if codec.in_place
        else node.slowdown * sizes.seconds("decode", CODEC, *(["scale"] if sizes.mean else []))
    )
    handling = node.slowdown * 1e-6 * (node.overhead_us * sizes.present + node.copy_us_per_mib * sizes.bytes / MIB)
    wire, latency_s = sizes.bytes / link.bytes_per_s, link.latency_us * 1e-6
    call_s = node.slowdown * node.call_us * 1e-6
    every_step = encode if codec.linear else nothing

    def segment(chunks: Floats) -> float:
        """Sum over a segment's chunks, mean over the segments."""
        return float(chunks[: sizes.spaced].sum(1).mean())

    def beside_sending(computing_s: float) -> float:
        """Seconds of a step's computing on a node that is slower while it is sending."""
        slow, sending_s = node.overlap_slowdown, segment(wire)
        return computing_s * slow if computing_s * slow < sending_s else sending_s + computing_s - sending_s / slow

    largest = np.unravel_index(np.argmax(sizes.bytes), sizes.bytes.shape)
    reducing_s = beside_sending(segment(every_step + add + 2 * handling))
    gathering_s = beside_sending(segment(decode + 2 * handling))
    way = wire + latency_s + 2 * handling
    reduce_s = max(segment(wire), reducing_s, (way + add).max())
    gather_s = max(segment(wire), gathering_s, way.max())
    fill_s = segment(encode) if reduce_s == reducing_s else encode[largest]
    drain_s = segment(decode) if gather_s == gathering_s else decode[largest]
    busiest = max(wire[largest], (every_step + add + 2 * handling)[largest], (decode + 2 * handling)[largest])
    time_s = call_s + float(
        max(
            fill_s + (size - 1) * (reduce_s + gather_s) + drain_s,
            # What the largest of three neglects: the ends of a segment are so far apart on its way,
            encode[largest]
            + (size - 1) * (2 * way + add)[largest]
            + (sizes.most_chunks - 1) * busiest
            + decode[largest],
            # and a link that never rests starts after the first chunk, and has to empty.
            (encode + 2 * handling + decode)[largest] + 2 * (size - 1) * segment(wire) + latency_s,
        )
    )
    seconds = {
        "encode": segment(encode) * (size if codec.linear else 1),
        "add" if codec.linear else "recode": segment(add) * (size - 1),
        "decode": segment(decode) * size,
        "overhead": segment(handling) * 4 * (size - 1) + call_s,
    }
    seconds = {kind: value for kind, value in seconds.items() if value}
    return sizes.estimate(time_s, {**seconds, "wait": max(0.0, time_s - sum(seconds.values()))}, closed_form=True)


class _Sizes:
    """The chunks of one all-reduce: all, or those of some segments.

    Attributes:
        spaced: number of segments that means are taken over: all of them, or a sample that is evenly spaced. They come
            first. The segments behind them each have a unit from the middle of a region: where units are longer than
            segments few segments have one, but those few set the pace.
    """

    def __init__(
        self,
        cluster: Cluster,
        codec: Codec,
        length: int,
        *,
        dtype: npt.DTypeLike = np.float32,
        op: str = "sum",
        chunk_bytes: int = CHUNK_BYTES,
        most_segments: int | None = None,
    ) -> None:
        if op not in ("sum", "mean"):
            raise ValueError(f"`op` must be 'sum' or 'mean', got {op!r}")
        check_chunk_bytes(chunk_bytes)
        self.cluster, self.codec, self.length, self.mean = cluster, codec, length, op == "mean"
        self.dtype, self.size = np.dtype(dtype), cluster.nodes
        regions = codec.regions(length, self.dtype)
        payload = PayloadMap(regions)
        rows = [*range(self.size)]
        self.spaced = self.size
        if most_segments is not None and self.size > most_segments:
            rows = rows[:: -(-self.size // most_segments)]
            self.spaced = len(rows)
            before = 0
            for region in regions:  # the unit in its middle falls to one of three segments
                middle = before + (region.length // region.unit // 2 + 0.5) * region.unit_bytes
                near = int(middle / payload.num_bytes * self.size) if payload.num_bytes else 0
                rows += [row for row in (near - 1, near, near + 1) if 0 <= row < self.size]
                before += region.num_bytes
        self.segments = [cut_segment(payload, row, self.size, chunk_bytes) for row in rows]
        self.num_bytes = payload.num_bytes
        self.most_chunks = max(len(segment) for segment in self.segments)
        self.bytes = self._table(lambda chunk: chunk.num_bytes)
        self.present = self._table(lambda chunk: 1.0) > 0
        self._vector: Array = np.broadcast_to(np.zeros(1, self.dtype), (length,))
        self._payload: Payload = np.broadcast_to(np.zeros(1, np.uint8), (self.num_bytes,))

    def _table(self, value: Callable[[Chunk], float]) -> Floats:
        """Table of a chunk's value, by segment and number; 0 where a segment has fewer chunks than others."""
        table = np.zeros((len(self.segments), self.most_chunks))
        for row, segment in zip(table, self.segments, strict=True):
            row[: len(segment)] = [value(chunk) for chunk in segment]
        return table

    def seconds(self, kind: str, *parts: str) -> Floats:
        """Seconds of computing on a chunk, by segment and number of the chunk.

        Args:
            kind: as for `Codec.amounts`.
            parts: what is computed: CODEC for the codec's share, "scale" for the division for a mean.
        Raises:
            ClusterError: a rate is missing.
        """

        def seconds(chunk: Chunk) -> float:
            values = self._vector[chunk.start : chunk.stop]
            payload = self._payload[chunk.first_byte : chunk.last_byte]
            amounts: list[tuple[str, float]] = []
            if CODEC in parts:
                amounts += self.codec.amounts(kind, values, chunk.start, payload)
            if "scale" in parts:
                amounts.append(("scale", values.nbytes))
            found = seconds_by_rate(self.cluster, amounts)
            if found is None:
                raise missing_rates(self.cluster, amounts)
            return found

        return self._table(seconds)

    def estimate(self, ends_s: float, seconds: Mapping[str, float], closed_form: bool = False) -> Estimate:
        trips = 2 * (self.size - 1)
        per_segment = float(self.present[: self.spaced].sum()) / self.spaced
        return Estimate(
            ends_s, dict(seconds), trips * self.num_bytes, round(trips * self.size * per_segment), closed_form
        )


def _event_by_event(sizes: _Sizes) -> Estimate:
    programs = record_all(sizes.codec, sizes.length, sizes.dtype, "all_reduce", sizes.segments, mean=sizes.mean)
    timelines = [Timeline() for _ in programs]
    ends_s = Emulator(sizes.cluster).run(programs, [0.0] * sizes.size, timelines)
    totals: dict[str, float] = defaultdict(float)
    for timeline in timelines:
        for kind, seconds in timeline.totals().items():
            totals[kind] += seconds / sizes.size
    return sizes.estimate(max(ends_s), totals)


class _AllNodes:
    """All workers' clocks, moved together through the program of one.

    In each step every worker does the same with another segment. A segment with fewer chunks than others is filled up
    with chunks that are not there: nothing is computed or sent for them, and nobody waits.
    """

    def __init__(self, sizes: _Sizes) -> None:
        cluster, size = sizes.cluster, sizes.size
        self._sizes, self._size, self._most = sizes, size, sizes.most_chunks
        self._ranks = np.arange(size)
        self._full = bool(sizes.present.all())
        nodes = [cluster.node_at(rank) for rank in range(size)]
        links = [cluster.link_from(rank) for rank in range(size)]
        luck = chance(cluster, 1)
        self._slowdown = np.array([node.slowdown for node in nodes]) * luck.stragglers
        self._overlap = np.array([node.overlap_slowdown for node in nodes])
        self._overlaps = bool((self._overlap > 1).any())
        self._call_s = np.array([node.call_us for node in nodes]) * 1e-6
        self._overhead_s = np.array([node.overhead_us for node in nodes]) * 1e-6
        self._copy_s = np.array([node.copy_us_per_mib for node in nodes]) * 1e-6 / MIB
        self._handles = bool(self._overhead_s.any() or self._copy_s.any())
        self._links = TokenBuckets([link.bytes_per_s for link in links], [link.burst_bytes for link in links])
        self._latency_s = np.array([link.latency_us for link in links]) * 1e-6
        self._jitter_s: Floats | None = None
        jitters_s = [link.jitter_us * 1e-6 for link in links]
        if any(jitters_s) and size > 1:
            self._jitter_s = draw_jitter(jitters_s, luck.generator, 2 * (size - 1), self._most)
        self._clock_s = np.zeros(size)
        self._totals: dict[str, float] = defaultdict(float)

    def run(self) -> Estimate:
        # Chunks of one element each, whose positions in the vector tell their segment and number.
        segments = [
            [Chunk(place, place + 1, place, place + 1) for place in range(row * self._most, (row + 1) * self._most)]
            for row in range(self._size)
        ]
        program = record(
            self._sizes.codec,
            self._size * self._most,
            self._sizes.dtype,
            "all_reduce",
            segments,
            0,
            mean=self._sizes.mean,
            amounts=lambda kind, values, start, payload: [(CODEC, 1.0)],
        )
        #: Arrival times of the messages on their way, by the receivers' step and the chunk's number: one per receiver.
        arriving: dict[tuple[int, int], Floats] = {}
        tables: dict[tuple[str, ...], Floats] = {}
        if program and self._call_s.any():
            self._compute("overhead", self._call_s)
        for kind, item, amounts in program:
            segment, number = (self._ranks - item.step) % self._size, item.chunk.start % self._most
            there = None if self._full else self._sizes.present[segment, number]
            if kind == SEND:
                num_bytes = self._sizes.bytes[segment, number]
                self._handle(num_bytes, there)
                departed_s = np.maximum(self._clock_s, self._links.all_free_s)
                arrived_s = self._links.transmit_all(departed_s, num_bytes, there) + self._latency_s
                if self._jitter_s is not None:
                    arrived_s += self._jitter_s[item.step, number]
                arriving[item.step + 1, number] = np.roll(arrived_s, 1)
            elif kind == WAIT:
                self._wait(arriving.pop((item.step, number)), there)
                self._handle(self._sizes.bytes[segment, number], there)
            elif kind != WAIT_SENT:  # no need to wait: the message has gone around the ring, so it has left long ago
                key = kind, *(name for name, _ in amounts)
                if key not in tables:
                    tables[key] = self._sizes.seconds(*key)
                self._compute(kind, tables[key][segment, number])
        self._wait(self._links.all_free_s, None)
        return self._sizes.estimate(float(self._clock_s.max()), self._totals)

    def _compute(self, kind: str, seconds: Floats) -> None:
        seconds = seconds * self._slowdown
        if self._overlaps:
            busy_s, slow = np.maximum(self._links.all_free_s - self._clock_s, 0.0), self._overlap
            seconds = np.where(seconds * slow < busy_s, seconds * slow, busy_s + seconds - busy_s / slow)
        self._clock_s = self._clock_s + seconds
        self._totals[kind] += float(seconds.mean())

    def _handle(self, num_bytes: Floats, there: npt.NDArray[np.bool_] | None) -> None:
        if self._handles:
            seconds = self._overhead_s + self._copy_s * num_bytes
            self._compute("overhead", seconds if there is None else np.where(there, seconds, 0.0))

    def _wait(self, until_s: Floats, there: npt.NDArray[np.bool_] | None) -> None:
        later_s = np.maximum(self._clock_s, until_s)
        if there is not None:
            later_s = np.where(there, later_s, self._clock_s)
        self._totals["wait"] += float((later_s - self._clock_s).mean())
        self._clock_s = later_s
