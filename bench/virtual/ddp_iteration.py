"""One training iteration of DistributedDataParallel in virtual time: what of the communication backward hides.

    backward     |-------- b1 | encode 1 |---- b2 | encode 2 |------ b3 | encode 3 |  waits  | update |
    network                              [== bucket 1 ==]     [== bucket 2 ==]      [= bucket 3 =]
    callbacks                                             decode 1           decode 2          decode 3

Rules, all of them DDP's and the hook's (`gradiveq.ddp.driver`), for nodes that are alike and begin together:

    bucket k is ready       when backward has come to its last gradient; encoding it takes backward's thread
    exchange k begins       when it was issued and the one before has ended:  start_k = max(issued_k, end_(k-1))
    a method of two rounds  begins bucket k's second round once bucket k+1's first is issued, for which backward's
                            thread waits; the last bucket's hook begins all that are missing
    decode k                after exchange k, one after the other, beside backward
    the optimiser's step    after backward and all decoding

What computes at the same time shares the node's cores: with less of them than wanted, each task gets an equal share, or
what it wants if that is less. An exchange wants the part of a core that its processor time is of its length.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Seconds below this are rounding of sums, and count as nothing.
TINY_S = 1e-12


class Load(NamedTuple):
    """Something on the network: how long it takes by itself, and for how much of that it keeps one core busy."""

    seconds: float
    busy_s: float = 0.0


class BucketRound(NamedTuple):
    """Computing on backward's thread, and then the collectives that it issues, one after the other."""

    compute_s: float
    collectives: tuple[Load, ...]


@dataclass(frozen=True)
class TimedBucket:
    """One bucket's exchange.

    Attributes:
        ready_s: seconds of backward, without any hook, after which its last gradient is there.
        rounds: at least one.
        decode_s: after the last round.
    """

    ready_s: float
    rounds: tuple[BucketRound, ...]
    decode_s: float = 0.0


@dataclass(frozen=True)
class DDPIteration:
    """What came of it.

    Attributes:
        time_s: seconds of the iteration.
        exposed_s: for how long nothing was computed on the main thread: it waited for the network or for decoding.
        network_s: for how long the network was busy.
        exchanges: begin and end of every collective, in order.
    """

    time_s: float
    exposed_s: float
    network_s: float
    exchanges: tuple[tuple[float, float], ...]


class _Step(NamedTuple):
    """A step of the main thread: compute, then issue a bucket's round, or wait for one; rounds are (bucket, number)."""

    compute_s: float = 0.0
    issue: tuple[int, int] | None = None
    wait: tuple[int, int] | None = None


#: Stands for a bucket's decoding, in the place of a round.
DECODED = -1


def iteration(
    forward_s: float,
    backward_s: float,
    update_s: float,
    buckets: Sequence[TimedBucket],
    *,
    cores: float = 1.0,
    overlap_slowdown: float = 1.0,
) -> DDPIteration:
    """Go through one iteration.

    Args:
        forward_s, backward_s, update_s: seconds on a node that has a core for them.
        buckets: in the order in which they are ready.
        cores: the cores of one node, for its backward thread, its callbacks and its network code; at most one each.
        overlap_slowdown: computing takes so many times as long while the network is busy.
    Raises:
        ValueError: buckets are not in order, or cores are none.
    """
    if not cores > 0:
        raise ValueError(f"`cores` must be above 0, got {cores}")
    ready = [bucket.ready_s for bucket in buckets]
    if ready != sorted(ready) or (ready and not 0 <= ready[0] <= ready[-1] <= backward_s + TINY_S):
        raise ValueError(f"`ready_s` must rise from 0 to at most {backward_s} (`backward_s`), got {ready}")
    if any(not bucket.rounds for bucket in buckets):
        raise ValueError("every bucket needs at least one round")
    return _Clock(buckets, cores, overlap_slowdown).run(_steps(forward_s, backward_s, update_s, buckets))


def _steps(forward_s: float, backward_s: float, update_s: float, buckets: Sequence[TimedBucket]) -> Iterator[_Step]:
    """What the main thread does."""
    yield _Step(forward_s)
    done_s, last = 0.0, len(buckets) - 1
    begun: dict[int, int] = {}  # of the buckets with rounds left: the round under way

    def advance(index: int) -> Iterator[_Step]:
        yield _Step(wait=(index, begun[index]))
        begun[index] += 1
        yield _Step(buckets[index].rounds[begun[index]].compute_s, issue=(index, begun[index]))
        if begun[index] == len(buckets[index].rounds) - 1:
            del begun[index]

    for index, bucket in enumerate(buckets):
        yield _Step(bucket.ready_s - done_s)
        done_s, earlier = bucket.ready_s, list(begun)
        yield _Step(bucket.rounds[0].compute_s, issue=(index, 0))
        if len(bucket.rounds) > 1:
            begun[index] = 0
        for one in earlier:
            yield from advance(one)
        while index == last and begun:
            yield from advance(next(iter(begun)))
    yield _Step(max(0.0, backward_s - done_s))
    for index in range(len(buckets)):
        yield _Step(wait=(index, DECODED))
    yield _Step(update_s)


