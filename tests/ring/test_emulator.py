"""Virtual time: hand-computed clocks, the same numbers with and without data, the same bits as every driver."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from gradiveq.over_ring.pca_codec import PCASizes
from gradiveq.over_ring.qsgd import QSGD
from ring import Codec, Composite, IdentityCodec, RingMismatch, dry, lockstep
from ring.cluster import Cluster, ClusterError, Racks, parse
from ring.codec import Array, Hop, Payload
from ring.emulator import Emulator
from ring.timeline import Timeline
from ring.virtual import VirtualRing
from tests.support.processes import Launch
from tests.support.toy_codecs import HalfPerHop, PairSums

RATES = {
    "add": 1e6,
    "copy": 1e6,
    "scale": 1e6,
    "pairsums.encode": 250e3,
    "pairsums.decode": 500e3,
    "halfperhop.encode": 250e3,
    "halfperhop.recode": 250e3,
    "halfperhop.decode": 500e3,
}
#: 1 byte per microsecond, and 1 ms until it is there.
LINK = {"bandwidth_gbps": 0.008, "latency_us": 1000.0}


def cluster(nodes: int = 2, link: Mapping[str, Any] = {}, **more: Any) -> Cluster:
    return parse({"nodes": nodes, "link": {**LINK, **link}, "rates": RATES, **more}, "test")


def in_virtual_time(
    cluster: Cluster,
    length: int = 1000,
    codec: Codec | None = None,
    chunk_bytes: int = 1 << 30,
    calls: int = 1,
    op: str = "sum",
) -> list[tuple[float, Timeline]]:
    """Of each worker, milliseconds and the virtual timeline of all-reduces that all begin at 0."""

    def work(ring: lockstep.LockstepRing) -> tuple[float, Timeline]:
        virtual = VirtualRing(ring, cluster, processor_time=lambda: 0.0)
        timeline = Timeline(virtual=Timeline(virtual.clock, keep=True))
        for _ in range(calls):
            vector = np.full(length, virtual.rank + 1, np.float32)
            virtual.all_reduce(vector, codec or IdentityCodec(), chunk_bytes=chunk_bytes, timeline=timeline, op=op)
        assert timeline.virtual is not None
        return virtual.clock() * 1e3, timeline.virtual

    return lockstep.run(cluster.nodes, work)


def clocks(*args: Any, **kwargs: Any) -> list[float]:
    return [clock_ms for clock_ms, _ in in_virtual_time(*args, **kwargs)]


def test_one_chunk() -> None:
    """2 ms on the link, 1 ms of latency, 2 ms to add, and 3 ms back: nothing overlaps."""
    for clock_ms, timeline in in_virtual_time(cluster()):
        assert clock_ms == pytest.approx(8)
        assert timeline.totals() == pytest.approx({"wait": 6e-3, "add": 2e-3})
        spans = [(span.kind, round(span.start_s * 1e3, 9), round(span.end_s * 1e3, 9)) for span in timeline.spans]
        assert spans == [("wait", 0, 3), ("add", 3, 5), ("wait", 5, 8)]
        assert [tuple(round(t * 1e3, 9) for t in sent[2:]) for sent in timeline.sent] == [(0, 0, 2), (5, 5, 7)]
        assert [round(received.arrived_s * 1e3, 9) for received in timeline.received] == [3, 8]
        assert {span.call for span in timeline.spans} == {1}


def test_chunks_overlap() -> None:
    """Two chunks: the second is on its way while the first is added."""
    assert clocks(cluster(), chunk_bytes=1000) == pytest.approx([6, 6])


def test_a_linear_codec_encodes_while_the_message_arrives() -> None:
    """2 ms to encode, 1 on the link, 1 latency; its own is encoded meanwhile; 1 to add, 2 back, 1 to decode."""
    for clock_ms, timeline in in_virtual_time(cluster(), codec=PairSums()):
        assert clock_ms == pytest.approx(8)
        assert timeline.totals() == pytest.approx({"encode": 4e-3, "add": 1e-3, "decode": 2e-3, "wait": 1e-3})


def test_a_per_hop_codec_can_not() -> None:
    """The same bytes and rates: the message has to be there before it is decoded, added and encoded."""
    for clock_ms, timeline in in_virtual_time(cluster(), codec=HalfPerHop()):
        assert clock_ms == pytest.approx(9)
        assert timeline.totals() == pytest.approx({"encode": 2e-3, "recode": 2e-3, "decode": 2e-3, "wait": 3e-3})


def test_a_straggler_holds_up_the_other() -> None:
    """Node 1 adds from 3 to 7 ms; what it sends then has left at 9 and arrives at 10."""
    assert clocks(cluster(override={"node": {"1": {"slowdown": 2.0}}})) == pytest.approx([10, 9])


def test_a_slow_link() -> None:
    """4 instead of 2 ms from node 1 to 0, twice."""
    assert clocks(cluster(override={"link": {"1": {"bandwidth_gbps": 0.004}}})) == pytest.approx([10, 10])


def test_half_duplex_ports_take_turns() -> None:
    """Node 1's first message leaves after node 0's, at 4 ms; node 0 has added it at 7, and then sends until 9."""
    assert clocks(cluster(link={"full_duplex": False})) == pytest.approx([9, 10])


def test_half_duplex_ports_take_turns_in_pairs() -> None:
    """Of four nodes, two links that share no port are always busy: 6 messages out and 6 in, of 400 ms each."""
    half = dry.all_reduce(cluster(4, link={"full_duplex": False}), IdentityCodec(), 400_000)
    assert half.time_s == pytest.approx(12 * 0.4, rel=0.01)


def test_computing_is_not_slower_while_only_receiving() -> None:
    """A port that is busy with what it receives doesn't slow computing, half duplex or not."""
    slow = cluster(link={"full_duplex": False}, node={"overlap_slowdown": 2.0})
    assert clocks(slow) == pytest.approx(clocks(cluster(link={"full_duplex": False})))


