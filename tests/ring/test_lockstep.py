"""The algorithm, run by the lockstep driver."""

from __future__ import annotations

import sys
import threading
import time

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ring import Codec, Composite, IdentityCodec, RingError, RingMismatch, Timeline
from ring.algorithm import owned_segment, schedule
from ring.lockstep import LockstepRing, run
from ring.segments import Region, cut_segments
from tests.support.toy_codecs import HalfPerHop, PairSums

sizes = st.integers(1, 7)
lengths = st.one_of(st.integers(0, 9), st.integers(10, 500))
chunks = st.sampled_from([4, 64, 300, sys.maxsize])


def contribution(rank: int, length: int, dtype: type = np.float64) -> np.ndarray:
    """Depends on rank and index; sums of up to 7 ranks are exact even in float16."""
    return ((np.arange(length) * 7 + 3 * rank * rank) % 31 - 15).astype(dtype)


def total(size: int, length: int) -> np.ndarray:
    return sum((contribution(rank, length) for rank in range(size)), np.zeros(length))


@settings(deadline=None, max_examples=150)
@given(sizes, lengths, chunks, st.sampled_from([np.float16, np.float32, np.float64, ml_dtypes.bfloat16]))
def test_all_reduce_sums_exactly_and_sends_what_the_formula_says(size, length, chunk_bytes, dtype) -> None:
    def work(ring: LockstepRing):
        vector = contribution(ring.rank, length, dtype)
        return vector, ring.all_reduce(vector, chunk_bytes=chunk_bytes)

    results = run(size, work)
    for vector, _ in results:
        np.testing.assert_array_equal(vector.astype(float), total(size, length))
    itemsize = np.dtype(dtype).itemsize
    assert sum(stats.bytes_sent for _, stats in results) == 2 * (size - 1) * length * itemsize
    if length % size == 0:
        assert {stats.bytes_sent for _, stats in results} == {2 * (size - 1) * length * itemsize // size}


@settings(deadline=None, max_examples=60)
@given(sizes, lengths, chunks)
def test_reduce_scatter_then_all_gather_is_all_reduce(size, length, chunk_bytes) -> None:
    def work(ring: LockstepRing):
        vector = contribution(ring.rank, length)
        bounds = [length * segment // size for segment in range(size + 1)]
        ring.reduce_scatter(vector, chunk_bytes=chunk_bytes, bounds=bounds)
        segment = owned_segment(ring.rank, size)
        own = vector[bounds[segment] : bounds[segment + 1]].copy()
        np.testing.assert_array_equal(own, total(size, length)[bounds[segment] : bounds[segment + 1]])
        vector[:] = -1
        vector[bounds[segment] : bounds[segment + 1]] = own
        ring.all_gather(vector, chunk_bytes=chunk_bytes, bounds=bounds)
        return vector

    for vector in run(size, work):
        np.testing.assert_array_equal(vector, total(size, length))


@settings(deadline=None, max_examples=60)
@given(sizes, lengths, chunks)
def test_linear_codec_adds_payloads(size, length, chunk_bytes) -> None:
    def work(ring: LockstepRing):
        vector = contribution(ring.rank, length)
        return vector, ring.all_reduce(vector, PairSums(), chunk_bytes=chunk_bytes)

    expected = total(size, length)
    pairs = length // 2 * 2
    expected[:pairs] = expected[:pairs].reshape(-1, 2).mean(axis=1).repeat(2)
    results = run(size, work)
    for vector, _ in results:
        np.testing.assert_array_equal(vector, expected)
    assert sum(stats.bytes_sent for _, stats in results) == 2 * (size - 1) * ((length + 1) // 2) * 8


@settings(deadline=None, max_examples=60)
@given(sizes, lengths, chunks)
def test_per_hop_codec_encodes_the_sum_at_every_hop(size, length, chunk_bytes) -> None:
    def work(ring: LockstepRing):
        vector = contribution(ring.rank, length, np.float32)
        return vector, ring.all_reduce(vector, HalfPerHop(), chunk_bytes=chunk_bytes)

    hops = sum(range(size))  # the codec adds each hop's step
    results = run(size, work)
    for vector, _ in results:
        np.testing.assert_array_equal(vector, total(size, length) + hops)
    assert sum(stats.bytes_sent for _, stats in results) == 2 * (size - 1) * length * 2


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_composite_applies_each_codec_to_its_part(size: int, linear: bool) -> None:
    lossy: Codec = PairSums() if linear else HalfPerHop()
    codec = Composite([(101, lossy), (50, IdentityCodec())])
    assert codec.linear is linear

    def together(ring: LockstepRing):
        vector = contribution(ring.rank, 151, np.float32)
        ring.all_reduce(vector, codec, chunk_bytes=64)
        return vector

    def apart(ring: LockstepRing):
        vector = contribution(ring.rank, 151, np.float32)
        ring.all_reduce(vector[:101], lossy, chunk_bytes=64)
        ring.all_reduce(vector[101:], chunk_bytes=64)
        return vector

    for one, other in zip(run(size, together), run(size, apart), strict=True):
        np.testing.assert_array_equal(one, other)


def test_composite_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="cover 5 elements, the vector has 6"):
        run(2, lambda ring: ring.all_reduce(np.zeros(6), Composite([(5, IdentityCodec())])))


@pytest.mark.parametrize("codec", [IdentityCodec(), PairSums(), HalfPerHop()], ids=["identity", "linear", "per-hop"])
@pytest.mark.parametrize("size", [1, 3])
def test_mean_divides_by_size(codec: Codec, size: int) -> None:
    def work(ring: LockstepRing):
        one, other = (contribution(ring.rank, 40, np.float32) for _ in range(2))
        ring.all_reduce(one, codec)
        ring.all_reduce(other, codec, op="mean")
        return one, other

    for one, other in run(size, work):
        np.testing.assert_array_equal(one / np.float32(size), other)


def test_all_workers_end_with_the_same_bits() -> None:
    def work(ring: LockstepRing):
        vector = np.random.default_rng(ring.rank).standard_normal(997).astype(np.float32)
        ring.all_reduce(vector, chunk_bytes=128)
        return vector.tobytes()

    assert len(set(run(5, work))) == 1


def test_the_schedule_is_the_picture() -> None:
    """Rank 0 of 3 works on s0, s2, s1 (finished), s0, s2: the table above the algorithm."""
    segments = cut_segments([Region(3, 1, 8)], 3, 64)
    assert [(work.step, work.segment) for work in schedule("all_reduce", segments, 0, 3)] == [
        (0, 0),
        (1, 2),
        (2, 1),
        (3, 0),
        (4, 2),
    ]
    assert [work.step for work in schedule("reduce_scatter", segments, 1, 3)] == [0, 1, 2]
    assert [work.step for work in schedule("all_gather", segments, 1, 3)] == [2, 3, 4]


class Recorder(PairSums):
    """Notes what happens in which order."""

    def __init__(self) -> None:
        self.events: list[str] = []

    def encode(self, *args) -> None:
        self.events.append("encode")
        super().encode(*args)

    def reduce(self, *args) -> None:
        self.events.append("add")
        super().reduce(*args)

    def decode(self, *args) -> None:
        self.events.append("decode")
        super().decode(*args)


def test_linear_codec_encodes_once_and_decodes_once() -> None:
    """Algorithm 1: N encodings, N - 1 additions, N decodings; an encoding precedes the addition it is for."""

    def work(ring: LockstepRing):
        codec = Recorder()
        ring.all_reduce(np.ones(40), codec)
        return codec.events

    for events in run(4, work):
        assert events == ["encode", *["encode", "add"] * 3, *["decode"] * 4]


def test_timeline_knows_what_was_computed() -> None:
    def work(ring: LockstepRing):
        timeline = Timeline()
        ring.all_reduce(np.ones(40), PairSums(), timeline=timeline)
        ring.all_reduce(np.ones(40, np.float32), HalfPerHop(), timeline=timeline)
        return timeline.totals()

    for totals in run(3, work):
        assert {"encode", "add", "recode", "decode"} <= set(totals)
        assert all(seconds >= 0 for seconds in totals.values())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda ring: ring.all_reduce(np.zeros(6)), "of 6 float64"),
        (lambda ring: ring.all_reduce(np.zeros(5, np.float32)), "of 5 float32"),
        (lambda ring: ring.all_reduce(np.zeros(5), PairSums()), "as sums of pairs"),
        (lambda ring: ring.all_reduce(np.zeros(5), chunk_bytes=9), "chunks of 9 bytes"),
        (lambda ring: ring.all_reduce(np.zeros(5), op="mean"), "all_reduce\\(mean\\)"),
        (lambda ring: ring.all_gather(np.zeros(5)), "all_gather"),
    ],
)
def test_disagreement_says_who_said_what(change, said: str) -> None:
    with pytest.raises(RingMismatch, match=rf"ranks \[0, 2\] call .* of 5 float64.*ranks \[1\] call .*{said}"):
        run(3, lambda ring: change(ring) if ring.rank == 1 else ring.all_reduce(np.zeros(5)))