class _Clock:
    """Three things at a time: the main thread's step, one exchange, one decoding."""

    def __init__(self, buckets: Sequence[TimedBucket], cores: float, overlap_slowdown: float) -> None:
        self._buckets, self._cores, self._slow = buckets, cores, overlap_slowdown
        self._now_s = self._exposed_s = self._network_s = 0.0
        self._network: deque[tuple[tuple[int, int], float, float]] = deque()  # what, seconds left, cores wanted
        self._callbacks: deque[tuple[int, float]] = deque()
        self._done: set[tuple[int, int]] = set()
        self._exchanges: list[tuple[float, float]] = []

    def run(self, steps: Iterator[_Step]) -> DDPIteration:
        for step in steps:
            if step.wait is not None:
                while step.wait not in self._done:
                    self._exposed_s += self._go_on(None)[0]
                continue
            left_s = step.compute_s
            while left_s > TINY_S:
                left_s -= self._go_on(left_s)[1]
            if step.issue is not None:
                self._issue(*step.issue)
        return DDPIteration(self._now_s, self._exposed_s, self._network_s, tuple(self._exchanges))

    def _issue(self, index: int, number: int) -> None:
        collectives = self._buckets[index].rounds[number].collectives
        for place, (seconds, busy_s) in enumerate(collectives):
            # Only the last one's end is the round's.
            what = (index, number) if place == len(collectives) - 1 else (index, -2 - place)
            self._network.append((what, seconds, min(1.0, busy_s / seconds) if seconds > 0 else 0.0))
            self._exchanges.append((math.nan, math.nan))
        if not collectives:
            self._end_round(index, number)

    def _end_round(self, index: int, number: int) -> None:
        self._done.add((index, number))
        if number == len(self._buckets[index].rounds) - 1:
            self._callbacks.append((index, self._buckets[index].decode_s))

    def _go_on(self, computing_s: float | None) -> tuple[float, float]:
        """Go on until something ends: (seconds that pass, seconds of the main thread's computing done meanwhile)."""
        wanted = [0.0 if computing_s is None else 1.0]
        wanted.append(self._network[0][2] if self._network else 0.0)
        wanted.append(1.0 if self._callbacks else 0.0)
        speed = [got / want if want else 1.0 for got, want in zip(shares(wanted, self._cores), wanted, strict=True)]
        if self._network:
            speed[0] /= self._slow
            self._begin()
        left = [math.inf if computing_s is None else computing_s / speed[0]]
        left.append(self._network[0][1] / speed[1] if self._network else math.inf)
        left.append(self._callbacks[0][1] / speed[2] if self._callbacks else math.inf)
        passed_s = min(left)
        assert passed_s < math.inf, "the main thread waits for what nobody does"
        self._now_s += passed_s
        if self._network:
            self._network_s += passed_s
            what, seconds, busy = self._network.popleft()
            if seconds - passed_s * speed[1] > TINY_S:
                self._network.appendleft((what, seconds - passed_s * speed[1], busy))
            else:
                self._end()
                if what[1] >= 0:
                    self._end_round(*what)
        # What the network has just handed over is behind what was under way, so it has not begun.
        if left[2] < math.inf:
            index, seconds = self._callbacks.popleft()
            if seconds - passed_s * speed[2] > TINY_S:
                self._callbacks.appendleft((index, seconds - passed_s * speed[2]))
            else:
                self._done.add((index, DECODED))
        return passed_s, passed_s * speed[0]

    def _begin(self) -> None:
        place = len(self._exchanges) - len(self._network)
        if math.isnan(self._exchanges[place][0]):
            self._exchanges[place] = self._now_s, math.nan

    def _end(self) -> None:
        place = len(self._exchanges) - len(self._network) - 1  # it has left the queue already
        self._exchanges[place] = self._exchanges[place][0], self._now_s


def shares(wanted: Sequence[float], cores: float) -> list[float]:
    """What each task gets of the cores: equal shares, but none more than it wants (max-min fairness)."""
    got, left = [0.0] * len(wanted), cores
    order = sorted(range(len(wanted)), key=wanted.__getitem__)
    for place, task in enumerate(order):
        got[task] = min(wanted[task], left / (len(order) - place))
        left -= got[task]
    return got
