"""The trace of a run: what happened, from the kept timelines of all its workers, whatever their clock.

    with trace.keeping(timeline):                      # on every worker: spans and messages are kept in here
        ring.all_reduce(vector, codec, timeline=timeline)
    rows = trace.records(timeline)                     # JSON types: gather them, from MPI's ranks or lockstep's threads
    run = RunTrace("wall", [rows of every rank])       # or RunTrace("virtual", …) of every `timeline.virtual`
    print(critical_path(run).describe())

By an emulated cluster's clock everything is known exactly. By this machine's, a message is known to be on its way from
when it was posted until the receiver found it, which is not before the receiver looked; when it was on the link, and
how much of that was latency, is not. Nothing here guesses: what needs to know more says so.

The ranks' clocks must agree, as those of processes on one machine do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

from ring.algorithm import ChunkWork
from ring.timeline import Timeline

Clock = Literal["wall", "virtual"]
#: Decimals of a second to which times are kept.
DECIMALS = 9
#: Links (or workers) share alike if none holds more than so many times the mean of all, and none less than half of it.
ALIKE = 1.6
#: Least share of the critical path that is named on its own when the path is put in words, and the most such shares.
LEAST_SHARE, MOST_NAMED = 0.1, 3


class TraceError(ValueError):
    """A record that contradicts itself, or lacks what is asked for."""


class Activity(NamedTuple):
    """A span of a worker, and within a collective what it was for; `chunk` is the chunk's first element."""

    kind: str
    start_s: float
    end_s: float
    call: int
    step: int | None
    segment: int | None
    chunk: int | None


class Transfer(NamedTuple):
    """A message from `sender` to its successor. `step` is the sender's; the receiver needs it for the next one.

    posted: the sender was done with it. departed: the link began with it. left: the link was done with it.
    arrived: the receiver could use it. By the wall clock departed = left = posted, and arrived is when it was found.
    """

    sender: int
    call: int
    step: int
    segment: int
    chunk: int
    num_bytes: int
    posted_s: float
    departed_s: float
    left_s: float
    arrived_s: float


@contextmanager
def keeping(timeline: Timeline) -> Iterator[None]:
    """Keep single spans and messages in the body, in the timeline and its virtual one; forget earlier ones."""
    timelines = [timeline] if timeline.virtual is None else [timeline, timeline.virtual]
    before = [one.keep for one in timelines]
    for one in timelines:
        one.keep = True
        one.spans, one.sent, one.received = [], [], []
    try:
        yield
    finally:
        for one, keep in zip(timelines, before, strict=True):
            one.keep = keep


def records(timeline: Timeline) -> dict[str, Any]:
    """Records of a worker's timeline in JSON's types: one of `RunTrace`'s `workers`."""

    def place(work: ChunkWork | None) -> list[int | None]:
        return [None, None, None] if work is None else [work.step, work.segment, work.chunk.start]

    return {
        "spans": [
            [span.kind, float(span.start_s), float(span.end_s), span.call, *place(span.work)] for span in timeline.spans
        ],
        "sent": [
            [sent.call, *place(sent.work), sent.work.chunk.num_bytes, *map(float, sent[2:])] for sent in timeline.sent
        ],
        "received": [
            [received.call, received.work.step, received.work.chunk.start, float(received.arrived_s)]
            for received in timeline.received
        ],
    }


