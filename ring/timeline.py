"""Timelines: where a worker's time went, by this machine's clock or by that of an emulated cluster."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from ring.algorithm import ChunkWork


class TimeSpan(NamedTuple):
    """A time in which a worker did one thing; in a collective, with the call's number and the work that it was for."""

    kind: str
    start_s: float
    end_s: float
    call: int
    work: ChunkWork | None


class SentMessage(NamedTuple):
    """A message to the successor: when it was posted, began to leave, and had left.

    This machine's clock knows the first only, so that there all three are equal.
    """

    call: int
    work: ChunkWork
    posted_s: float
    departed_s: float
    left_s: float


class ReceivedMessage(NamedTuple):
    """A message from the predecessor, and when it had arrived (by this machine's clock: when it was found)."""

    call: int
    work: ChunkWork
    arrived_s: float


def compute_unmeasured(kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
    """Call `function(*args)`, for callers that don't ask where the time went; compare `Timeline.compute`."""
    function(*args)


class Timeline:
    """One worker's seconds by kind of span: forward, backward, encode, add, recode, decode, wait, fit, update, …

    Spans of different kinds don't overlap: "wait" is exposed communication, and what is hidden behind a computation
    costs nothing.

    Args:
        clock: seconds, monotonic.
        keep: keep single spans and messages as well, for `ring.trace`.
        virtual: the same worker's timeline by an emulated cluster's clock; it gets the same spans.

    Attributes:
        spans, sent, received: single spans and messages, in the order in which they ended; empty unless `keep`.
        call: the number of the collective that is running or was last, from 1 on.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        *,
        keep: bool = False,
        virtual: Timeline | None = None,
    ) -> None:
        self.clock, self.keep, self.virtual = clock, keep, virtual
        self.spans: list[TimeSpan] = []
        self.sent: list[SentMessage] = []
        self.received: list[ReceivedMessage] = []
        self.call = 0
        self._totals: dict[str, float] = defaultdict(float)

    def record(self, kind: str, start_s: float, end_s: float, work: ChunkWork | None = None) -> None:
        """Account for a span that the caller has measured by this timeline's clock."""
        self._totals[kind] += end_s - start_s
        if self.keep:
            self.spans.append(TimeSpan(kind, start_s, end_s, self.call, work))

    def compute(self, kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
        """Call `function(*args)` and account for it as `kind`."""
        start_s = self.clock()
        function(*args)
        self.record(kind, start_s, self.clock(), work)

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Measure the body as `kind`, by the virtual clock as well if there is one."""
        start_s = self.clock()
        virtual_s = 0.0 if self.virtual is None else self.virtual.clock()
        try:
            yield
        finally:
            self.record(kind, start_s, self.clock())
            if self.virtual is not None:
                self.virtual.record(kind, virtual_s, self.virtual.clock())

    def begin_call(self) -> None:
        """Begin a collective: its spans have the next number."""
        self.call += 1
        if self.virtual is not None:
            self.virtual.begin_call()

    def mark_sent(self, work: ChunkWork) -> None:
        """Keep that a message to the successor was posted just now."""
        now_s = self.clock()
        self.sent.append(SentMessage(self.call, work, now_s, now_s, now_s))

    def mark_received(self, work: ChunkWork) -> None:
        """Keep that the predecessor's message for `work` was found just now."""
        self.received.append(ReceivedMessage(self.call, work, self.clock()))

    def fork(self) -> Timeline:
        """An empty timeline by the same clocks that goes on counting calls; to be given back to `absorb`."""
        fork = Timeline(self.clock, keep=self.keep, virtual=None if self.virtual is None else self.virtual.fork())
        fork.call = self.call
        return fork

    def absorb(self, fork: Timeline) -> None:
        """Add what another timeline by the same clocks has."""
        for kind, seconds in fork._totals.items():
            self._totals[kind] += seconds
        self.spans += fork.spans
        self.sent += fork.sent
        self.received += fork.received
        self.call = fork.call
        if self.virtual is not None and fork.virtual is not None:
            self.virtual.absorb(fork.virtual)

    def totals(self) -> dict[str, float]:
        """Seconds by kind since the timeline was made."""
        return dict(self._totals)
