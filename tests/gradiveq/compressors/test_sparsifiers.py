"""Sparsifiers against plain-NumPy restatements of their papers' formulas, and what they are built of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiveq.arrays import select
from gradiveq.arrays.bits import pack, packed_bytes, unpack
from gradiveq.arrays.select import at_least, top_k
from gradiveq.compressors.adacomp import AdaComp
from gradiveq.compressors.adaptive import Adaptive
from gradiveq.compressors.base import Compressor, Draw
from gradiveq.compressors.randomk import RandomK
from gradiveq.compressors.sparse import decode_positions, encode_positions, positions_bytes
from gradiveq.compressors.threshold import Threshold
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.parts import Part
from tests.support.workers_here import WorkersHere

DRAW = Draw(seed=3, call=5, rank=1, part=2)
DENORMAL = np.float32(1e-45)
#: Values that meet often, so that there are ties, and at the ends of float32.
AWKWARD = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, float(DENORMAL), -3e-45, 1e-38, 1e38, -1e38, 3.4e38)

#: Of a vector of which `top_k` takes its largest sample.
LONG = 8 * select._SAMPLE + 4321

vectors = st.lists(
    st.one_of(st.sampled_from(AWKWARD), st.floats(-100, 100, width=32), st.floats(-(2.0**127), 2.0**127, width=32)),
    max_size=300,
).map(lambda values: np.array(values, np.float32))


def largest_by_sorting(values: np.ndarray, k: int) -> np.ndarray:
    return np.sort(np.argsort(-np.abs(values), kind="stable")[:k])


def check_top_k(values: np.ndarray, k: int) -> None:
    indices, chosen = top_k(values, k)
    assert (indices.dtype, chosen.dtype) == (np.uint32, np.float32)
    assert np.array_equal(indices, largest_by_sorting(values, k))
    assert chosen.tobytes() == values[indices].tobytes()


def decoded(compressor: Compressor, values: np.ndarray, latest: np.ndarray | None = None) -> np.ndarray:
    out = np.full(len(values), np.nan, np.float32)
    compressor.decompress(compressor.compress(values, DRAW, latest), out, DRAW)
    return out


def only(values: np.ndarray, chosen: Any) -> np.ndarray:
    """`values` where chosen, else 0."""
    out = np.zeros_like(values)
    out[chosen] = values[chosen]
    return out


def squared(values: np.ndarray) -> float:
    """‖values‖² in float64, where nothing overflows."""
    return float(np.sum(values.astype(np.float64) ** 2))


class TestBits:
    @staticmethod
    def stream(codes: np.ndarray, bits: int) -> np.ndarray:
        """One lane: the codes' bits behind one another, lowest first."""
        table = codes.astype(np.uint64)[:, None] >> np.arange(bits, dtype=np.uint64) & np.uint64(1)
        return np.packbits(table.astype(np.uint8).ravel(), bitorder="little")

    @classmethod
    def restated(cls, codes: np.ndarray, bits: int) -> np.ndarray:
        """The module's format: blocks of 512 with the words of 16 lanes interleaved, then one lane."""
        whole = len(codes) // 512 * 512
        parts = [np.empty(0, np.uint8)]
        for block in codes[:whole].reshape(-1, 32, 16):
            lanes = [cls.stream(block[:, lane], bits).view(np.uint32) for lane in range(16)]
            parts.append(np.stack(lanes, axis=1).ravel().view(np.uint8))
        return np.concatenate([*parts, cls.stream(codes[whole:], bits)])

    @pytest.mark.parametrize("bits", range(1, 33))
    def test_every_width_against_numpy_and_back(self, bits):
        rng = np.random.default_rng(bits)
        for count in (0, 1, 2, 7, 31, 32, 33, 511, 512, 513, 1024, 1601):
            codes = rng.integers(0, 2**bits, count, dtype=np.uint64).astype(np.uint32)
            codes[:3] = 2**bits - 1
            payload = pack(codes, bits)
            assert payload.dtype == np.uint8
            assert payload.tobytes() == self.restated(codes, bits).tobytes()
            assert len(payload) == packed_bytes(count, bits) == -(-count * bits // 8)
            for offset in range(4):
                message = np.concatenate([np.zeros(offset, np.uint8), payload, np.full(3, 255, np.uint8)])
                message.setflags(write=False)
                back = unpack(message[offset : offset + len(payload)], bits, count)
                assert back.dtype == np.uint32
                assert np.array_equal(back, codes)

    @pytest.mark.parametrize("count", [1, 600])
    def test_a_code_that_needs_more_bits_is_refused(self, count):
        codes = np.zeros(count, np.uint32)
        codes[-1] = 8
        with pytest.raises(ValueError, match=r"must be below 2\^3, .* got 8"):
            pack(codes, 3)

    @pytest.mark.parametrize("bits", [0, 33])
    def test_a_width_out_of_range_is_refused(self, bits):
        with pytest.raises(ValueError, match=f"`bits` must be in 1 ... 32, .* got {bits}"):
            pack(np.zeros(1, np.uint32), bits)
        with pytest.raises(ValueError, match=f"`bits` must be in 1 ... 32, .* got {bits}"):
            unpack(np.zeros(1, np.uint8), bits, 1)

    def test_other_dtypes_and_lengths_are_refused(self):
        with pytest.raises(ValueError, match="vector of uint32, got 1 dimensions of int64"):
            pack(np.zeros(3, np.int64), 3)
        with pytest.raises(ValueError, match="9 codes of 5 bits take 6 bytes, got uint8 of shape"):
            unpack(np.zeros(5, np.uint8), 5, 9)


class TestSelection:
    @given(vectors, st.integers(0, 310))
    def test_top_k_is_what_sorting_gives(self, values, k):
        check_top_k(values, k)

    @given(vectors, st.one_of(st.sampled_from(AWKWARD).map(abs), st.floats(0, 2.0**127, width=32)))
    def test_at_least(self, values, bound):
        indices, chosen = at_least(values, np.float32(bound))
        assert (indices.dtype, chosen.dtype) == (np.uint32, np.float32)
        assert np.array_equal(indices, np.flatnonzero(np.abs(values) >= np.float32(bound)))
        assert chosen.tobytes() == values[indices].tobytes()

    def test_nothing_is_at_least_infinity(self):
        indices, chosen = at_least(np.array([3.4e38, -3.4e38], np.float32), np.float32(np.inf))
        assert len(indices) == len(chosen) == 0

    @staticmethod
    def sampled() -> np.ndarray:
        """The places that the sample sees."""
        sample = np.empty(select._SAMPLE, np.int32)
        select._take_sample(np.arange(LONG, dtype=np.int32), sample)
        return sample

    def test_the_sample_has_one_place_of_each_stretch(self):
        edges = np.arange(select._SAMPLE + 1) * LONG // select._SAMPLE
        sampled = self.sampled()
        assert (sampled >= edges[:-1]).all()
        assert (sampled < edges[1:]).all()
        assert len(np.unique(sampled - edges[:-1])) == np.diff(edges).max()  # and not the same in all

    SHAPES: ClassVar[dict[str, Callable[[np.random.Generator, int], np.ndarray]]] = {
        "normal": lambda rng, n: rng.standard_normal(n),
        "cauchy": lambda rng, n: rng.standard_cauchy(n),
        "ascending": lambda rng, n: np.sort(rng.standard_normal(n)),
        "descending": lambda rng, n: np.sort(np.abs(rng.standard_normal(n)))[::-1],
        "constant": lambda rng, n: np.full(n, -7.5),
        "zeros": lambda rng, n: np.zeros(n),
        "ternary": lambda rng, n: rng.integers(-1, 2, n),
        "huge": lambda rng, n: rng.integers(-1, 2, n) * 1e38,
        "mostly zeros": lambda rng, n: np.where(rng.random(n) < 0.001, rng.standard_normal(n), 0),
        "tied at the top": lambda rng, n: np.where(rng.random(n) < 0.02, 2.0, rng.random(n)),
        "denormal": lambda rng, n: rng.integers(-100, 100, n) * 1e-45,
        "of all sizes": lambda rng, n: np.exp(rng.uniform(-103, 88, n)) * rng.choice([-1, 1], n),
        "periodic": lambda rng, n: np.arange(n) % 512,
        "signs": lambda rng, n: np.where(np.arange(n) < n // 2, 1.0, -1.0),
    }

    @pytest.mark.parametrize(
        ("length", "k"),
        [
            *((5000, k) for k in (1, 50, 4999)),
            (70_001, 700),
            *((LONG, k) for k in (1, 2, 100, 2623, 30_000, 131_072, LONG - 1)),
        ],
    )
    @pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
    def test_top_k_of_long_vectors(self, make, length, k):
        values = make(np.random.default_rng(k), length).astype(np.float32)
        check_top_k(values, k)

    @pytest.mark.parametrize("k", [1, 500, 2623])
    @pytest.mark.parametrize("at_sample", [0.0, 1.0, 5.0], ids=["too low", "tied", "too high"])
    def test_top_k_where_the_sample_misleads(self, at_sample, k):
        values = np.random.default_rng(0).uniform(1, 2, LONG).astype(np.float32)
        values[self.sampled()] = at_sample
        check_top_k(values, k)

    @pytest.mark.parametrize("k", [500, 2623])
    def test_top_k_where_too_few_are_as_large_as_the_sample(self, k):
        values = np.random.default_rng(0).uniform(0, 1, LONG).astype(np.float32)
        values[self.sampled()[:: select._SAMPLE // (k - 1)][: k - 1]] = 3
        seen = self.sampled()[1 :: select._SAMPLE // 64]
        values[seen] = 2
        check_top_k(values, k)

    def test_top_k_leaves_its_input_alone(self):
        values = np.random.default_rng(0).standard_normal(LONG, dtype=np.float32)
        values.setflags(write=False)
        top_k(values, 2623)
        at_least(values, np.float32(1))


class TestPositions:
    @given(st.integers(0, 5000), st.floats(0, 1), st.integers(0, 2**32 - 1), st.integers(0, 3))
    def test_round_trip(self, length, density, seed, offset):
        indices = np.flatnonzero(np.random.default_rng(seed).random(length) < density).astype(np.uint32)
        payload = encode_positions(indices, length)
        assert len(payload) == positions_bytes(length, len(indices))
        message = np.concatenate([np.zeros(offset, np.uint8), payload, np.arange(5, dtype=np.uint8)])
        back, rest = decode_positions(message[offset:], length)
        assert back.dtype == np.uint32
        assert np.array_equal(back, indices)
        assert rest.tolist() == [0, 1, 2, 3, 4]

    @given(st.integers(1, 2**32), st.floats(0, 1))
    def test_no_more_bits_than_the_index_or_the_bitmap_takes(self, length, density):
        count = max(1, round(density * length))
        bits = 8 * (positions_bytes(length, count) - 5)
        assert bits <= 8 * -(-length // 8)
        assert bits <= count * (np.log2(length / count) + 3) + 16
        if count > 4:
            assert bits <= count * max(1, (length - 1).bit_length()) + 16

    def test_sizes(self):
        assert positions_bytes(10_000_000, 100_000) == 5 + (6 * 100_000 + 100_000 + 9_999_999 // 64 + 7) // 8
        assert positions_bytes(10_000_000, 10_000_000) == 5 + 1_250_000
        assert positions_bytes(500, 1) == 5 + 1 + 1
        assert positions_bytes(500, 0) == positions_bytes(0, 0) == 5

    LENGTH = 1000
    FEW = np.array([3, 40, 41, 900], np.uint32)
    MANY = np.arange(0, 1000, 2, dtype=np.uint32)

    @pytest.mark.parametrize("indices", [FEW, MANY], ids=["gaps", "bitmap"])
    def test_truncated_ones_are_refused(self, indices):
        payload = encode_positions(indices, self.LENGTH)
        for num_bytes in range(len(payload)):
            with pytest.raises(ValueError, match=f"bytes, got {num_bytes}"):
                decode_positions(payload[:num_bytes], self.LENGTH)

    @pytest.mark.parametrize("indices", [FEW, MANY], ids=["gaps", "bitmap"])
    def test_flipped_bits_give_an_error_or_other_valid_positions(self, indices):
        payload = encode_positions(indices, self.LENGTH)
        refused = 0
        for bit in range(8 * len(payload)):
            broken = payload.copy()
            broken[bit // 8] ^= 1 << bit % 8
            try:
                back, rest = decode_positions(broken, self.LENGTH)
            except ValueError:
                refused += 1
                continue
            if len(rest) > 0:  # another count: values are missing then
                refused += 1
            else:
                assert len(back) == len(indices)
                assert (np.diff(back.astype(np.int64)) > 0).all()
                assert back[-1] < self.LENGTH
        assert refused >= 40 + 8  # of the header and of the positions

    def test_what_is_wrong_is_said(self):
        payload = encode_positions(self.FEW, self.LENGTH)
        with pytest.raises(ValueError, match="speaks of 4 elements of a vector that has 3"):
            decode_positions(payload, 3)
        with pytest.raises(ValueError, match="written in form 0, got 7"):
            decode_positions(np.concatenate([np.array([7], np.uint8), payload[1:]]), self.LENGTH)
        beyond = encode_positions(np.array([0, 1, 2, 1005], np.uint32), 1010)
        with pytest.raises(ValueError, match="must ascend to at most 999"):
            decode_positions(beyond, 1000)


def restated_topk(k: int) -> Any:
    return lambda values: only(values, largest_by_sorting(values, k))


def restated_ratio(ratio: float) -> Any:
    return lambda x: only(x, largest_by_sorting(x, min(len(x), max(1, round(ratio * len(x))))))


def restated_threshold(value: float) -> Any:
    return lambda x: only(x, np.abs(x) >= np.float32(value))


def restated_adaptive(multiple: float) -> Any:
    def restated(x: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        return only(x, np.abs(multiple * wide) >= np.max(np.abs(wide), initial=0))

    return restated


SPARSIFIERS = [
    (TopK(), restated_ratio(0.01)),
    (TopK(ratio=0.3), restated_ratio(0.3)),
    (TopK(ratio=1.0), lambda values: values),
    (TopK(count=7), restated_topk(7)),
    (Threshold(), restated_threshold(0.01)),
    (Threshold(0.0), lambda values: values),
    (Threshold(1.0), restated_threshold(1.0)),
    (Threshold(0.7), restated_threshold(0.7)),
    (Threshold(1e38), restated_threshold(1e38)),
    (Adaptive(), restated_adaptive(2.0)),
    (Adaptive(1.0), restated_adaptive(1.0)),
    (Adaptive(3.3), restated_adaptive(3.3)),
]
IDS = [f"{compressor}" for compressor, _ in SPARSIFIERS]


@pytest.mark.parametrize(("compressor", "restated"), SPARSIFIERS, ids=IDS)
class TestSparsifiers:
    @settings(max_examples=50)
    @given(values=vectors, offset=st.integers(0, 3))
    def test_the_formula_its_bounds_and_its_payload(self, compressor, restated, values, offset):
        before = values.tobytes()
        payload = compressor.compress(values, DRAW)
        assert values.tobytes() == before
        assert payload.dtype == np.uint8
        most = compressor.payload_bytes(len(values))
        assert len(payload) == most if compressor.fixed_size else len(payload) <= most

        message = np.concatenate([np.zeros(offset, np.uint8), payload])
        message.setflags(write=False)
        out = np.full(len(values), np.nan, np.float32)
        compressor.decompress(message[offset:], out, DRAW)
        assert np.array_equal(out, restated(values))
        assert compressor.num_sent(payload, len(values)) >= np.count_nonzero(out)
        error = values - out
        assert (out + error).tobytes() == (values + np.float32(0)).tobytes()  # -0 as 0

        constants = compressor.constants(len(values))
        whole, left = squared(values), squared(error)
        assert squared(out) <= (1 + constants.omega) * whole
        assert left <= constants.variance * whole * (1 + 1e-12)
        if constants.delta is not None:
            assert 0 < constants.delta <= 1
            assert left <= (1 - constants.delta) * whole * (1 + 1e-12) + (1e-12 * whole if constants.delta < 1 else 0)
        if constants.absolute is not None:
            assert left <= constants.absolute

    def test_adding_touches_only_what_was_sent(self, compressor, restated):
        values = np.random.default_rng(0).standard_normal(400).astype(np.float32)
        values[::7] = 0
        payload = compressor.compress(values, DRAW)
        scratch = np.empty_like(values)
        scratch.setflags(write=False)
        total = np.full(len(values), -0.0, np.float32)  # -0 + 0 would be 0
        compressor.add_to(payload, total, DRAW, scratch)
        assert np.array_equal(total, restated(values))
        assert np.count_nonzero(~np.signbit(total) | (total != 0)) <= compressor.num_sent(payload, len(values))

    def test_payloads_of_other_lengths_are_refused(self, compressor, restated):
        values = np.random.default_rng(0).uniform(0.9, 1.1, 400).astype(np.float32)
        payload = compressor.compress(values, DRAW)
        out = np.empty_like(values)
        for broken in (payload[:0], payload[:4], payload[:5], payload[:-1], np.append(payload, payload[:1])):
            if len(broken) != len(payload):
                with pytest.raises(ValueError, match=r"bytes, got \d+"):
                    compressor.decompress(broken, out, DRAW)
                with pytest.raises(ValueError, match=r"bytes, got \d+"):
                    compressor.add_to(broken, out, DRAW, out)


class TestBoundsAreAttained:
    def test_top_k_by_equal_elements(self):
        values = np.full(200, -3.0, np.float32)
        constants = TopK(count=14).constants(200)
        assert squared(values - decoded(TopK(count=14), values)) == pytest.approx(constants.variance * squared(values))
        assert constants.delta == 14 / 200

    def test_the_threshold_by_elements_just_below(self):
        values = np.full(200, np.nextafter(np.float32(0.5), np.float32(0)), np.float32)
        assert squared(values - decoded(Threshold(0.5), values)) == pytest.approx(
            Threshold(0.5).constants(200).absolute
        )

    @pytest.mark.parametrize("multiple", [1.0, 2.0, 7.0])
    def test_the_adaptive_one_by_elements_just_below(self, multiple):
        values = np.full(200, np.nextafter(np.float32(1 / multiple), np.float32(0)), np.float32)
        values[77] = 1
        error = values - decoded(Adaptive(multiple), values)
        variance = Adaptive(multiple).constants(200).variance
        assert squared(error) == pytest.approx(variance * squared(values), rel=1e-5)

    def test_elements_next_to_the_adaptive_threshold(self):
        kept = 0
        for multiple in np.linspace(1.1, 9, 80):
            edge = np.float32(1 / multiple)
            around = [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(1))]
            values = np.array([-1, *around], np.float32)
            out = decoded(Adaptive(float(multiple)), values)
            assert np.array_equal(out, restated_adaptive(float(multiple))(values))
            kept += int(out[2] != 0)
        assert 0 < kept < 80  # the edge was rounded up and down

    def test_keeping_all_leaves_nothing(self):
        for compressor in (TopK(1.0), TopK(count=9), RandomK(1.0), RandomK(count=9), RandomK(1.0, unbiased=True)):
            constants = compressor.constants(9)
            assert (constants.delta, constants.variance, constants.absolute) == (1, 0, 0)

    @pytest.mark.parametrize("compressor", [TopK(), RandomK(), Adaptive(), AdaComp(), RandomK(unbiased=True)], ids=str)
    def test_nothing_is_left_of_an_empty_vector(self, compressor):
        constants = compressor.constants(0)
        assert (constants.omega, constants.delta, constants.variance) == (0, 1, 0)


class TestRandomK:
    @given(values=vectors, ratio=st.floats(1e-3, 1), seed=st.integers(0, 2**63))
    def test_sends_k_of_them_as_they_are(self, values, ratio, seed):
        compressor, draw = RandomK(ratio), Draw(seed, 2, 3, 4)
        k = min(len(values), max(1, round(ratio * len(values))))
        indices = compressor.indices(len(values), draw)
        assert len(indices) == k
        assert (np.diff(indices) > 0).all()
        payload = compressor.compress(values, draw)
        assert (payload.dtype, payload.shape) == (np.float32, (k,))
        assert payload.nbytes == compressor.payload_bytes(len(values))
        assert compressor.num_sent(payload, len(values)) == k
        out = np.full_like(values, np.nan)
        compressor.decompress(payload, out, draw)
        assert np.array_equal(out, only(values, indices))
        assert np.array_equal(out + (values - out), values)

    @given(values=vectors, ratio=st.floats(1e-3, 1))
    def test_the_unbiased_form_is_rescaled(self, values, ratio):
        compressor = RandomK(ratio, unbiased=True)
        payload = compressor.compress(values, DRAW)
        sent = values[compressor.indices(len(values), DRAW)].astype(np.float64)
        largest = np.finfo(np.float32).max
        scale = len(values) / len(sent) if len(sent) else 1
        assert np.array_equal(payload, np.clip(sent * scale, -largest, largest).astype(np.float32))

    def test_says_which_form_it_is(self):
        assert (RandomK().biased, RandomK().copies) == (True, True)
        assert (RandomK(unbiased=True).biased, RandomK(unbiased=True).copies) == (False, False)

    def test_all_ranks_choose_the_same_and_anew_each_time(self):
        compressor = RandomK(count=20)
        indices = compressor.indices(1000, DRAW)
        assert np.array_equal(indices, compressor.indices(1000, DRAW._replace(rank=0)))
        for other in (DRAW._replace(call=6), DRAW._replace(part=3), DRAW._replace(seed=4)):
            assert not np.array_equal(indices, compressor.indices(1000, other))

    @pytest.mark.parametrize("k", [1, 6, 20, 33, 39])
    def test_every_set_is_as_likely(self, k):
        """Single elements, and pairs of neighbours, come as often as they should: within 5 standard deviations."""
        length, calls = 40, 4000
        chosen = np.zeros((calls, length))
        for call in range(calls):
            chosen[call, RandomK(count=k).indices(length, Draw(1, call, 0, 0))] = 1
        single, pair = k / length, k * (k - 1) / (length * (length - 1))
        for seen, expected in ((chosen, single), (chosen * np.roll(chosen, 1, axis=1), pair)):
            deviation = np.sqrt(expected * (1 - expected) / calls)
            assert np.abs(seen.mean(axis=0) - expected).max() <= 5 * deviation

    @pytest.mark.parametrize("unbiased", [False, True])
    def test_mean_and_variance(self, unbiased):
        """Of 4000 estimates, within 5 standard deviations of the mean, and the error's mean within 5%."""
        compressor = RandomK(0.2, unbiased=unbiased)
        values = np.random.default_rng(0).standard_normal(50).astype(np.float32)
        estimates, out = [], np.empty_like(values)
        for call in range(4000):
            draw = Draw(2, call, 0, 0)
            compressor.decompress(compressor.compress(values, draw), out, draw)
            estimates.append(out.astype(np.float64))
        expected = values * (1.0 if unbiased else 0.2)
        deviation = np.abs(values) * (2 if unbiased else 0.4) / np.sqrt(4000)  # sqrt(p(1-p)), times 1/p
        assert (np.abs(np.mean(estimates, axis=0) - expected) <= 5 * deviation).all()
        constants = compressor.constants(50)
        errors = [squared(values - estimate) for estimate in estimates]
        assert np.mean(errors) == pytest.approx(constants.variance * squared(values), rel=0.05)
        norms = [squared(estimate) for estimate in estimates]
        assert np.mean(norms) <= (1 + constants.omega) * squared(values) * 1.05
        assert constants.omega == (pytest.approx(4) if unbiased else 0)
        assert constants.delta == (None if unbiased else pytest.approx(0.2))

    def test_workers_values_are_added(self):
        rng = np.random.default_rng(0)
        gradients = rng.integers(-8, 8, (4, 300)).astype(np.float32)
        compressor = RandomK(0.1)
        workers = WorkersHere([Part("all", 0, 300, compressor)], 4, seed=9)
        out = np.empty(300, np.float32)
        workers.aggregate(gradients, out, 7)
        assert np.array_equal(out, only(gradients.sum(axis=0) / 4, compressor.indices(300, Draw(9, 7, 0, 0))))


def restated_adacomp(values: np.ndarray, latest: np.ndarray, bin_size: int) -> np.ndarray:
    """pack() of Chen et al. 2018, element by element."""
    starts = range(0, len(values), bin_size)
    maxima = [max(abs(float(value)) for value in values[start : start + bin_size]) for start in starts]
    scale = np.float32(sum(maxima) / len(maxima)) if maxima else np.float32(0)
    out = np.zeros_like(values)
    for i, (value, new) in enumerate(zip(values, latest, strict=True)):
        with np.errstate(over="ignore"):
            h = value + new
        if abs(h) >= maxima[i // bin_size]:
            out[i] = np.sign(value) * scale
    return out


class TestAdaComp:
    @settings(max_examples=50)
    @given(
        pairs=st.lists(st.tuples(st.sampled_from(AWKWARD), st.sampled_from(AWKWARD)), max_size=60),
        bin_size=st.integers(1, 70),
        seed=st.one_of(st.none(), st.integers(0, 1000)),
    )
    def test_the_formula_its_bounds_and_its_payload(self, pairs, bin_size, seed):
        values, latest = np.array(pairs, np.float32).reshape(-1, 2).T.copy()
        if seed is not None:
            values, latest = np.random.default_rng(seed).standard_normal((2, 70)).astype(np.float32)
        compressor = AdaComp(bin_size)
        before = values.tobytes() + latest.tobytes()
        payload = compressor.compress(values, DRAW, latest)
        assert values.tobytes() + latest.tobytes() == before
        assert len(payload) <= compressor.payload_bytes(len(values))
        out = np.full_like(values, np.nan)
        compressor.decompress(np.append(np.uint8(0), payload)[1:], out, DRAW)
        np.testing.assert_allclose(out, restated_adacomp(values, latest, bin_size), rtol=1e-7)
        assert compressor.num_sent(payload, len(values)) >= np.count_nonzero(out)
        total = np.ones_like(values)
        compressor.add_to(payload, total, DRAW, np.empty_like(values))
        assert np.array_equal(total, np.float32(1) + out)

        constants = compressor.constants(len(values))
        assert squared(out) <= (1 + constants.omega) * squared(values) * (1 + 1e-6)
        wide = values.astype(np.float64)
        assert squared(wide - out) <= constants.variance * squared(values) * (1 + 1e-6)

    def test_without_a_residual_it_sends_from_half_the_maximum_on(self):
        values = np.array([1, -0.5, 0.49, 0, 8, 4, -3.9, 0], np.float32)
        for latest in (None, values):
            assert decoded(AdaComp(4), values, latest).tolist() == [4.5, -4.5, 0, 0, 4.5, 4.5, 0, 0]

    def test_nothing_is_sent_of_zeros(self):
        payload = AdaComp().compress(np.zeros(1000, np.float32), DRAW)
        assert AdaComp().num_sent(payload, 1000) == 0
        assert len(payload) == 4 + 5

    def test_the_residual_is_what_error_feedback_remembers(self):
        rng = np.random.default_rng(0)
        feedback = ErrorFeedback("gradient")
        worker = WorkersHere([Part("all", 0, 500, AdaComp(50))], 1, feedback=feedback)
        residual, out = np.zeros(500, np.float32), np.empty(500, np.float32)
        for call in range(6):
            latest = rng.standard_normal(500).astype(np.float32)
            worker.aggregate([latest], out, call)
            values = latest + residual
            sent = restated_adacomp(values, latest, 50)
            np.testing.assert_allclose(out, sent, rtol=1e-6)
            assert not np.array_equal(sent != 0, restated_adacomp(values, values, 50) != 0) or call == 0
            residual = values - out
            assert np.array_equal(worker.memory(0), residual)

    def test_payloads_of_other_lengths_are_refused(self):
        payload = AdaComp().compress(np.random.default_rng(0).standard_normal(400).astype(np.float32), DRAW)
        out = np.empty(400, np.float32)
        for broken in (payload[:0], payload[:4], payload[:9], payload[:-1], np.append(payload, payload[:1])):
            with pytest.raises(ValueError, match="got"):
                AdaComp().decompress(broken, out, DRAW)
            with pytest.raises(ValueError, match="got"):
                AdaComp().add_to(broken, out, DRAW, out)


class TestASparseSumInTheRing:
    """What `gradiveq.compressors.sparse` says of the elements that it would send, over those of an all-gather."""

    @staticmethod
    def quotient(choices: list[set[int]], length: int) -> float:
        """Counted hop by hop."""
        size, travelled = len(choices), 0
        for segment in range(size):
            here = set(range(segment * length // size, (segment + 1) * length // size))
            carried: set[int] = set()
            for hop in range(size - 1):
                carried |= choices[(segment + hop) % size] & here
                travelled += len(carried)
            carried |= choices[(segment + size - 1) % size] & here
            travelled += (size - 1) * len(carried)
        return travelled / ((size - 1) * sum(map(len, choices)))

    @given(st.integers(2, 7), st.integers(1, 200), st.floats(0.01, 1), st.integers(0, 2**32 - 1))
    def test_the_union_decides(self, size, length, density, seed):
        rng = np.random.default_rng(seed)
        choices = [{0, *map(int, np.flatnonzero(rng.random(length) < density))} for _ in range(size)]
        union, chosen = len(set().union(*choices)), sum(map(len, choices))  # N·k of the module is `chosen`
        quotient = self.quotient(choices, length)
        assert quotient <= 2 * union / chosen + 1e-12  # below 1 if the union is below N·k/2
        assert quotient >= (union / chosen if size > 2 else 1)

    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_the_two_ends(self, size):
        assert self.quotient([set(range(0, 960, 7))] * size, 960) == pytest.approx(2 / size)
        assert self.quotient([set(range(worker, 960, 16)) for worker in range(size)], 960) == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TopK(0), r"`ratio` is the fraction of the elements to keep, in \(0, 1\], got 0"),
        (lambda: TopK(1.01), "`ratio` .* got 1.01"),
        (lambda: TopK(float("nan")), "`ratio` .* got nan"),
        (lambda: TopK(count=0), "`count`, of the elements to keep, must be at least 1, got 0"),
        (lambda: RandomK(-0.1), "`ratio` .* got -0.1"),
        (lambda: RandomK(count=-1), "`count`, .* got -1"),
        (lambda: Threshold(-1.0), r"`value` must be in \[0, 3.403e\+38\], .* got -1.0"),
        (lambda: Threshold(1e39), "`value` .* got 1e\\+39"),
        (lambda: Threshold(float("nan")), "`value` .* got nan"),
        (lambda: Adaptive(0.99), "`multiple` must be at least 1, .* got 0.99"),
        (lambda: Adaptive(float("inf")), "`multiple` .* got inf"),
        (lambda: AdaComp(0), "`bin_size`, in elements, must be at least 1, got 0"),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