def test_hosts_of_one_machine_share_its_core() -> None:
    """Both add at 3 ms, on one core: until 7."""
    assert clocks(cluster(shared_cores=1)) == pytest.approx([10, 10])
    assert clocks(cluster(shared_cores=2)) == pytest.approx([8, 8])


def test_cores_are_shared_only_while_somebody_else_computes() -> None:
    """Node 1's messages are late by 1 ms, so that node 0 adds from 4 to 7 beside node 1's 3 to 6, of 3 ms each.

    Alone from 3 to 4 (1 of 2 ms done), shared from 4 to 6 (node 1 is done, node 0 has 1 left), alone from 6 to 7.
    """
    shared = cluster(override={"link": {"1": {"latency_us": 2000.0}}}, shared_cores=1)
    spans = [[span for span in timeline.spans if span.kind == "add"] for _, timeline in in_virtual_time(shared)]
    assert [(span.start_s * 1e3, span.end_s * 1e3) for (span,) in spans] == [
        pytest.approx((4, 7)),
        pytest.approx((3, 6)),
    ]


def test_a_rested_link_passes_a_burst_at_once() -> None:
    assert clocks(cluster(link={"burst_bytes": 2000})) == pytest.approx([4, 4])
    assert clocks(cluster(link={"burst_bytes": 1000})) == pytest.approx([6, 6])


def test_a_link_remembers_its_burst() -> None:
    """4000 bytes in a message, 2000 of them at once; 1 ms after the last one the bucket holds 1000, not 2000."""
    once, twice = (clocks(cluster(link={"burst_bytes": 2000}), length=2000, calls=calls)[0] for calls in (1, 2))
    assert once == pytest.approx(2 + 1 + 4 + 2 + 1)
    assert twice - once == pytest.approx(once + 1)


def test_messages_cost_processor_time() -> None:
    """0.5 ms at each end of each of two messages on the way of each chunk."""
    for clock_ms, timeline in in_virtual_time(cluster(node={"overhead_us": 500.0})):
        assert clock_ms == pytest.approx(10)
        assert timeline.totals()["overhead"] == pytest.approx(2e-3)
    copying = {"copy_us_per_mib": 500.0 * (1 << 20) / 2000}
    assert clocks(cluster(node=copying)) == pytest.approx([10, 10])


def test_collectives_cost_processor_time() -> None:
    assert clocks(cluster(node={"call_us": 250.0}), calls=2) == pytest.approx([16.5, 16.5])