def test_a_barrier_is_no_all_reduce() -> None:
    with pytest.raises(RingMismatch, match=r"ranks \[0\] call .* of 1 float32.*ranks \[1, 2\] call .* of 5 float64"):
        run(3, lambda ring: ring.all_reduce(np.zeros(5)) if ring.rank else ring.barrier())


def test_long_descriptions_are_told_apart() -> None:
    def work(ring: LockstepRing) -> None:
        codec = Composite([(1, PairSums())] * 59 + [(1, IdentityCodec() if ring.rank else PairSums())])
        ring.all_reduce(np.zeros(60), codec)

    with pytest.raises(RingMismatch, match=r"digest (\w+)\).*digest (?!\1)") as caught:
        run(2, work)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_gather_decodes_one_contribution(size: int) -> None:
    """A codec that decodes by the number of contributions, as affine ones do, is told that there is one."""

    class Counting(PairSums):
        def decode(self, payload, start, values, size) -> None:
            super().decode(payload, start, values, size)
            values += 100 * size

    def work(ring: LockstepRing):
        vector = np.full(24, float(ring.rank))
        ring.all_gather(vector, Counting(), chunk_bytes=16)
        return vector

    owners = np.repeat([(segment - 1) % size for segment in range(size)], 24 // size)
    for vector in run(size, work):
        np.testing.assert_array_equal(vector, owners + 100)


@pytest.mark.parametrize(
    ("vector", "options", "error", "message"),
    [
        ([1.0], {}, TypeError, "must be a NumPy array, got list"),
        (np.zeros((2, 2)), {}, ValueError, r"one dimension, got shape \(2, 2\)"),
        (np.zeros(3, np.int64), {}, TypeError, "one of float16, float32, float64, bfloat16, int8, int16, int32, got"),
        (np.zeros(3, np.uint8), {}, TypeError, "int32, got uint8; uint8 can be gathered, not added"),
        (np.zeros(3, np.int8), {"op": "mean"}, ValueError, "`op` must be 'sum' for int8, whose mean is none"),
        (np.zeros(3), {"codec": "topk"}, TypeError, "must be a ring.Codec, got str: .* is gathered"),
        (np.zeros(6)[::2], {}, ValueError, "must be contiguous and writable"),
        (np.broadcast_to(0.0, 1), {}, ValueError, "must be contiguous and writable"),
        (np.zeros(3, ">f4"), {}, TypeError, "this machine's byte order, got dtype >f4"),
        (np.zeros(3), {"chunk_bytes": 0}, ValueError, "`chunk_bytes` must be a whole number of at least 1, got 0"),
        (np.zeros(3), {"op": "max"}, ValueError, "'sum' or 'mean', got 'max'"),
        (np.zeros(3), {"chunk_bytes": -1}, ValueError, "`chunk_bytes` must be a whole number of at least 1, got -1"),
    ],
)
def test_invalid_arguments(vector, options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        run(2, lambda ring: ring.all_reduce(vector, **options))


@settings(deadline=None, max_examples=60)
@given(sizes, lengths, chunks, st.sampled_from([np.int8, np.int16, np.int32]))
def test_integers_are_summed(size, length, chunk_bytes, dtype) -> None:
    def work(ring: LockstepRing):
        vector = contribution(ring.rank, length, dtype)
        return vector, ring.all_reduce(vector, chunk_bytes=chunk_bytes)

    expected = total(size, length).astype(dtype)
    results = run(size, work)
    for vector, _ in results:
        assert vector.dtype == dtype
        np.testing.assert_array_equal(vector, expected)
    assert sum(stats.bytes_sent for _, stats in results) == 2 * (size - 1) * expected.nbytes


@settings(deadline=None, max_examples=100)
@given(st.data(), sizes, chunks)
def test_bytes_of_any_lengths_are_gathered(data, size, chunk_bytes) -> None:
    """Odd lengths and empty contributions, or nothing from anybody."""
    counts = [data.draw(st.one_of(st.just(0), st.integers(0, 700))) for _ in range(size)]
    messages = [np.random.default_rng([rank, count]).bytes(count) for rank, count in enumerate(counts)]
    bounds = np.cumsum([0, *(counts[segment - 1] for segment in range(size))]).tolist()

    def work(ring: LockstepRing):
        vector = np.zeros(sum(counts), np.uint8)
        own = owned_segment(ring.rank, size)
        vector[bounds[own] : bounds[own + 1]] = np.frombuffer(messages[ring.rank], np.uint8)
        stats = ring.all_gather(vector, bounds=bounds, chunk_bytes=chunk_bytes)
        return vector.tobytes(), stats

    results = run(size, work)
    assert {bits for bits, _ in results} == {b"".join(messages[segment - 1] for segment in range(size))}
    assert sum(stats.bytes_sent for _, stats in results) == (size - 1) * sum(counts)


def test_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        run(0, lambda ring: None)


def test_an_exception_on_one_worker_ends_all() -> None:
    before = threading.active_count()

    def work(ring: LockstepRing) -> None:
        if ring.rank == 2:
            raise KeyError("rank 2 fails")
        ring.all_reduce(np.zeros(3))

    with pytest.raises(KeyError, match="rank 2 fails"):
        run(4, work)
    assert threading.active_count() == before


def test_a_worker_that_never_comes_is_noticed() -> None:
    with pytest.raises(RingError, match=r"within 0\.2 s"):
        run(2, lambda ring: time.sleep(0.6) if ring.rank else ring.barrier(), timeout_s=0.2)


def test_one_object_for_all_workers() -> None:
    """The first that asks makes it; the second object that anybody asks for is another one."""
    made: list[list[int]] = []

    def make() -> list[int]:
        made.append([len(made)])
        return made[-1]

    results = run(5, lambda ring: (ring.shared(make), ring.shared(make), ring._meeting._shared))
    assert len(made) == 2
    for first, second, kept in results:
        assert first is results[0][0]
        assert second is results[0][1]
        assert first is not second
        assert not kept


def test_something_is_computed_once_from_the_rows_of_all() -> None:
    calls: list[int] = []

    def work(ring: LockstepRing):
        def function(rows, own):
            calls.append(ring.rank)
            assert rows.tolist() == [[rank, -rank] for rank in range(3)]
            return [f"{own[rank]} of {sorted(own)}" for rank in range(3)]

        return ring.compute_once([ring.rank, -ring.rank], f"worker {ring.rank}", function)

    assert run(3, work) == [f"worker {rank} of [0, 1, 2]" for rank in range(3)]
    assert len(calls) == 1


def test_what_fails_for_all_is_raised_on_each() -> None:
    caught: list[int] = []

    def work(ring: LockstepRing) -> None:
        def function(rows, own):
            raise KeyError("nothing fits")

        try:
            ring.compute_once([1.0], None, function)
        except KeyError:
            caught.append(ring.rank)

    run(3, work)
    assert sorted(caught) == [0, 1, 2]


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (lambda ring: ring.barrier(), r"ranks \[1\] call all_reduce\(sum\) of 1 float32"),
        (lambda ring: ring.compute_once([1.0, 2.0], None, None), r"ranks \[1\] call .* from 2 numbers of each rank"),
    ],
)
def test_what_is_computed_once_is_computed_by_all(other, said: str) -> None:
    def work(ring: LockstepRing) -> None:
        other(ring) if ring.rank == 1 else ring.compute_once([1.0], None, lambda rows, own: [0, 0, 0])

    with pytest.raises(RingMismatch, match=rf"ranks \[0, 2\] call .* from 1 numbers of each rank; {said}"):
        run(3, work)
