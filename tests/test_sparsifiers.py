"""Sparsifiers against plain-NumPy restatements of their papers' formulas, and what they are built of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiveq.compressors import select
from gradiveq.compressors.adaptive import Adaptive
from gradiveq.compressors.base import Compressor, Draw
from gradiveq.compressors.bits import pack, packed_bytes, unpack
from gradiveq.compressors.select import at_least, top_k
from gradiveq.compressors.sparse import decode_positions, encode_positions, positions_bytes
from gradiveq.compressors.threshold import Threshold
from gradiveq.compressors.topk import TopK

DRAW = Draw(seed=3, call=5, rank=1, part=2)
DENORMAL = np.float32(1e-45)
#: Values that meet often, so that there are ties, and at the ends of float32.
AWKWARD = (0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 2.0, float(DENORMAL), -3e-45, 1e-38, 1e38, -1e38, 3.4e38)

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

    LENGTH = 8 * select._SAMPLE + 4321  # the shortest for which top_k takes the whole sample

    @classmethod
    def sampled(cls) -> np.ndarray:
        """The places that the sample sees."""
        sample = np.empty(select._SAMPLE, np.int32)
        select._take_sample(np.arange(cls.LENGTH, dtype=np.int32), sample)
        return sample

    def test_the_sample_has_one_place_of_each_stretch(self):
        edges = np.arange(select._SAMPLE + 1) * self.LENGTH // select._SAMPLE
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

    @pytest.mark.parametrize("k", [1, 2, 100, 2623, 30_000, 131_072, 266_464])
    @pytest.mark.parametrize("make", SHAPES.values(), ids=SHAPES)
    def test_top_k_of_long_vectors(self, make, k):
        values = make(np.random.default_rng(k), self.LENGTH).astype(np.float32)
        check_top_k(values, k)

    @pytest.mark.parametrize("k", [1, 500, 2623])
    @pytest.mark.parametrize("at_sample", [0.0, 1.0, 5.0], ids=["too low", "tied", "too high"])
    def test_top_k_where_the_sample_misleads(self, at_sample, k):
        values = np.random.default_rng(0).uniform(1, 2, self.LENGTH).astype(np.float32)
        values[self.sampled()] = at_sample
        check_top_k(values, k)

    @pytest.mark.parametrize("k", [500, 2623])
    def test_top_k_where_too_few_are_as_large_as_the_sample(self, k):
        values = np.random.default_rng(0).uniform(0, 1, self.LENGTH).astype(np.float32)
        values[self.sampled()[:: select._SAMPLE // (k - 1)][: k - 1]] = 3
        seen = self.sampled()[1 :: select._SAMPLE // 64]
        values[seen] = 2
        check_top_k(values, k)

    def test_top_k_leaves_its_input_alone(self):
        values = np.random.default_rng(0).standard_normal(self.LENGTH, dtype=np.float32)
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