class RunTrace:
    """All workers' timelines on one axis of time, which begins with the first thing that was recorded.

    Args:
        clock: "wall", or "virtual" for an emulated cluster's.
        workers: the `records` of each rank; they may cover several calls or iterations.
        about: anything else to remember, in JSON's types.

    Attributes:
        activities: activities of each rank, by time; they don't overlap.
        transfers: messages of each rank as their sender, in that order. A message of which one end was not recorded is
            left out.
        exact: whether it is known when a message was on its link, which the wall clock can't tell.

    Raises:
        TraceError: activities of one rank overlap, or a message was there before it was sent.
    """

    def __init__(
        self, clock: Clock, workers: Sequence[Mapping[str, Any]], about: Mapping[str, Any] | None = None
    ) -> None:
        if clock not in get_args(Clock):
            raise TraceError(f"`clock` must be {' or '.join(map(repr, get_args(Clock)))}, got {clock!r}")
        self.clock, self.about = clock, dict(about or {})
        starts = [row[1] for worker in workers for row in worker["spans"]]
        starts += [row[5] for worker in workers for row in worker["sent"]]
        self._origin_s = min(starts, default=0.0)
        self.activities = [self._read_activities(rank, worker["spans"]) for rank, worker in enumerate(workers)]
        self.transfers = [
            self._join(rank, worker["sent"], workers[(rank + 1) % len(workers)]["received"])
            for rank, worker in enumerate(workers)
        ]

    @property
    def size(self) -> int:
        return len(self.activities)

    @property
    def exact(self) -> bool:
        return self.clock == "virtual"

    def _since(self, time_s: float) -> float:
        return round(time_s - self._origin_s, DECIMALS)

    def _read_activities(self, rank: int, rows: Sequence[Sequence[Any]]) -> list[Activity]:
        activities = sorted(
            (Activity(kind, self._since(start_s), self._since(end_s), *rest) for kind, start_s, end_s, *rest in rows),
            key=lambda activity: (activity.start_s, activity.end_s),
        )
        for before, after in pairwise(activities):
            if after.start_s < before.end_s:
                raise TraceError(f"rank {rank}: {after} begins before {before} has ended")
        return activities

    def _join(self, rank: int, sent: Sequence[Sequence[Any]], received: Sequence[Sequence[Any]]) -> list[Transfer]:
        arrivals = {(call, step, chunk): self._since(arrived_s) for call, step, chunk, arrived_s in received}
        transfers = []
        for call, step, segment, chunk, num_bytes, *times_s in sent:
            arrived_s = arrivals.get((call, step + 1, chunk))
            if arrived_s is not None:
                posted_s, departed_s, left_s = map(self._since, times_s)
                transfer = Transfer(
                    rank, call, step, segment, chunk, num_bytes, posted_s, departed_s, left_s, arrived_s
                )
                if not posted_s <= departed_s <= left_s <= arrived_s:
                    raise TraceError(f"the times of {transfer} are not in order; do the ranks' clocks differ?")
                transfers.append(transfer)
        return transfers

    def span(self, call: int | None = None) -> tuple[float, float]:
        """First and last moment that was recorded, of one collective or of everything.

        Raises:
            TraceError: nothing was recorded.
        """
        times = [
            time_s
            for activities in self.activities
            for activity in activities
            if call is None or (activity.call == call and activity.step is not None)
            for time_s in (activity.start_s, activity.end_s)
        ]
        times += [
            time_s
            for transfers in self.transfers
            for transfer in transfers
            if call is None or transfer.call == call
            for time_s in (transfer.posted_s, transfer.arrived_s)
        ]
        if not times:
            raise TraceError("nothing was recorded" + ("" if call is None else f" of collective number {call}"))
        return min(times), max(times)

    def as_json(self) -> dict[str, Any]:
        """The trace in JSON's types, for `from_json`; times count from the trace's beginning."""
        return {
            "clock": self.clock,
            "about": self.about,
            "workers": [
                {
                    "spans": [list(activity) for activity in activities],
                    "sent": [list(transfer[1:-1]) for transfer in transfers],
                    "received": [[m.call, m.step + 1, m.chunk, m.arrived_s] for m in self.transfers[rank - 1]],
                }
                for rank, (activities, transfers) in enumerate(zip(self.activities, self.transfers, strict=True))
            ],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> RunTrace:
        return cls(value["clock"], value["workers"], value["about"])


# --- exposed and hidden ----------------------------------------------------------------------------------------------

Interval = tuple[float, float]


class Communication(NamedTuple):
    """Communication of one worker, in seconds.

    exposed: time in which it waited.
    hidden: time in which it computed while a message from or to it was on its way, that is from `departed_s` to
        `arrived_s`; by the wall clock an upper bound, because messages are found late.
    """

    exposed_s: float
    hidden_s: float


def communication(trace: RunTrace, start_s: float | None = None, end_s: float | None = None) -> list[Communication]:
    """Communication of each worker, between two times (by default, the trace's first and last)."""
    start_s, end_s = _bounds(trace, start_s, end_s)
    result = []
    for rank, activities in enumerate(trace.activities):
        waiting = _union([(a.start_s, a.end_s) for a in activities if a.kind == "wait"], start_s, end_s)
        computing = _union([(a.start_s, a.end_s) for a in activities if a.kind != "wait"], start_s, end_s)
        messages = trace.transfers[rank] + trace.transfers[rank - 1]
        on_their_way = _union([(m.departed_s, m.arrived_s) for m in messages], start_s, end_s)
        exposed_s = sum(end - start for start, end in waiting)
        result.append(Communication(exposed_s, _overlap_s(on_their_way, computing)))
    return result


def utilisation(trace: RunTrace, start_s: float | None = None, end_s: float | None = None) -> list[float] | None:
    """Share of the time in which a message was on each link (by its sender); None by the wall clock."""
    if not trace.exact:
        return None
    start_s, end_s = _bounds(trace, start_s, end_s)
    busy = [_union([(m.departed_s, m.left_s) for m in sent], start_s, end_s) for sent in trace.transfers]
    return [sum(end - start for start, end in parts) / (end_s - start_s) if end_s > start_s else 0.0 for parts in busy]


def _bounds(trace: RunTrace, start_s: float | None, end_s: float | None) -> Interval:
    first_s, last_s = trace.span()
    return first_s if start_s is None else start_s, last_s if end_s is None else end_s


def _union(intervals: Sequence[Interval], start_s: float, end_s: float) -> list[Interval]:
    """Union of intervals between two times: disjoint, in order."""
    union: list[Interval] = []
    for start, end in sorted(intervals):
        start, end = max(start, start_s), min(end, end_s)
        if start >= end:
            continue
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _overlap_s(ones: Sequence[Interval], others: Sequence[Interval]) -> float:
    """Seconds that two unions have in common."""
    total_s, i, j = 0.0, 0, 0
    while i < len(ones) and j < len(others):
        total_s += max(0.0, min(ones[i][1], others[j][1]) - max(ones[i][0], others[j][0]))
        if ones[i][1] < others[j][1]:
            i += 1
        else:
            j += 1
    return total_s


# --- the critical path -----------------------------------------------------------------------------------------------


class PathPart(NamedTuple):
    """A part of the critical path, held by a worker or by a link.

    on: "rank" if the worker holds it, "link" if the link from it to its successor does.
    kind: on a worker, what it did, or "other" if that was not recorded, or "wait" if it is not known for what it
        waited. On a link, "transfer" while the message is on it; "queue" while others are, or the port isn't free;
        "latency" from when it has left until it is there, with what jitter and the uplinks of racks add; by the wall
        clock, which can't tell these, "on its way".
    """

    on: Literal["rank", "link"]
    rank: int
    kind: str
    start_s: float
    end_s: float


class _Claim(NamedTuple):
    """The share of the critical path that one or all of the links or workers hold, in seconds and in words."""

    on: str
    seconds: float
    text: str


class CriticalPath(NamedTuple):
    """The critical path: what the end of a span of time depended on, back to its start without a gap.

    Attributes:
        parts: parts of the path, by time.
        size: number of workers.
    """

    parts: Sequence[PathPart]
    size: int

    @property
    def seconds(self) -> float:
        return self.parts[-1].end_s - self.parts[0].start_s if self.parts else 0.0

    def totals(self, on: Literal["rank", "link"]) -> list[dict[str, float]]:
        """Seconds by kind of each worker or link. Those of all workers and links add up to `seconds`."""
        totals: list[dict[str, float]] = [defaultdict(float) for _ in range(self.size)]
        for part in self.parts:
            if part.on == on:
                totals[part.rank][part.kind] += part.end_s - part.start_s
        return [dict(kinds) for kinds in totals]

    def describe(self) -> str:
        """A sentence that says where the time is: shares of the whole, largest first."""
        if not self.seconds:
            return "The critical path has no length."
        claims = sorted((*self._claims("link"), *self._claims("rank")), key=lambda claim: -claim.seconds)
        named = [claim for claim in claims if claim.seconds >= LEAST_SHARE * self.seconds][:MOST_NAMED] or claims[:1]
        texts = [claim.text for claim in named]
        for on in ("link", "rank"):
            rest_s = sum(claim.seconds for claim in claims if claim.on == on and claim not in named)
            if round(100 * rest_s / self.seconds):
                other = "other " if any(claim.on == on for claim in named) else ""
                texts.append(f"the {other}{on}s hold {rest_s / self.seconds:.0%}")
        return f"Of {format_s(self.seconds)}, {'; '.join(texts)}."

    def _claims(self, on: Literal["rank", "link"]) -> list[_Claim]:
        """Claims of each link or worker by itself, or of all together if they share alike."""
        totals = self.totals(on)
        sums = [sum(kinds.values()) for kinds in totals]
        whole, largest = sum(sums), max(range(self.size), key=sums.__getitem__)
        mean = whole / self.size
        if self.size > 1 and min(sums) >= mean / 2 > 0 and sums[largest] <= ALIKE * mean:
            together: dict[str, float] = defaultdict(float)
            for kinds in totals:
                for kind, value in kinds.items():
                    together[kind] += value
            low, high = (f"{value / self.seconds:.0%}" for value in (min(sums), max(sums)))
            each = f"{high} each" if low == high else f"{low} to {high} each, {self._name(on, largest)} most"
            return [_Claim(on, whole, f"the {self.size} {on}s hold {self._share(together)}, shared alike: {each}")]
        return [
            _Claim(on, value, f"{self._name(on, rank)} holds {self._share(kinds)}")
            for rank, (value, kinds) in enumerate(zip(sums, totals, strict=True))
            if value
        ]

    def _name(self, on: str, rank: int) -> str:
        return f"rank {rank}" if on == "rank" else f"rank {rank}'s link to rank {(rank + 1) % self.size}"

    def _share(self, kinds: Mapping[str, float]) -> str:
        """Words for a share, such as "71% of the time (transfer 60%, queue 11%)"."""
        ordered = sorted(kinds.items(), key=lambda item: -item[1])
        shown = [f"{kind} {value / self.seconds:.0%}" for kind, value in ordered if value >= 0.005 * self.seconds]
        detail = f" ({ordered[0][0]})" if len(shown) < 2 else f" ({', '.join(shown)})"
        return f"{sum(kinds.values()) / self.seconds:.0%} of the time{detail}"


def format_s(seconds: float) -> str:
    """Text of a time with a fitting unit, such as "12.3 ms"."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if abs(seconds) * scale >= 1 or unit == "µs":
            return f"{seconds * scale:,.{0 if abs(seconds) * scale >= 100 else 3 if unit == 's' else 1}f} {unit}"
    raise AssertionError


def critical_path(trace: RunTrace, start_s: float | None = None, end_s: float | None = None) -> CriticalPath:
    """Find what the end of a span of time depended on (by default, of all that was recorded).

    It is found from the end, beginning with the worker that ends last. Whatever a worker computes depends on what it
    did before. A wait depends on the message: the path goes back over its latency, its time on the link and its
    queueing to when it was posted, and on with what the sender did before. Queueing counts for the link: what is ahead
    of a message there is why it is late. A wait until a message has left goes back to when the worker posted it.

    By the wall clock, the whole way of a message from its being posted counts for its link, even where the receiver was
    slow to notice it; a wait until a message has left is the link's until it was found, then the worker's own; a wait
    for the greeting that begins a collective depends on when the predecessor began it.

    Cost: a search in the worker's activities for each part.
    """
    start_s, end_s = _bounds(trace, start_s, end_s)
    size = trace.size
    starts = [[activity.start_s for activity in activities] for activities in trace.activities]
    waits = _Waits(trace)

    def before(rank: int, time_s: float) -> Activity | None:
        """The rank's last activity that began before."""
        index = bisect_left(starts[rank], time_s) - 1
        return trace.activities[rank][index] if index >= 0 else None

    parts: list[PathPart] = []
    now_s = end_s

    def go_back(on: Literal["rank", "link"], rank: int, kind: str, to_s: float) -> None:
        nonlocal now_s
        to_s = max(to_s, start_s)
        if to_s < now_s:
            parts.append(PathPart(on, rank, kind, to_s, now_s))
            now_s = to_s

    def last_end_s(rank: int) -> float:
        activity = before(rank, end_s)
        return start_s if activity is None else min(activity.end_s, end_s)

    rank = max(range(size), key=last_end_s)
    hops = 0  # from worker to worker without getting further back; more than there are workers would be a circle
    while now_s > start_s:
        activity, came_s = before(rank, now_s), now_s
        if activity is None or activity.end_s < now_s:
            go_back("rank", rank, "other", start_s if activity is None else activity.end_s)
        elif activity.kind != "wait":
            go_back("rank", rank, activity.kind, activity.start_s)
        elif hops <= size and (message := waits.arriving(rank, activity)):
            if trace.exact:
                go_back("link", message.sender, "latency", message.left_s)
                go_back("link", message.sender, "transfer", message.departed_s)
                go_back("link", message.sender, "queue", message.posted_s)
            else:
                go_back("link", message.sender, "on its way", message.posted_s)
            rank = message.sender
        elif message := waits.leaving(rank, activity):
            if trace.exact:
                go_back("link", rank, "transfer", message.departed_s)
                go_back("link", rank, "queue", message.posted_s)
            else:
                go_back("rank", rank, "wait", max(message.arrived_s, activity.start_s))
                go_back("link", rank, "on its way", activity.start_s)
        elif hops <= size and (began_s := waits.greeting(rank, activity, now_s)) is not None:
            rank = (rank - 1) % size
            go_back("link", rank, "on its way", began_s)
        else:
            go_back("rank", rank, "wait", activity.start_s)
        hops = 0 if now_s < came_s else hops + 1
    return CriticalPath(parts[::-1], size)


class _Waits:
    """Causes of the workers' waits."""

    def __init__(self, trace: RunTrace) -> None:
        self._trace, self._exact = trace, trace.exact
        self._sent = [{(m.call, m.step, m.chunk): m for m in sent} for sent in trace.transfers]
        self._first_step: dict[int, int] = {}
        self._first_arrived: list[dict[int, float]] = [{} for _ in trace.transfers]
        self._began: list[dict[int, list[float]]] = [defaultdict(list) for _ in trace.transfers]
        for rank, activities in enumerate(trace.activities):
            for activity in activities:
                if activity.step is not None:
                    step = self._first_step.setdefault(activity.call, activity.step)
                    self._first_step[activity.call] = min(step, activity.step)
                    if not self._began[rank][activity.call]:
                        self._began[rank][activity.call].append(activity.start_s)
            for message in trace.transfers[rank - 1]:
                self._first_arrived[rank].setdefault(message.call, message.arrived_s)
            for message in reversed(trace.transfers[rank]):
                self._began[rank][message.call][1:] = [message.posted_s]

    def arriving(self, rank: int, wait: Activity) -> Transfer | None:
        """The message from the predecessor, if it was waited for: then it was found when the wait had ended."""
        if wait.step is None or wait.chunk is None:
            return None
        message = self._sent[rank - 1].get((wait.call, wait.step - 1, wait.chunk))
        return message if message is not None and message.arrived_s >= wait.end_s else None

    def leaving(self, rank: int, wait: Activity) -> Transfer | None:
        """The worker's own message, if it was waited for that to have left."""
        if wait.step is None or wait.chunk is None or self._is_greeting(rank, wait):
            return None
        message = self._sent[rank].get((wait.call, wait.step, wait.chunk))
        if message is None or message.posted_s > wait.start_s:
            return None
        return message if not self._exact or message.left_s >= wait.end_s else None

    def greeting(self, rank: int, wait: Activity, now_s: float) -> float | None:
        """Moment at which the predecessor sent its greeting, as far as known: at the latest with its first message."""
        if not self._is_greeting(rank, wait):
            return None
        return max((time_s for time_s in self._began[rank - 1][wait.call] if time_s <= now_s), default=now_s)

    def _is_greeting(self, rank: int, wait: Activity) -> bool:
        """Over MPI a call's first wait is for the predecessor's greeting, and belongs to the call's first work."""
        first_s = self._first_arrived[rank].get(wait.call)
        return (
            not self._exact
            and wait.step == self._first_step.get(wait.call)
            and (first_s is None or wait.end_s <= first_s)
        )
