"""Traces: by hand where every second is known, and of real runs."""

from __future__ import annotations

import copy
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ring import Codec, IdentityCodec, Timeline, perfetto
from ring.cluster import Cluster, Link, Node
from ring.lockstep import LockstepRing, run
from ring.trace import (
    CriticalPath,
    RunTrace,
    TraceError,
    communication,
    critical_path,
    format_s,
    keeping,
    records,
    utilisation,
)
from ring.virtual import VirtualRing
from tests.support.toy_codecs import HalfPerHop, PairSums

BYTES = 100


def worker(spans: list[tuple[Any, ...]], sent: list[tuple[Any, ...]] = (), received: list[tuple[Any, ...]] = ()):
    """Of one collective: spans (kind, start, end, step[, chunk]), sent (step, posted, departed, left[, chunk]),
    received (step, arrived[, chunk])."""
    return {
        "spans": [
            [kind, start, end, 1, step, None if step is None else 0, None if step is None else (chunk or [0])[0]]
            for kind, start, end, step, *chunk in spans
        ],
        "sent": [[1, step, 0, (chunk or [0])[0], BYTES, *times] for step, *times, chunk in map(split, sent)],
        "received": [[1, step, (chunk or [0])[0], arrived] for step, arrived, *chunk in received],
    }


def split(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*row[:4], list(row[4:]))


def one_message(clock: str = "virtual") -> RunTrace:
    """Rank 0 encodes for 1 s and sends; 2 s on the link, 0.5 s latency; rank 1 waits for it from 0.5 s on and adds."""
    times = (1.0, 1.0, 3.0) if clock == "virtual" else (1.0, 1.0, 1.0)
    return RunTrace(
        clock,
        [
            worker([("encode", 0.0, 1.0, 0), ("update", 1.0, 2.25, None)], sent=[(0, *times)]),
            worker([("encode", 0.0, 0.5, 0), ("wait", 0.5, 3.5, 1), ("add", 3.5, 4.0, 1)], received=[(1, 3.5)]),
        ],
    )


def parts(path) -> list[tuple[Any, ...]]:
    return [tuple(part) for part in path.parts]


# --- by hand ---------------------------------------------------------------------------------------------------------


def test_a_message_is_joined_from_both_ends():
    (message,), none = one_message().transfers
    assert message == (0, 1, 0, 0, 0, BYTES, 1.0, 1.0, 3.0, 3.5)
    assert none == []


def test_the_path_goes_back_over_the_message_to_what_its_sender_did():
    path = critical_path(one_message())
    assert parts(path) == [
        ("rank", 0, "encode", 0.0, 1.0),
        ("link", 0, "transfer", 1.0, 3.0),
        ("link", 0, "latency", 3.0, 3.5),
        ("rank", 1, "add", 3.5, 4.0),
    ]
    assert path.seconds == 4.0
    assert path.totals("link") == [{"transfer": 2.0, "latency": 0.5}, {}]
    assert path.totals("rank") == [{"encode": 1.0}, {"add": 0.5}]
    assert path.describe() == (
        "Of 4.000 s, rank 0's link to rank 1 holds 62% of the time (transfer 50%, latency 12%); the 2 ranks hold 38% "
        "of the time (encode 25%, add 12%), shared alike: 12% to 25% each, rank 0 most."
    )


def test_a_span_of_time_is_cut_out_of_the_path():
    path = critical_path(one_message(), 0.75, 3.25)
    assert parts(path) == [
        ("rank", 0, "encode", 0.75, 1.0),
        ("link", 0, "transfer", 1.0, 3.0),
        ("link", 0, "latency", 3.0, 3.25),
    ]


def test_exposed_is_waiting_and_hidden_is_computing_while_a_message_is_on_its_way():
    sender, receiver = communication(one_message())
    assert sender == (0.0, 1.25)  # "update" goes on while the message leaves
    assert receiver == (3.0, 0.0)
    assert communication(one_message(), 1.5, 2.0) == [(0.0, 0.5), (0.5, 0.0)]


def test_utilisation_counts_time_on_the_link():
    assert utilisation(one_message()) == [0.5, 0.0]
    assert utilisation(one_message(), 2.0, 4.0) == [0.5, 0.0]