def test_computing_is_slower_while_sending() -> None:
    """The second chunk is added from 3 ms on, and until 4 the first one is leaving: 1.5 ms instead of 1."""
    assert clocks(cluster(node={"overlap_slowdown": 2.0}), chunk_bytes=1000) == pytest.approx([6.5, 6.5])


def test_packet_loss_is_lost_bandwidth() -> None:
    assert clocks(cluster(link={"packet_loss": 0.5})) == pytest.approx([12, 12])


def test_racks_share_their_uplinks() -> None:
    """Every link crosses between two racks of two, so that two messages at a time want each uplink."""
    alone = dry.all_reduce(cluster(4), IdentityCodec(), 4000).time_s
    racks = {"size": 2, "uplink_gbps": 0.008}
    neighbours = dry.all_reduce(cluster(4, racks=racks), IdentityCodec(), 4000).time_s
    scattered = dry.all_reduce(cluster(4, racks={**racks, "placement": "round-robin"}), IdentityCodec(), 4000).time_s
    assert alone == pytest.approx(3 * (4 + 1 + 4e-3 * 1e3) * 1e-3 + 3 * (4 + 1) * 1e-3)
    assert neighbours == pytest.approx(alone)  # one link out of each rack: it has the uplink for itself
    # 12 messages of 4 ms pass each uplink, and the last one has 1 ms of latency; without racks it is 42 ms in all
    assert 49e-3 <= scattered <= 1.1 * 49e-3
    wide = {"size": 2, "uplink_gbps": 0.016, "placement": "round-robin"}
    assert dry.all_reduce(cluster(4, racks=wide), IdentityCodec(), 4000).time_s == pytest.approx(alone, rel=0.1)


def test_an_uplink_is_taken_when_a_message_departs() -> None:
    """Node 0's slow link queues many messages; until they depart, the uplink is free for node 2's."""
    racks = {"size": 2, "uplink_gbps": 0.08, "placement": "round-robin"}
    slow = cluster(4, racks=racks, override={"link": {"0": {"bandwidth_gbps": 0.0008}}})
    received = in_virtual_time(slow, 400, chunk_bytes=100)[3][1].received
    assert received[0].arrived_s * 1e3 == pytest.approx(0.1 + 1)
    wide = cluster(4, racks={"size": 2, "uplink_gbps": 0.016, "placement": "round-robin"})
    alone, beside = (dry.all_reduce(c, IdentityCodec(), 40_000, chunk_bytes=1000).time_s for c in (cluster(4), wide))
    assert beside == pytest.approx(alone, rel=0.01)  # as wide as its links together


def test_jitter_and_random_stragglers_depend_on_the_seed_and_the_call() -> None:
    def run(seed: int) -> list[float]:
        more = {"seed": seed, "stragglers": {"probability": 0.5, "slowdown": 3.0}}
        return clocks(cluster(3, link={"jitter_us": 300.0}, **more), calls=3)

    assert run(1) == run(1)
    assert run(1) != run(2)
    quiet = clocks(cluster(3), calls=3)
    assert all(disturbed > still for disturbed, still in zip(run(1), quiet, strict=True))


