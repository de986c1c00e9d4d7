"""Where the time went, whatever the clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def compute_unmeasured(kind: str, function: Callable[..., Any], *args: Any) -> None:
    """What `Timeline.compute` is to callers that don't ask where the time went."""
    function(*args)


class Timeline:
    """Seconds by kind of span: forward, backward, encode, add, recode, decode, wait, fit, update, …

    Spans of different kinds don't overlap: "wait" is exposed communication, and what is hidden behind a computation
    costs nothing. Totals are what callers need today, so single spans are not kept.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self._totals: dict[str, float] = defaultdict(float)

    def add(self, kind: str, seconds: float) -> None:
        """Account for a span that the caller has measured."""
        self._totals[kind] += seconds

    def compute(self, kind: str, function: Callable[..., Any], *args: Any) -> None:
        """Call `function(*args)` and account for it as `kind`."""
        start = self.clock()
        function(*args)
        self._totals[kind] += self.clock() - start

    @contextmanager
    def span(self, kind: str) -> Iterator[None]:
        """Measure the body as `kind`."""
        start = self.clock()
        try:
            yield
        finally:
            self._totals[kind] += self.clock() - start

    def totals(self) -> dict[str, float]:
        """Seconds by kind since the timeline was made."""
        return dict(self._totals)