def test_by_the_wall_clock_the_link_holds_all_from_posting_to_finding():
    trace = one_message("wall")
    assert parts(critical_path(trace)) == [
        ("rank", 0, "encode", 0.0, 1.0),
        ("link", 0, "on its way", 1.0, 3.5),
        ("rank", 1, "add", 3.5, 4.0),
    ]
    assert utilisation(trace) is None
    assert communication(trace) == [(0.0, 1.25), (3.0, 0.0)]


def test_a_message_found_without_waiting_is_not_on_the_path():
    """With overlap: what arrives while the receiver computes costs nothing."""
    trace = RunTrace(
        "virtual",
        [
            worker([("encode", 0.0, 1.0, 0)], sent=[(0, 1.0, 1.0, 3.0)]),
            worker([("encode", 0.0, 4.0, 1), ("add", 4.0, 5.0, 1)], received=[(1, 3.5)]),
        ],
    )
    assert parts(critical_path(trace)) == [("rank", 1, "encode", 0.0, 4.0), ("rank", 1, "add", 4.0, 5.0)]
    assert communication(trace)[1] == (0.0, 2.5)


def test_queueing_counts_for_the_link_and_the_path_goes_on_from_posting():
    """Two chunks of 2 s each are posted at 1 s and 1.5 s: the second leaves only when the first has."""
    trace = RunTrace(
        "virtual",
        [
            worker(
                [("encode", 0.0, 1.0, 0, 0), ("encode", 1.0, 1.5, 0, 7)],
                sent=[(0, 1.0, 1.0, 3.0, 0), (0, 1.5, 3.0, 5.0, 7)],
            ),
            worker([("wait", 0.0, 3.0, 1, 0), ("wait", 3.0, 5.0, 1, 7)], received=[(1, 3.0, 0), (1, 5.0, 7)]),
        ],
    )
    assert parts(critical_path(trace)) == [
        ("rank", 0, "encode", 0.0, 1.0),
        ("rank", 0, "encode", 1.0, 1.5),
        ("link", 0, "queue", 1.5, 3.0),
        ("link", 0, "transfer", 3.0, 5.0),
    ]
    assert utilisation(trace)[0] == 0.8


def test_waiting_until_a_message_has_left_goes_back_to_posting_it():
    trace = RunTrace(
        "virtual",
        [
            worker(
                [("encode", 0.0, 1.0, 0), ("decode", 1.0, 1.5, 1), ("wait", 1.5, 3.0, 0), ("add", 3.0, 3.5, 1)],
                sent=[(0, 1.0, 1.0, 3.0)],
            ),
            worker([("add", 3.0, 3.25, 1)], received=[(1, 3.0)]),
        ],
    )
    assert parts(critical_path(trace)) == [
        ("rank", 0, "encode", 0.0, 1.0),
        ("link", 0, "transfer", 1.0, 3.0),
        ("rank", 0, "add", 3.0, 3.5),
    ]


def test_by_the_wall_clock_a_wait_to_send_is_the_links_until_the_message_was_found():
    trace = RunTrace(
        "wall",
        [
            worker(
                [("encode", 0.0, 1.0, 0), ("add", 1.0, 2.0, 1), ("wait", 2.0, 5.0, 0)],
                sent=[(0, 1.0, 1.0, 1.0)],
                received=[(1, 1.0)],
            ),
            worker([("add", 3.0, 4.0, 1)], sent=[(0, 0.5, 0.5, 0.5)], received=[(1, 3.0)]),
        ],
    )
    assert parts(critical_path(trace)) == [
        ("rank", 0, "encode", 0.0, 1.0),
        ("rank", 0, "add", 1.0, 2.0),
        ("link", 0, "on its way", 2.0, 3.0),
        ("rank", 0, "wait", 3.0, 5.0),
    ]


def test_a_straggler_holds_the_path_though_others_wait():
    """Rank 1 of 3 computes for 8 s, then it takes a second to each next rank; rank 0 ends last."""
    trace = RunTrace(
        "virtual",
        [
            worker([("encode", 0.0, 1.0, 0), ("wait", 1.0, 11.0, 2)], received=[(2, 11.0)]),
            worker([("encode", 0.0, 8.0, 0)], sent=[(0, 8.0, 8.0, 9.0)]),
            worker(
                [("encode", 0.0, 1.0, 0), ("wait", 1.0, 9.0, 1), ("add", 9.0, 10.0, 1)],
                sent=[(1, 10.0, 10.0, 11.0)],
                received=[(1, 9.0)],
            ),
        ],
    )
    path = critical_path(trace)
    assert path.totals("rank") == [{}, {"encode": 8.0}, {"add": 1.0}]
    assert path.totals("link") == [{}, {"transfer": 1.0}, {"transfer": 1.0}]
    assert (
        path.describe()
        == "Of 11.000 s, rank 1 holds 73% of the time (encode); the links hold 18%; the other ranks hold 9%."
    )