class Timed(PairSums):
    """Takes processor time as it is told."""

    def __init__(self, clock: list[float]) -> None:
        self._clock = clock

    def describe(self, dtype: np.dtype[Any]) -> str:
        return "timed"

    def amounts(self, kind: str, values: Array, start: int, payload: Payload) -> list[tuple[str, float]]:
        return [("nobody knows", 1.0)]

    def encode(self, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        self._clock[0] += 2e-3
        super().encode(values, start, payload, hop)

    def reduce(self, incoming: Payload, values: Array, start: int, payload: Payload, hop: Hop) -> None:
        self._clock[0] += 1e-3
        super().reduce(incoming, values, start, payload, hop)

    def decode(self, payload: Payload, start: int, values: Array, size: int) -> None:
        self._clock[0] += 1e-3
        super().decode(payload, start, values, size)


def test_what_has_no_rate_takes_the_processor_time_that_it_took() -> None:
    """As the linear codec above, on nodes that are twice as fast; and with 1 ms of computing before and 5 behind."""
    clock = [0.0]
    codec = Timed(clock)

    def work(ring: lockstep.LockstepRing) -> tuple[float, float, float]:
        virtual = VirtualRing(ring, cluster(node={"compute_speed": 2.0}), processor_time=lambda: clock[0])
        with virtual.taking(1e-3):
            pass
        before = virtual.clock()
        virtual.all_reduce(np.ones(1000, np.float32), codec)
        after = virtual.clock()
        ring.barrier()
        if ring.rank == 0:
            clock[0] += 10e-3
        ring.barrier()
        return before, after, virtual.clock()

    for before, after, end in lockstep.run(2, work):
        assert before == pytest.approx(1e-3)
        # 1 to encode, 1 on the link, 1 latency (of which the own encoding hides 1), 0.5, 2, 0.5 to decode
        assert after - before == pytest.approx(1e-3 + 2e-3 + 0.5e-3 + 2e-3 + 0.5e-3)
        assert end - after == pytest.approx(5e-3)


def test_taking() -> None:
    """Slow nodes take longer, and those that share cores; a collective within would be lost."""

    def work(ring: lockstep.LockstepRing) -> list[float]:
        found = []
        for described in (cluster(4), cluster(4, shared_cores=2), cluster(4, node={"slowdown": 3.0})):
            virtual = VirtualRing(ring, described, processor_time=lambda: 0.0)
            with virtual.taking(1.0):
                pass
            found.append(virtual.clock())
        with pytest.raises(RuntimeError, match="a collective can't be part"), virtual.taking(1.0):
            virtual.barrier()
        return found

    assert lockstep.run(4, work) == [[1.0, 2.0, 3.0]] * 4


def test_a_missing_rate_needs_data() -> None:
    with pytest.raises(ClusterError, match=r"cluster test has no `rates` for qsgd\.encode, and nothing was measured"):
        dry.all_reduce(parse({"nodes": 2, "name": "test"}, "x"), QSGD(), 1000)


def test_the_ring_must_have_as_many_workers_as_the_cluster_nodes() -> None:
    with pytest.raises(ClusterError, match=r"cluster cluster has 3 nodes .*, the ring 2 workers"):
        lockstep.run(2, lambda ring: VirtualRing(ring, cluster(3)))


def test_state_goes_on_where_it_was() -> None:
    noisy = cluster(3, link={"jitter_us": 300.0, "burst_bytes": 500}, stragglers={"probability": 0.5, "slowdown": 3.0})

    def work(ring: lockstep.LockstepRing) -> tuple[float, float]:
        def reduce(virtual: VirtualRing) -> None:
            virtual.all_reduce(np.ones(1000, np.float32))

        rings = [VirtualRing(ring, noisy, processor_time=lambda: 0.0) for _ in range(2)]
        for _ in range(3):
            reduce(rings[0])
        state = rings[0].state_dict()
        for _ in range(2):
            reduce(rings[0])
        rings[1].load_state_dict(state)
        for _ in range(2):
            reduce(rings[1])
        return rings[0].clock(), rings[1].clock()

    for went_on, resumed in lockstep.run(3, work):
        assert went_on == resumed > 0


#: Clocks of ranks 0, 1 and the last, from when each worker had an emulator of its own.
RECORDED = {
    6: ("0x1.e492bc2fc6975p-6", "0x1.056c508b32cecp-5", "0x1.f566490a350d5p-6"),
    32: ("0x1.0697aeddce7e7p-3", "0x1.0cc144028e516p-3", "0x1.04883fd502271p-3"),
    48: ("0x1.863305100a3c0p-3", "0x1.8c61522a6f422p-3", "0x1.842396073de4ap-3"),
}


@pytest.mark.parametrize("nodes", RECORDED)
def test_many_workers_have_one_emulator_and_the_clocks_of_one_each(nodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Cluster] = []

    def counted(described: Cluster) -> Emulator:
        made.append(described)
        return Emulator(described)

    monkeypatch.setattr("ring.virtual.Emulator", counted)
    described = cluster(
        nodes,
        link={"burst_bytes": 300},
        node={"overhead_us": 3.0, "call_us": 20.0, "overlap_slowdown": 1.5},
        override={"node": {"1": {"slowdown": 3.0}}, "link": {"0": {"bandwidth_gbps": 0.005}}},
    )

    def contribution(rank: int, length: int) -> Array:
        return ((np.arange(length) * 7 + 3 * rank) % 31).astype(np.float32)

    def work(ring: lockstep.LockstepRing) -> float:
        virtual = VirtualRing(ring, described, processor_time=lambda: 0.0)
        for length in (1000, 7):
            vector = contribution(ring.rank, length)
            virtual.all_reduce(vector, chunk_bytes=64, op="mean")
            total = sum((contribution(rank, length) for rank in range(nodes)), np.zeros(length, np.float32))
            np.testing.assert_array_equal(vector, total / np.float32(nodes))
            with virtual.taking(1e-3):
                pass
        return virtual.clock()

    found = lockstep.run(nodes, work)
    assert made == [described]
    assert (found[0].hex(), found[1].hex(), found[-1].hex()) == RECORDED[nodes]


@pytest.mark.parametrize("codec", [IdentityCodec(), QSGD()], ids=["identity", "per-hop"])
def test_64_workers_take_what_sizes_alone_say(codec: Codec) -> None:
    described = random_cluster(random.Random(4), 64, alike=False)
    estimate = dry.all_reduce(described, codec, 10_000, chunk_bytes=500)
    measured = in_virtual_time(described, 10_000, codec, 500)
    assert estimate.time_s * 1e3 == max(clock_ms for clock_ms, _ in measured)
    assert estimate.messages == sum(len(timeline.sent) for _, timeline in measured)


def test_a_state_that_a_worker_loads_is_its_own_until_all_are_there() -> None:
    """Workers of one process have one emulator; one that is late still sees what it had."""
    described = cluster(2, link={"burst_bytes": 500})

    def work(ring: lockstep.LockstepRing) -> tuple[Any, ...]:
        virtual = VirtualRing(ring, described, processor_time=lambda: 0.0)
        virtual.all_reduce(np.ones(1000, np.float32))
        earlier = virtual.state_dict()
        virtual.all_reduce(np.ones(1000, np.float32))
        later = virtual.state_dict()
        if ring.rank == 0:
            virtual.load_state_dict(earlier)
            assert virtual.state_dict() == earlier
        ring.barrier()
        if ring.rank == 1:
            assert virtual.state_dict() == later != earlier
            virtual.load_state_dict(earlier)
        virtual.all_reduce(np.ones(1000, np.float32))
        return later, virtual.state_dict()

    for later, again in lockstep.run(2, work):
        assert later == again


def test_workers_that_go_on_from_different_states_are_told() -> None:
    def work(ring: lockstep.LockstepRing) -> None:
        virtual = VirtualRing(ring, cluster(), processor_time=lambda: 0.0)
        state = virtual.state_dict()
        virtual.barrier()
        if ring.rank == 0:
            virtual.load_state_dict(state)
        virtual.barrier()

    with pytest.raises(RingMismatch, match="different states of the cluster's links"):
        lockstep.run(2, work)


def test_workers_of_one_process_emulate_one_cluster() -> None:
    def work(ring: lockstep.LockstepRing) -> VirtualRing:
        return VirtualRing(ring, cluster(name=f"number {ring.rank}"))

    with pytest.raises(ClusterError, match=r"rank (\d) emulates the cluster number \1, other ranks number"):
        lockstep.run(2, work)


def random_cluster(rng: random.Random, nodes: int, *, alike: bool) -> Cluster:
    rates = {"add": 10 ** rng.uniform(8.5, 10), "copy": 4e9, "scale": 4e9}
    for kind in ("encode", "recode", "decode"):
        rates[f"qsgd.{kind}"], rates[f"pca.{kind}"] = 10 ** rng.uniform(7.5, 9), 10 ** rng.uniform(9, 11)
    table: dict[str, Any] = {
        "nodes": nodes,
        "node": {
            "slowdown": rng.uniform(1, 2),
            "overlap_slowdown": rng.choice([1.0, 1.0, 1.2, 2.0]),
            "overhead_us": rng.choice([0, 0, 5, 50]),
            "call_us": rng.choice([0, 30]),
            "copy_us_per_mib": rng.choice([0, 200]),
        },
        "link": {"latency_us": 10 ** rng.uniform(0, 3.5), "bandwidth_gbps": 10 ** rng.uniform(-2, 2)},
        "rates": rates,
    }
    if not alike:
        table["link"] |= {"jitter_us": rng.choice([0, 20]), "burst_bytes": rng.choice([0, 30_000])}
        table["stragglers"] = {"probability": 0.3, "slowdown": 2.0}
        table["override"] = {"node": {"1": {"slowdown": 3.0}}, "link": {"0": {"bandwidth_gbps": 0.5}}}
    return parse(table, "random")


def random_codec(rng: random.Random, length: int) -> Codec:
    return rng.choice([IdentityCodec(), QSGD(), PCASizes("a", 256, [(length, 32)])])


@pytest.mark.parametrize("seed", range(40))
def test_dry_is_what_data_gives(seed: int) -> None:
    """The clock of the slowest worker, the seconds by kind and the bytes, to the last bit but for rounding of sums."""
    rng = random.Random(seed)
    nodes, length = rng.choice([1, 2, 3, 5, 6]), rng.choice([1, 7, 5000, 30_001])
    described = random_cluster(rng, nodes, alike=nodes == 1)
    if rng.random() < 0.5:  # then event by event
        shared: dict[str, Any] = rng.choice([{"racks": Racks(2, 1.0, "round-robin")}, {"shared_cores": 2}])
        described = replace(described, **shared)
    codec, chunk_bytes = (
        rng.choice([IdentityCodec(), QSGD(), Composite([(length, QSGD())])]),
        rng.choice([3000, 1 << 30]),
    )
    op = rng.choice(["sum", "mean"])
    estimate = dry.all_reduce(described, codec, length, chunk_bytes=chunk_bytes, op=op)
    measured = in_virtual_time(described, length, codec, chunk_bytes, op=op)
    assert estimate.time_s * 1e3 == max(clock_ms for clock_ms, _ in measured)
    totals = [timeline.totals() for _, timeline in measured]
    kinds = {kind for total in totals for kind in total}
    means = {kind: sum(total.get(kind, 0.0) for total in totals) / nodes for kind in kinds}
    assert {kind: value for kind, value in estimate.seconds.items() if value} == pytest.approx(means)
    assert estimate.messages == sum(len(timeline.sent) for _, timeline in measured)
    sent_bytes = sum(sent.work.chunk.num_bytes for _, timeline in measured for sent in timeline.sent)
    assert estimate.bytes_sent == sent_bytes


@pytest.mark.parametrize("seed", range(60))
def test_the_closed_form_is_within_1_percent(seed: int) -> None:
    rng = random.Random(seed)
    described = random_cluster(rng, rng.choice([64, 80, 100, 256]), alike=True)
    length, chunk_bytes = int(10 ** rng.uniform(4, 7.3)), rng.choice([65_536, 524_288, 1 << 40])
    codec, op = random_codec(rng, length), rng.choice(["sum", "mean"])
    counted = dry.all_reduce(described, codec, length, chunk_bytes=chunk_bytes, op=op)
    closed = dry.closed_form(described, codec, length, chunk_bytes=chunk_bytes, op=op)
    assert closed.closed_form
    assert not counted.closed_form
    assert closed.time_s == pytest.approx(counted.time_s, rel=0.01)
    assert (closed.bytes_sent, closed.messages) == (counted.bytes_sent, counted.messages)
    assert sum(closed.seconds.values()) == pytest.approx(closed.time_s, rel=0.02)


def test_the_closed_form_of_unlike_segments() -> None:
    """Half of the vector costs nothing to compute: not within 1 %, but near."""
    for seed in range(10):
        described = random_cluster(random.Random(seed), 100, alike=True)
        codec = Composite([(500_000, QSGD()), (500_000, IdentityCodec())])
        counted, closed = (how(described, codec, 1_000_000) for how in (dry.all_reduce, dry.closed_form))
        assert closed.time_s == pytest.approx(counted.time_s, rel=0.15)


def test_the_closed_form_says_where_it_does_not_hold() -> None:
    for more in (
        {"shared_cores": 2},
        {"link": {"burst_bytes": 1000}},
        {"override": {"node": {"1": {"slowdown": 2.0}}}},
    ):
        with pytest.raises(ClusterError, match="all alike"):
            dry.closed_form(cluster(100, **more), IdentityCodec(), 1000)
    with pytest.raises(ClusterError, match="needs 64 `nodes` or more, got 6"):
        dry.closed_form(cluster(6), IdentityCodec(), 1000)


def test_a_thousand_nodes_are_counted_and_a_million_are_not() -> None:
    """100 MB in chunks of 64 KiB: 4 million messages."""
    thousand = dry.all_reduce(cluster(1024), IdentityCodec(), 25_000_000, chunk_bytes=65_536)
    assert (thousand.messages, thousand.closed_form) == (2 * 1023 * 1024 * 2, False)
    million = dry.all_reduce(cluster(1_000_000), IdentityCodec(), 25_000_000, chunk_bytes=65_536)
    assert million.closed_form
    # 100 bytes in each of 2(N-1) steps: 0.1 ms on the link, 1 ms of latency, and half of the time 0.1 ms to add
    assert million.time_s == pytest.approx(2 * 999_999 * 1.15e-3, rel=0.01)


def test_arguments_of_dry_runs() -> None:
    with pytest.raises(ValueError, match="`op` must be 'sum' or 'mean', got 'max'"):
        dry.all_reduce(cluster(), IdentityCodec(), 10, op="max")
    with pytest.raises(ValueError, match="`chunk_bytes` must be a whole number of at least 1, got 0"):
        dry.all_reduce(cluster(), IdentityCodec(), 10, chunk_bytes=0)
    assert dry.all_reduce(cluster(1), IdentityCodec(), 10).time_s == 0
    assert dry.all_reduce(cluster(3), IdentityCodec(), 0).messages == 0
    assert dry.all_reduce(cluster(10_000), IdentityCodec(), 0).messages == 0
    with pytest.raises(ClusterError, match="10000 nodes send 199,980,000 messages, at most 1,000,000 can be counted"):
        dry.all_reduce(cluster(10_000, racks={"size": 10}), IdentityCodec(), 100_000)


MPI_AND_LOCKSTEP = """
    import numpy as np
    from mpi4py import MPI
    from gradiveq.over_ring.qsgd import QSGD
    from ring import lockstep
    from ring.abort import end_together
    from ring.cluster import parse
    from ring.codec import IdentityCodec
    from ring.mpi import MPIRing
    from ring.timeline import Timeline
    from ring.virtual import VirtualRing

    end_together()
    rates = {"add": 1e9, "copy": 1e9, "scale": 1e9} | {f"qsgd.{k}": 1e8 for k in ("encode", "recode", "decode")}
    described = parse({"nodes": 3, "link": {"latency_us": 30, "jitter_us": 5}, "rates": rates}, "x")

    def work(inner):
        ring = VirtualRing(inner, described, processor_time=lambda: 0.0)
        timeline = Timeline(virtual=Timeline(ring.clock, keep=True))
        found = []
        for length in (0, 1, 1001, 300_000):
            for codec in (IdentityCodec(), QSGD()):
                for vector in (np.empty(length, np.float32), ring.empty(length)):
                    vector[:] = np.random.default_rng([ring.rank, length]).standard_normal(length)
                    plain = vector.copy()
                    stats = ring.all_reduce(vector, codec, timeline=timeline, op="mean")
                    inner.all_reduce(plain, codec, op="mean")
                    assert plain.tobytes() == vector.tobytes()
                    found.append((stats, vector.tobytes(), ring.clock()))
        return found, timeline.virtual.totals(), timeline.virtual.spans, timeline.virtual.sent

    comm = MPI.COMM_WORLD
    mine = work(MPIRing(timeout_s=30))
    theirs = comm.scatter(lockstep.run(3, work) if comm.rank == 0 else None)
    assert mine == theirs
    assert mine[0][-1][2] > 0
    assert comm.allreduce(1) == 3
"""


def test_mpi_gives_the_bits_and_the_clocks_of_lockstep(mpirun: Launch) -> None:
    done = mpirun(3, MPI_AND_LOCKSTEP)
    assert done.returncode == 0, done.stderr
