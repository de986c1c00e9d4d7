"""Token buckets: what may pass, and the same bits for one link at a time and for all at once."""

from __future__ import annotations

import json
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring.token_bucket import TokenBuckets

rates = st.floats(1e-3, 1e11)
bursts = st.one_of(st.just(0.0), st.integers(1, 10**7).map(float))
sizes = st.one_of(st.just(0), st.integers(1, 10**8))
rests = st.one_of(st.just(0.0), st.floats(1e-9, 10.0))
messages = st.lists(st.tuples(rests, sizes), max_size=12)


@given(rates, bursts, messages)
def test_no_interval_passes_more_than_the_burst_and_the_rate(rate: float, burst: float, sent: Any) -> None:
    """Bytes pass at a message's departure, as many as don't wait, and then at the rate until it has left."""
    table = TokenBuckets([rate], [burst])
    passed, at_once = [(0.0, 0.0)], [0.0]  # moments, and the bytes that have passed just after each
    for rest_s, num_bytes in sent:
        departed_s = table.free_s(0) + rest_s
        left_s = table.transmit(0, departed_s, num_bytes)
        assert left_s >= departed_s
        waited = min(float(num_bytes), (left_s - departed_s) * rate)
        before = passed[-1][1]
        passed += [(departed_s, before + num_bytes - waited), (left_s, before + num_bytes)]
        at_once += [num_bytes - waited, 0.0]
    most = max(left_s for left_s, _ in passed)
    rounding = 1e-9 * (burst + rate * most + passed[-1][1])
    for (first, (start_s, before)), (_, (end_s, after)) in combinations(enumerate(passed), 2):
        assert after - (before - at_once[first]) <= burst + rate * (end_s - start_s) + rounding


@given(rates, bursts, messages)
def test_a_link_that_never_rests_passes_its_burst_once(rate: float, burst: float, sent: Any) -> None:
    """It never idles while something waits either: all is there after exactly the time that the rate needs."""
    table = TokenBuckets([rate], [burst])
    for _, num_bytes in sent:
        table.transmit(0, table.free_s(0), num_bytes)
    expected = max(0.0, sum(num_bytes for _, num_bytes in sent) - burst) / rate
    assert table.free_s(0) == pytest.approx(expected, rel=1e-9, abs=1e-9 * burst / rate)


def test_by_hand() -> None:
    """2 bytes a second and 10 at once: 10 of 14 pass at once, 4 in 2 s; 3 s of rest are 6 bytes, 30 s are 10."""
    table = TokenBuckets([2.0, 2.0], [10.0, 0.0])
    assert len(table) == 2
    assert table.transmit(0, 1.0, 14) == 3.0
    assert table.transmit(0, 6.0, 6) == 6.0
    assert table.transmit(0, 6.0, 1) == 6.5
    assert table.transmit(0, 36.5, 11) == 37.0
    assert table.transmit(1, 5.0, 3) == 6.5
    assert table.all_free_s.tolist() == [37.0, 6.5]


class Before:
    """What a link did when each user of the table had the formula for itself."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self.tokens, self.counted_s, self.free_s = burst, 0.0, 0.0

    def transmit(self, departed_s: float, num_bytes: int) -> float:
        tokens = self.burst
        if tokens:
            tokens = min(tokens, self.tokens + (departed_s - self.counted_s) * self.rate)
        left_s = departed_s + max(0.0, num_bytes - tokens) / self.rate
        self.tokens, self.counted_s = max(0.0, tokens - num_bytes), left_s
        self.free_s = left_s
        return left_s


rounds = st.lists(st.lists(st.one_of(st.none(), st.tuples(rests, sizes)), min_size=3, max_size=3), max_size=8)


@settings(deadline=None)
@given(st.lists(rates, min_size=3, max_size=3), st.lists(bursts, min_size=3, max_size=3), rounds)
def test_one_by_one_and_all_at_once_give_the_bits_of_the_formula(rate: Any, burst: Any, sent: Any) -> None:
    single, together = TokenBuckets(rate, burst), TokenBuckets(rate, burst)
    before = [Before(*link) for link in zip(rate, burst, strict=True)]
    for messages in sent:
        sending = np.array([message is not None for message in messages])
        rested_s, num_bytes = (
            np.array([message[part] if message else 0 for message in messages], np.float64) for part in (0, 1)
        )
        departed_s = together.all_free_s + rested_s
        left_s = together.transmit_all(departed_s, num_bytes, None if sending.all() else sending)
        for link, message in enumerate(messages):
            if message is not None:
                expected_s = before[link].transmit(departed_s[link], message[1])
                assert single.transmit(link, float(departed_s[link]), message[1]) == expected_s
            assert left_s[link] == before[link].free_s == single.free_s(link)
        assert single.all_free_s.tolist() == together.all_free_s.tolist() == left_s.tolist()
        assert single.state_dict() == together.state_dict()
        assert single.state_dict()["tokens"] == [link.tokens for link in before]


def test_clocks_are_pythons_floats() -> None:
    table = TokenBuckets([2.0], [10.0])
    assert type(table.transmit(0, 1.0, 14)) is float
    assert type(table.free_s(0)) is float


def test_what_is_returned_does_not_change_with_the_table() -> None:
    table = TokenBuckets([2.0], [10.0])
    free_s, state = table.all_free_s, table.state_dict()
    left_s = table.transmit_all(np.array([1.0]), np.array([14.0]))
    table.transmit(0, 5.0, 100)
    assert (free_s.tolist(), left_s.tolist(), state) == ([0.0], [3.0], {"free": [0.0], "tokens": [10.0]})


@given(rates, bursts, messages, messages)
def test_state_goes_on_where_it_was(rate: float, burst: float, earlier: Any, later: Any) -> None:
    table, other = TokenBuckets([rate], [burst]), TokenBuckets([rate], [burst])
    for rest_s, num_bytes in earlier:
        table.transmit(0, table.free_s(0) + rest_s, num_bytes)
    other.load_state_dict(json.loads(json.dumps(table.state_dict())))
    for rest_s, num_bytes in later:
        departed_s = table.free_s(0) + rest_s
        assert table.transmit(0, departed_s, num_bytes) == other.transmit(0, departed_s, num_bytes)
    assert table.state_dict() == other.state_dict()