def test_time_that_nobody_recorded_and_waits_for_nobody_knows_what_are_the_workers_own():
    trace = RunTrace("virtual", [worker([("encode", 0.0, 1.0, 0), ("wait", 2.0, 3.0, 5), ("add", 3.5, 4.0, 5)])])
    assert parts(critical_path(trace)) == [
        ("rank", 0, "encode", 0.0, 1.0),
        ("rank", 0, "other", 1.0, 2.0),
        ("rank", 0, "wait", 2.0, 3.0),
        ("rank", 0, "other", 3.0, 3.5),
        ("rank", 0, "add", 3.5, 4.0),
    ]
    assert critical_path(trace).describe() == (
        "Of 4.000 s, rank 0 holds 100% of the time (other 38%, encode 25%, wait 25%, add 12%)."
    )


@pytest.mark.parametrize(("posted_s", "sent_s"), [(5.0625, 5.0625), (6.0, 5.0)])
def test_over_mpi_a_late_rank_is_found_behind_the_wait_for_its_greeting(posted_s: float, sent_s: float):
    """Rank 0 is 5 s late. Its greeting leaves with its first message, or if that comes later, when it began."""
    trace = RunTrace(
        "wall",
        [
            worker(
                [("forward", 0.0, 5.0, None), ("encode", 5.0, posted_s, 0)], sent=[(0, posted_s, posted_s, posted_s)]
            ),
            worker(
                [("encode", 0.0, 1.0, 0), ("wait", 1.0, 5.25, 0), ("encode", 5.25, 7.5, 1), ("add", 7.5, 8.0, 1)],
                sent=[(0, 1.0, 1.0, 1.0)],
                received=[(1, 7.5)],
            ),
        ],
    )
    path = critical_path(trace)
    assert path.totals("link") == [{"on its way": 5.25 - sent_s}, {}]
    late = {"forward": 5.0} | ({"encode": sent_s - 5.0} if sent_s > 5.0 else {})
    assert path.totals("rank") == [late, {"encode": 2.25, "add": 0.5}]


def test_ranks_that_wait_for_each_others_greetings_end():
    spans = [("wait", 0.0, 2.0, 0), ("add", 2.0, 3.0, 0)]
    path = critical_path(RunTrace("wall", [worker(spans), worker(spans)]))
    assert path.seconds == 3.0
    assert sum(part.end_s - part.start_s for part in path.parts) == 3.0


def test_contradictions_are_refused():
    with pytest.raises(TraceError, match=r"rank 0: .*kind='add'.* begins before .*kind='encode'.* has ended"):
        RunTrace("virtual", [worker([("encode", 0.0, 1.0, 0), ("add", 0.5, 2.0, 0)])])
    with pytest.raises(TraceError, match="not in order; do the ranks' clocks differ"):
        RunTrace("wall", [worker([], sent=[(0, 2.0, 2.0, 2.0)]), worker([], received=[(1, 1.0)])])
    with pytest.raises(TraceError, match="`clock` must be 'wall' or 'virtual', got 'cpu'"):
        RunTrace("cpu", [])
    with pytest.raises(TraceError, match="nothing was recorded of collective number 2"):
        one_message().span(2)


def test_times_count_from_the_first_record_and_survive_json():
    shifted = RunTrace(
        "virtual",
        [worker([("encode", 1e5 + 0.25, 1e5 + 1.0, 0)]), worker([("encode", 1e5, 1e5 + 0.5, 0)])],
        {"seed": 3},
    )
    assert [activities[0].start_s for activities in shifted.activities] == [0.25, 0.0]
    for trace in (shifted, one_message(), one_message("wall")):
        again = RunTrace.from_json(json.loads(json.dumps(trace.as_json())))
        assert again.activities == trace.activities
        assert again.transfers == trace.transfers
        assert (again.clock, again.about) == (trace.clock, trace.about)
        assert again.as_json() == trace.as_json()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.3456, "12.346 s"), (0.0123, "12.3 ms"), (0.9, "900 ms"), (4.2e-5, "42.0 µs"), (0.0, "0.0 µs")],
)
def test_seconds_in_words(seconds: float, text: str):
    assert format_s(seconds) == text


# --- real runs -------------------------------------------------------------------------------------------------------

RATES = {"add": 1e9, "copy": 1e9, "scale": 1e9, "pairsums.encode": 2e8, "pairsums.decode": 2e8} | {
    f"halfperhop.{kind}": 2e8 for kind in ("encode", "recode", "decode")
}


def cluster(size: int, **changes: Any) -> Cluster:
    link = Link(latency_us=20, bandwidth_gbps=1)
    return Cluster(nodes=size, link=link, rates=RATES).with_nodes(size, **changes)


def virtual_run(
    described: Cluster, codec: Codec, length: int = 30_000, calls: int = 1, chunk_bytes: int = 4096
) -> RunTrace:
    def work(ring: LockstepRing) -> dict[str, Any]:
        virtual = VirtualRing(ring, described, processor_time=lambda: 0.0)
        timeline = Timeline(virtual=Timeline(virtual.clock))
        vector = (np.arange(length) % 7 + ring.rank).astype(np.float32)
        virtual.all_reduce(vector, codec, timeline=timeline, chunk_bytes=chunk_bytes)
        with keeping(timeline):
            for _ in range(calls):
                with timeline.span("backward"), virtual.taking(1e-3):
                    pass
                virtual.all_reduce(vector, codec, timeline=timeline, chunk_bytes=chunk_bytes)
        assert not timeline.keep
        return records(timeline.virtual)

    return RunTrace("virtual", run(described.nodes, work))


def assert_without_gaps(trace: RunTrace) -> None:
    path = critical_path(trace)
    start_s, end_s = trace.span()
    assert path.parts[0].start_s == start_s
    assert path.parts[-1].end_s == end_s
    for before, after in zip(path.parts, path.parts[1:], strict=False):
        assert before.end_s == after.start_s
    held = [sum(kinds.values()) for kinds in path.totals("rank") + path.totals("link")]
    assert sum(held) == pytest.approx(end_s - start_s, rel=1e-9)


CODECS = [IdentityCodec(), PairSums(), HalfPerHop()]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: type(codec).__name__)
@pytest.mark.parametrize("size", [2, 3, 6])
def test_of_real_runs_all_messages_are_joined_and_the_path_has_no_gaps(size: int, codec: Codec):
    trace = virtual_run(cluster(size), codec, calls=2)
    sent = [len(transfers) for transfers in trace.transfers]
    assert min(sent) == max(sent) > 2 * 2 * (size - 1)
    assert_without_gaps(trace)
    perfetto.check(perfetto.events(trace))
    for call in (2, 3):
        start_s, end_s = trace.span(call)
        assert critical_path(trace, start_s, end_s).seconds == pytest.approx(end_s - start_s)
        busy = utilisation(trace, start_s, end_s)
        bytes_sent = sum(m.num_bytes for m in trace.transfers[0] if m.call == call)
        assert busy[0] * (end_s - start_s) == pytest.approx(bytes_sent * 8 / 1e9, rel=1e-3)


def test_of_real_runs_waits_end_when_their_message_arrives():
    trace = virtual_run(cluster(3), PairSums())
    arrivals = [{m.arrived_s for m in trace.transfers[rank - 1]} for rank in range(3)]
    waits = [[a.end_s for a in activities if a.kind == "wait"] for activities in trace.activities]
    assert all(waits)
    assert all(end_s in arrivals[rank] for rank in range(3) for end_s in waits[rank])
    assert all(part.kind not in ("wait", "other") for part in critical_path(trace).parts)


def test_alike_links_are_said_to_share_and_a_slow_one_is_named():
    def path_of(described: Cluster) -> CriticalPath:
        trace = virtual_run(described, IdentityCodec(), 300_000, calls=2)
        return critical_path(trace, *trace.span(3))

    alike = path_of(cluster(6)).describe()
    assert "the 6 links hold" in alike
    assert "shared alike: " in alike
    described = cluster(6)
    slow = Cluster(nodes=6, link=described.link, rates=RATES, other_links={3: Link(latency_us=20, bandwidth_gbps=0.1)})
    path = path_of(slow)
    links = [sum(kinds.values()) for kinds in path.totals("link")]
    assert max(range(6), key=links.__getitem__) == 3
    assert links[3] > 0.8 * path.seconds
    assert f"rank 3's link to rank 4 holds {links[3] / path.seconds:.0%} of the time" in path.describe()


def test_a_slow_node_is_named():
    fast = Link(latency_us=1, bandwidth_gbps=400)
    described = Cluster(nodes=4, link=fast, rates=RATES, other_nodes={2: Node(slowdown=20)})
    path = critical_path(virtual_run(described, HalfPerHop()))
    assert sum(path.totals("rank")[2].values()) > 0.8 * path.seconds
    assert "rank 2 holds" in path.describe()


def test_a_faster_link_hides_more_and_a_linear_codec_hides_what_a_per_hop_codec_cant():
    def exposed(codec: Codec, chunk_bytes: int) -> float:
        start_s, end_s = (trace := virtual_run(cluster(4), codec, chunk_bytes=chunk_bytes)).span(2)
        rows = communication(trace, start_s, end_s)
        assert all(row.exposed_s + row.hidden_s <= end_s - start_s for row in rows)
        return sum(row.exposed_s for row in rows)

    assert exposed(PairSums(), 1024) < exposed(PairSums(), 10**9) < exposed(HalfPerHop(), 10**9)


def test_traces_of_lockstep_by_the_wall_clock():
    def work(ring: LockstepRing) -> dict[str, Any]:
        timeline = Timeline(keep=True)
        ring.all_reduce(np.ones(5000, np.float32), PairSums(), timeline=timeline, chunk_bytes=1000)
        return records(timeline)

    trace = RunTrace("wall", run(3, work))
    assert_without_gaps(trace)
    perfetto.check(perfetto.events(trace))


def test_traces_over_mpi(mpirun: Callable[..., Any], tmp_path: Path):
    result = mpirun(
        3,
        """
        import json, pathlib, numpy as np
        from mpi4py import MPI
        from ring import IdentityCodec, Timeline
        from ring.mpi import MPIRing
        from ring.trace import keeping, records
        from tests.support.toy_codecs import HalfPerHop, PairSums

        comm = MPI.COMM_WORLD
        ring = MPIRing(comm)
        timeline = Timeline()
        shared = ring.empty(60_000)
        shared[:] = 1
        with keeping(timeline):
            for codec in (IdentityCodec(), PairSums(), HalfPerHop()):
                ring.all_reduce(np.ones(50_000, np.float32), codec, timeline=timeline, chunk_bytes=20_000)
            ring.all_reduce(shared, timeline=timeline, chunk_bytes=20_000)
        rows = comm.gather(records(timeline))
        if comm.rank == 0:
            pathlib.Path("rows.json").write_text(json.dumps(rows))
        """,
    )
    assert result.returncode == 0, result.stderr
    trace = RunTrace("wall", json.loads((tmp_path / "rows.json").read_text()))
    assert_without_gaps(trace)
    perfetto.check(perfetto.events(trace))
    assert {message.call for message in trace.transfers[0]} == {1, 2, 3, 4}
    waited = sum(a.end_s - a.start_s for activities in trace.activities for a in activities if a.kind == "wait")
    assert sum(row.exposed_s for row in communication(trace)) == pytest.approx(waited, abs=1e-6)


# --- the file for Perfetto -------------------------------------------------------------------------------------------


def test_slices_flows_and_names():
    content = perfetto.events(one_message())
    perfetto.check(content)
    by_phase: dict[str, list[dict[str, Any]]] = {}
    for event in content["traceEvents"]:
        by_phase.setdefault(event["ph"], []).append(event)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in by_phase["M"] if e["name"] == "thread_name"}
    assert sorted(names.values()) == ["computing", "computing", "link to rank 0", "link to rank 1"]
    assert [e["args"]["name"] for e in by_phase["M"] if e["name"] == "process_name"] == ["rank 0", "rank 1"]
    slices = {(names[e["pid"], e["tid"]], e["name"]): (e["ts"], e["dur"]) for e in by_phase["X"] if e["pid"] == 10}
    assert slices == {
        ("computing", "encode"): (0, 1e6),
        ("computing", "update"): (1e6, 1.25e6),
        ("link to rank 1", "step 0, segment 0"): (1e6, 2e6),
    }
    (start,), (end,) = by_phase["s"], by_phase["f"]
    assert (start["pid"], start["tid"], start["ts"]) == (10, 11, 1e6)
    assert (end["pid"], end["tid"], end["ts"]) == (20, 20, 2.25e6)  # within the wait from 0.5 to 3.5 s
    assert start["id"] == end["id"]


def test_by_the_wall_clock_messages_of_a_link_follow_each_other():
    trace = RunTrace(
        "wall",
        [
            worker([("encode", 0.0, 1.0, 0)], sent=[(0, 1.0, 1.0, 1.0, 0), (0, 1.0, 1.0, 1.0, 7)]),
            worker([("wait", 0.0, 2.0, 1, 0), ("wait", 2.5, 3.0, 1, 7)], received=[(1, 2.0, 0), (1, 3.0, 7)]),
        ],
    )
    content = perfetto.events(trace)
    perfetto.check(content)
    link = [(e["ts"], e["dur"]) for e in content["traceEvents"] if e["ph"] == "X" and e["tid"] == 11]
    assert link == [(1e6, 1e6), (2e6, 1e6)]


def flow(content: dict[str, Any], phase: str) -> dict[str, Any]:
    return next(event for event in content["traceEvents"] if event["ph"] == phase)


BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda c: c.pop("traceEvents"), "`traceEvents` must be a list"),
    (lambda c: c["traceEvents"].append(7), "an event must be an object"),
    (lambda c: flow(c, "X").update(ts=float("nan")), "not JSON"),
    (lambda c: flow(c, "X").update(args={"a": np.float32(1)}), "not JSON"),
    (lambda c: flow(c, "X").update(ph="Y"), "`ph` must be one of X, s, f, M"),
    (lambda c: flow(c, "X").pop("dur"), "`dur` is missing"),
    (lambda c: flow(c, "f").pop("id"), "`id` is missing"),
    (lambda c: flow(c, "X").update(dur=-1.0), "`dur` must be a number that is not negative"),
    (lambda c: flow(c, "X").update(ts="0"), "`ts` must be a number"),
    (lambda c: flow(c, "X").update(name=None), "`name` must be text"),
    (lambda c: flow(c, "X").update(pid=1.5), "`pid` must be a whole number"),
    (lambda c: flow(c, "f").update(bp="x"), "`bp` must be 'e'"),
    (lambda c: flow(c, "M").update(args={}), "unknown metadata"),
    (lambda c: flow(c, "X").update(tid=20), "thread 20 is in two processes"),
    (lambda c: c["traceEvents"].append(dict(flow(c, "M"))), "named twice"),
    (lambda c: c["traceEvents"].remove(flow(c, "M")), "has no name, or its process has none"),
    (lambda c: c["traceEvents"].append({**flow(c, "X"), "ts": 5e5, "dur": 1e6}), "overlap at 500000.0 us"),
    (lambda c: c["traceEvents"].append(dict(flow(c, "s"))), "two events of one kind"),
    (lambda c: c["traceEvents"].remove(flow(c, "f")), "doesn't both start and end"),
    (lambda c: flow(c, "f").update(id=99), "doesn't both start and end"),
    (lambda c: flow(c, "f").update(ts=0.6e6), "ends before it starts"),
    (lambda c: flow(c, "f").update(ts=4e6), "no slice to bind to"),
    (lambda c: flow(c, "s").update(ts=0.0), "no slice to bind to"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN, ids=[message for _, message in BROKEN])
def test_files_that_break_the_formats_rules_are_found(damage: Callable[[dict[str, Any]], Any], message: str):
    content = copy.deepcopy(perfetto.events(one_message()))
    damage(content)
    with pytest.raises(TraceError, match=message):
        perfetto.check(content)


def test_nested_slices_are_allowed():
    content = perfetto.events(one_message())
    content["traceEvents"].append({**flow(content, "X"), "ts": 0.25e6, "dur": 0.5e6})
    perfetto.check(content)


def test_files_are_written_plain_or_compressed(tmp_path: Path):
    content = perfetto.events(one_message())
    perfetto.write(tmp_path / "a.json", content)
    perfetto.write(tmp_path / "a.json.gz", content)
    assert json.loads((tmp_path / "a.json").read_text()) == content
    assert json.loads(gzip.decompress((tmp_path / "a.json.gz").read_bytes())) == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.json.gz"]
