"""QSGD against a plain NumPy restatement of its formula, its statistics, and its edge cases."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from gradiveq.arrays.levels import Norm, level_variance
from gradiveq.over_ring.qsgd import QSGD
from ring.codec import Array, Hop

FLOAT32 = np.dtype(np.float32)
HOP = Hop(rank=1, size=6, step=2)
EVERY_FORMAT = pytest.mark.parametrize(("bits", "norm"), [(b, n) for b in (2, 4, 8) for n in ("max", "l2")])
reproducible = settings(deadline=None, derandomize=True, max_examples=150)
codecs = st.builds(
    QSGD,
    bits=st.sampled_from((2, 4, 8)),
    bucket=st.sampled_from((1, 3, 16, 100, 512)),
    norm=st.sampled_from(("max", "l2")),
    seed=st.integers(0, 2**64 - 1),
    call=st.integers(0, 2**64 - 1),
)
hops = st.builds(Hop, st.integers(0, 99), st.just(100), st.integers(0, 99))


def gaussian(length: int, seed: int = 0) -> Array:
    values: Array = np.random.default_rng(seed).standard_normal(length, dtype=np.float32)
    return values


def num_bytes(codec: QSGD, length: int) -> int:
    return sum(region.num_bytes for region in codec.regions(length, FLOAT32))


def encode(codec: QSGD, values: Array, start: int = 0, hop: Hop = HOP) -> Array:
    payload = np.full(num_bytes(codec, len(values)), 0xAA, np.uint8)
    codec.encode(values, start, payload, hop)
    return payload


def reduce(codec: QSGD, incoming: Array, values: Array, start: int = 0, hop: Hop = HOP) -> Array:
    payload = np.full_like(incoming, 0xAA)
    codec.reduce(incoming, values, start, payload, hop)
    return payload


def decode(codec: QSGD, payload: Array, length: int) -> Array:
    values = np.full(length, 7, np.float32)
    codec.decode(payload, 0, values, HOP.size)
    return values


def relative_error(result: Array, values: Array) -> float:
    return float(np.sum((result.astype(float) - values) ** 2) / np.sum(values.astype(float) ** 2))


# --- A plain NumPy restatement -------------------------------------------------------------------------------------


def mix64(x: Array) -> Array:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def stream_key(codec: QSGD, hop: Hop) -> Array:
    key = np.array([0x9E3779B97F4A7C15], np.uint64)
    for part in (codec.seed, codec.call, hop.rank, hop.step):
        key = mix64(key + np.uint64(part))
    return key


def random24(codec: QSGD, hop: Hop, start: int, length: int) -> Array:
    """int64 of shape (length,): the 24 random bits of the elements from `start` on, a multiple of the bucket."""
    positions = np.arange(start, start + length, dtype=np.uint64)
    inside = (positions % np.uint64(codec.bucket)).astype(np.uint32)
    bucket_key = mix64(stream_key(codec, hop) + positions - inside)
    x = inside ^ bucket_key.astype(np.uint32)
    x = (x ^ (x >> np.uint32(17))) * np.uint32(0xED5AD4BB)
    x = (x ^ (x >> np.uint32(11))) + (bucket_key >> np.uint64(32)).astype(np.uint32)
    x = x * np.uint32(0xAC4C1B51)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x31848BAB)
    x = x ^ (x >> np.uint32(14))
    return (x >> np.uint32(8)).astype(np.int64)


def quantised(values: Array, thresholds: Array, bits: int, norm: Norm) -> tuple[Any, Array]:
    """Norm and codes floor(s·x/m + u) of one finite bucket, u = thresholds / 2^24."""
    wide = values.astype(np.float64)
    m = np.float32(np.abs(values).max() if norm == "max" else np.sqrt(np.cumsum(wide * wide)[-1]))
    if m == 0:
        return m, np.zeros(len(values), np.int64)
    levels = np.trunc(values / m * np.float32((2 ** (bits - 1) - 1) * 2**24)).astype(np.int64)
    return m, np.floor_divide(levels + thresholds, 2**24)


def packed(m: Any, codes: Array, bits: int) -> bytes:
    """The norm, then element i in field i // W of word i % W, of W words."""
    words = [0] * -(-len(codes) * bits // 32)
    for i, code in enumerate(codes):
        words[i % len(words)] |= (int(code) & (2**bits - 1)) << bits * (i // len(words))
    return np.float32(m).tobytes() + np.array(words, np.uint32).tobytes()


def restated_encode(codec: QSGD, values: Array, start: int, hop: Hop) -> tuple[bytes, Array]:
    """Payload, and the float32 values that it stands for."""
    thresholds = random24(codec, hop, start, len(values))
    payload, decoded = b"", np.empty_like(values)
    for first in range(0, len(values), codec.bucket):
        bucket = slice(first, first + codec.bucket)
        m, codes = quantised(values[bucket], thresholds[bucket], codec.bits, codec.norm)
        payload += packed(m, codes, codec.bits)
        level = np.float32(1) / np.float32(2 ** (codec.bits - 1) - 1)
        decoded[bucket] = codes.astype(np.float32) * level * m
    return payload, decoded


@reproducible
@given(codec=codecs, hop=hops, length=st.integers(0, 1500), buckets=st.integers(0, 2**40), data=st.integers(0, 2**32))
def test_agrees_bitwise_with_the_numpy_restatement(codec: QSGD, hop: Hop, length: int, buckets: int, data: int) -> None:
    first, second, start = gaussian(length, data), gaussian(length, data + 1), buckets * codec.bucket
    payload, decoded = restated_encode(codec, first, start, hop)
    assert encode(codec, first, start, hop).tobytes() == payload
    assert decode(codec, np.frombuffer(payload, np.uint8), length).tobytes() == decoded.tobytes()
    onward, _ = restated_encode(codec, decoded + second, start, hop)
    assert reduce(codec, np.frombuffer(payload, np.uint8), second, start, hop).tobytes() == onward


# --- The format ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "unit_bytes"), [(2, 4 + 128), (4, 4 + 256), (8, 4 + 512)])
def test_takes_exactly_its_bits_and_a_norm(bits: int, unit_bytes: int) -> None:
    (region,) = QSGD(bits=bits).regions(512 * 1000, FLOAT32)
    assert (region.unit, region.unit_bytes, region.num_bytes) == (512, unit_bytes, 1000 * unit_bytes)


@reproducible
@given(codec=codecs, length=st.integers(0, 5000))
def test_declares_whole_words_and_fills_all_of_them(codec: QSGD, length: int) -> None:
    (region,) = codec.regions(length, FLOAT32)
    assert region.length == length
    assert region.unit == codec.bucket
    assert region.unit_bytes % 4 == 0
    assert region.tail_bytes % 4 == 0
    rest = length % codec.bucket
    assert 0 <= region.tail_bytes - (4 + rest * codec.bits / 8) < 4 if rest else region.tail_bytes == 0
    payload = np.full(region.num_bytes + 8, 0xAA, np.uint8)
    codec.encode(gaussian(length), 0, payload[4:-4], HOP)
    assert payload[4:-4].tobytes() == encode(codec, gaussian(length)).tobytes()
    assert (payload[:4] == 0xAA).all()
    assert (payload[-4:] == 0xAA).all()


@EVERY_FORMAT
def test_every_part_of_the_key_changes_the_rounding(bits: int, norm: Norm) -> None:
    codec, values = QSGD(bits=bits, norm=norm), gaussian(2048)
    payloads = [
        encode(codec, values),
        encode(replace(codec, seed=1), values),
        encode(replace(codec, call=1), values),
        encode(codec, values, start=512),
        encode(codec, values, hop=HOP._replace(rank=2)),
        encode(codec, values, hop=HOP._replace(step=1)),
    ]
    assert len({payload.tobytes() for payload in payloads}) == len(payloads)


@reproducible
@given(codec=codecs, length=st.integers(0, 3000), cuts=st.sets(st.integers(0, 30)), first_bucket=st.integers(0, 2**33))
def test_chunks_of_any_size_in_any_order_give_the_same_bytes(
    codec: QSGD, length: int, cuts: set[int], first_bucket: int
) -> None:
    values, more, start = gaussian(length), gaussian(length, 1), first_bucket * codec.bucket
    payload = encode(codec, values, start)
    bounds = sorted({0, length, *(cut * codec.bucket for cut in cuts if cut * codec.bucket < length)})
    parts = {}
    for low, high in reversed(list(itertools.pairwise(bounds))):
        own = encode(codec, values[low:high], start + low)
        parts[low] = own.tobytes(), reduce(codec, own, more[low:high], start + low).tobytes()
    assert b"".join(parts[low][0] for low in sorted(parts)) == payload.tobytes()
    assert b"".join(parts[low][1] for low in sorted(parts)) == reduce(codec, payload, more, start).tobytes()


def test_describes_what_ranks_must_agree_on() -> None:
    lines = {
        codec.describe(FLOAT32) for codec in (QSGD(), QSGD(bits=8), QSGD(bucket=256), QSGD(norm="l2"), QSGD(seed=1))
    }
    assert len(lines) == 5
    assert QSGD(call=3).describe(FLOAT32) == QSGD().describe(FLOAT32)
    assert not QSGD.linear
    assert not QSGD.in_place


def test_hyper_parameters_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        QSGD().bits = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 3}, "`bits` must be one of (2, 4, 8), so that codes fill whole bytes, got 3"),
        ({"bucket": 0}, "`bucket` must be in [1, 2^31), got 0"),
        ({"norm": "l1"}, "`norm` must be 'max' or 'l2', got 'l1'"),
        ({"seed": -1}, "`seed` must be in [0, 2^64), as it keys 64-bit hashes, got -1"),
        ({"call": 2**64}, "`call` must be in [0, 2^64)"),
    ],
)
def test_refuses_bad_hyper_parameters(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        QSGD(**arguments)


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32"])
def test_refuses_other_dtypes(dtype: str) -> None:
    with pytest.raises(ValueError, match=f"QSGD quantises float32 vectors, got {dtype}"):
        QSGD().regions(10, np.dtype(dtype))
    with pytest.raises(ValueError, match=f"QSGD quantises float32 vectors, got {dtype}"):
        QSGD().encode(np.zeros(8, dtype), 0, np.zeros(8, np.uint8), HOP)


def test_refuses_a_payload_of_another_size() -> None:
    right, wrong, values = np.zeros(260, np.uint8), np.zeros(256, np.uint8), gaussian(512)
    message = "512 elements take a payload of 260 bytes, got 256"
    with pytest.raises(ValueError, match=message):
        QSGD().encode(values, 0, wrong, HOP)
    with pytest.raises(ValueError, match=message):
        QSGD().reduce(wrong, values, 0, right, HOP)
    with pytest.raises(ValueError, match=message):
        QSGD().decode(wrong, 0, values, 6)


# --- Values that are hard to quantise ------------------------------------------------------------------------------


@EVERY_FORMAT
@pytest.mark.parametrize("length", [0, 1, 511, 513])
def test_zeros_stay_zeros(bits: int, norm: Norm, length: int) -> None:
    codec, zeros = QSGD(bits=bits, norm=norm), np.zeros(length, np.float32)
    payload = encode(codec, -zeros)
    assert not payload.any()
    assert decode(codec, reduce(codec, payload, zeros), length).tobytes() == zeros.tobytes()


@reproducible
@given(
    codec=codecs,
    values=arrays.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False)),
)
def test_any_finite_value_is_rounded_to_a_neighbouring_level(codec: QSGD, values: Array) -> None:
    codec = replace(codec, bucket=64)
    finite = bool(np.isfinite(values).all())
    result = decode(codec, encode(codec, values), len(values))
    if not finite:
        assert np.isnan(result).all()
        return
    norm = float(encode(codec, values)[:4].view(np.float32)[0])
    largest = np.abs(values).max()
    if codec.norm == "max":
        assert norm == largest
        assert (result[np.abs(values) == largest] == values[np.abs(values) == largest]).all()
    else:
        assert largest <= norm <= max(largest * np.sqrt(float(len(values))) * (1 + 1e-6), largest)
    spacing = norm / (2 ** (codec.bits - 1) - 1)
    smallest = float(np.finfo(np.float32).smallest_subnormal)
    assert (np.abs(result.astype(float) - values) <= spacing * (1 + 1e-6) + norm * 2**-21 + smallest / 2).all()
    assert (np.abs(result) <= norm).all()


@pytest.mark.parametrize("scale", [1e-45, 1e-44, 1e-39, 1e-38, 1e38])
def test_norms_whose_inverse_or_square_is_no_float32(scale: float) -> None:
    values = np.tile(np.array([1, -1, 0, 0.5], np.float32) * np.float32(scale), 4096)
    for norm in ("max", "l2"):
        codec = QSGD(bits=8, norm=norm, bucket=16)
        result = decode(codec, encode(codec, values), len(values))
        assert np.mean(result[::4].astype(float)) == pytest.approx(float(values[0]), rel=0.02)
        assert np.mean(result[1::4].astype(float)) == pytest.approx(float(values[1]), rel=0.02)
        assert not result[2::4].any()


@EVERY_FORMAT
def test_constants(bits: int, norm: Norm) -> None:
    values = np.full(2**16, -0.3, np.float32)
    codec = QSGD(bits=bits, norm=norm)
    result = decode(codec, encode(codec, values), len(values))
    if norm == "max":
        assert (result == values).all()
    else:
        spacing = 0.3 * np.sqrt(512) / (2 ** (bits - 1) - 1)
        assert np.mean(result) == pytest.approx(-0.3, abs=5 * spacing / 2 / 256)  # 5 standard errors


@EVERY_FORMAT
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_non_finite_value_makes_its_bucket_nan_to_the_end_of_the_ring(bits: int, norm: Norm, bad: float) -> None:
    codec, good, values = QSGD(bits=bits, norm=norm), gaussian(1200), gaussian(1200, 1)
    values[700] = bad
    for payload in (
        reduce(codec, encode(codec, values), good),
        reduce(codec, encode(codec, good), values),
        reduce(codec, reduce(codec, encode(codec, good), values), good),
    ):
        result = decode(codec, payload, 1200)
        assert np.isnan(result[512:1024]).all()
        assert np.isfinite(result[:512]).all()
        assert np.isfinite(result[1024:]).all()


def test_a_sum_that_overflows_is_nan() -> None:
    values = np.full(512, 3e38, np.float32)
    assert np.isnan(decode(QSGD(), reduce(QSGD(), encode(QSGD(), values), values), 512)).all()


def test_an_l2_norm_beyond_float32_is_the_largest_float32() -> None:
    values = np.full(2**14, 3e38, np.float32)
    result = decode(QSGD(norm="l2"), encode(QSGD(norm="l2"), values), len(values))
    assert np.mean(result.astype(float)) == pytest.approx(3e38, rel=0.01)


# --- Random numbers ------------------------------------------------------------------------------------------------

#: Statistics below are accepted within 99.99 % of their distribution; seeds are fixed, so they pass or fail for good.
CONFIDENCE = 0.9999


def normal_limit(tests: int = 1) -> float:
    """The magnitude that the largest of so many standard normal numbers exceeds at most once in 10,000 times."""
    return NormalDist().inv_cdf(1 - (1 - CONFIDENCE) / (2 * tests))


def chi_squared_z(statistic: float, freedom: int) -> float:
    """A chi-squared statistic as a standard normal one (Wilson and Hilferty 1931)."""
    return float((np.cbrt(statistic / freedom) - 1 + 2 / (9 * freedom)) / np.sqrt(2 / (9 * freedom)))


def uniform_z(bins: Array, num_bins: int) -> float:
    """Standard normal if `bins` are uniform on 0 … num_bins - 1."""
    expected = bins.size / num_bins
    return chi_squared_z(
        float(np.sum((np.bincount(bins.ravel(), minlength=num_bins) - expected) ** 2)) / expected, num_bins - 1
    )


def test_random_numbers_are_uniform() -> None:
    numbers = random24(QSGD(seed=3), HOP, 0, 2**22)
    for shift in (0, 6, 12):
        assert abs(uniform_z((numbers >> shift) & 4095, 4096)) < normal_limit()


def correlation_z(a: Array, b: Array) -> float:
    """Standard normal if a and b are independent and uniform 24-bit integers."""
    return float(np.mean((a - 2.0**23) * (b - 2.0**23)) / (2.0**48 / 12) * np.sqrt(a.size))


def test_neighbours_are_independent() -> None:
    numbers = random24(QSGD(seed=4), HOP, 0, 2**21).reshape(-1, 512)
    lags = [correlation_z(numbers[:, :-lag], numbers[:, lag:]) for lag in range(1, 64)]
    inside = np.arange(512)
    flips = [
        correlation_z(numbers[:, inside < inside ^ d], numbers[:, (inside ^ d)[inside < inside ^ d]])
        for d in (64, 128, 192, 256, 320, 384, 448)
    ]
    buckets = [correlation_z(numbers[:-lag], numbers[lag:]) for lag in (1, 2, 4, 6)]
    z = np.array(lags + flips + buckets)
    assert np.abs(z).max() < normal_limit(len(z))
    assert abs(chi_squared_z(float(np.sum(z**2)), len(z))) < normal_limit()
    pairs = (numbers[:, 0::2] >> 20) * 16 + (numbers[:, 1::2] >> 20)
    assert abs(uniform_z(pairs, 256)) < normal_limit()


def test_streams_of_other_keys_are_independent() -> None:
    base = QSGD(seed=5)
    numbers = random24(base, HOP, 0, 2**18)
    others = [(replace(base, seed=seed), HOP) for seed in (0, 1, 4, 6)]
    others += [(replace(base, call=call), HOP) for call in (1, 2, 3)]
    others += [(base, HOP._replace(rank=rank)) for rank in (0, 2, 3, 4, 5)]
    others += [(base, HOP._replace(step=step)) for step in (0, 1, 3, 4, 5)]
    z = np.array([correlation_z(numbers, random24(codec, hop, 0, 2**18)) for codec, hop in others])
    assert np.abs(z).max() < normal_limit(len(z))


# --- Bias and variance ---------------------------------------------------------------------------------------------


@EVERY_FORMAT
def test_unbiased(bits: int, norm: Norm) -> None:
    """Means over 4000 calls against the exact values: the sum of squared z-scores is chi-squared (99.99 %)."""
    values, calls = gaussian(1024, 6), 4000
    codec = QSGD(bits=bits, norm=norm)
    total = np.zeros(1024)
    for call in range(calls):
        keyed = replace(codec, call=call)
        total += decode(keyed, encode(keyed, values), 1024)
    norms = encode(codec, values).reshape(2, -1)[:, :4].copy().view(np.float32)
    spacing = (norms * np.ones((1, 512)) / (2 ** (bits - 1) - 1)).ravel()
    fraction = values / spacing % 1
    random = np.minimum(fraction, 1 - fraction) > 0.01  # often enough rounded both ways to be normally distributed
    z = (total / calls - values)[random] / (spacing * np.sqrt(fraction * (1 - fraction) / calls))[random]
    assert random.sum() > 500
    assert abs(z.sum()) < normal_limit() * np.sqrt(len(z))
    assert abs(chi_squared_z(float(np.sum(z**2)), len(z))) < normal_limit()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("fraction", [2.0**-16, 2.0**-10, 0.25, 0.5, 1 - 2.0**-10, 1 - 2.0**-16])
def test_rare_roundings_have_their_probability(bits: int, fraction: float) -> None:
    """Coarse thresholds would miss these: counts of 2^22 roundings at each sign, within 99.99 % of the binomial."""
    levels = 2 ** (bits - 1) - 1
    codec = QSGD(bits=bits, seed=bits)
    for sign in (1, -1):
        values = np.full((2**13, 512), sign * fraction, np.float32)
        values[:, 0] = levels
        result = decode(codec, encode(codec, values.ravel()), values.size).reshape(values.shape)[:, 1:]
        away = int(np.count_nonzero(result))
        spread = np.sqrt(result.size * fraction * (1 - fraction))  # 64 expected or more, so close to normal
        assert abs(away - result.size * fraction) < normal_limit() * spread
        assert set(np.unique(np.round(result))) <= {0.0, float(sign)}


@EVERY_FORMAT
def test_variance_of_one_encoding(bits: int, norm: Norm) -> None:
    """Below the bound on gaussian data, and equal to it (1 %) on the worst case that its derivation names."""
    codec, levels = QSGD(bits=bits, norm=norm), 2 ** (bits - 1) - 1
    bound = level_variance(levels, 512, norm)
    values = gaussian(2**20)
    assert relative_error(decode(codec, encode(codec, values), len(values)), values) < bound
    worst = np.ones((2**12, 512), np.float32)
    if norm == "max":
        ratio = levels**2 / 511
        worst *= np.sqrt(ratio**2 + ratio) - ratio
        worst[:, 0] = levels
    measured = relative_error(decode(codec, encode(codec, worst.ravel()), worst.size), worst.ravel())
    if norm == "max" or 4 * levels**2 <= 512:
        assert measured == pytest.approx(bound, rel=0.01)
    else:  # the worst case has all elements halfway between levels, these are not
        assert 0.5 * bound < measured < bound


def ring_variance_bound(one_encoding: float, squared_norms: Sequence[float]) -> float:
    """Bound on E‖r - x‖² / ‖x‖² for the result r of a whole ring of N workers and the true sum x.

    Hop k encodes the partial sum X_k plus the error so far, which has mean 0 and variance V_(k-1):
    V_k ≤ V_(k-1) + Ω(‖X_k‖² + V_(k-1)). The last hop's payload is what everyone decodes: N encodings in all.

    Args:
        one_encoding: Ω, from `level_variance`.
        squared_norms: ‖X_1‖² … ‖X_N‖² of the partial sums, in the order of the ring.
    """
    variance = 0.0
    for squared_norm in squared_norms:
        variance += one_encoding * (squared_norm + variance)
    return variance / squared_norms[-1]


@pytest.mark.parametrize(("norm", "measured"), [("max", 0.13), ("l2", 16.6)])
def test_variance_of_a_whole_ring_of_six(norm: Norm, measured: float) -> None:
    """encode, 5 x reduce, decode on gaussian gradients, with 4 bits in buckets of 512.

    Two bounds. The worst case compounds `level_variance` over the partial sums. Closer: an encoding with the norm m
    has a variance of at most (m/s)²/4 per element, and the errors of different hops are uncorrelated, so their
    variances add; the norms are read from the payloads. `measured` is what this format is known to give.
    """
    codec, size, length = QSGD(norm=norm), 6, 2**20
    exact = np.zeros(length)
    squared_norms, from_norms = [], 0.0
    payload = np.empty(0, np.uint8)
    for step in range(size):
        values, hop = gaussian(length, 100 + step), Hop((step + 3) % size, size, step)
        exact += values
        squared_norms.append(float(np.sum(exact**2)))
        payload = reduce(codec, payload, values, hop=hop) if step else encode(codec, values, hop=hop)
        norms = payload.reshape(-1, 260)[:, :4].copy().view(np.float32)
        from_norms += 512 * float(np.sum((norms / 7.0) ** 2)) / 4
    result = decode(codec, payload, length)
    error = relative_error(result, exact)
    assert error == pytest.approx(measured, rel=0.08)
    assert error < from_norms / squared_norms[-1]
    assert error < ring_variance_bound(level_variance(7, 512, norm), squared_norms)
    # Unbiased through all hops: the error is orthogonal to the exact sum, within 99.99 %.
    assert abs(np.dot(result - exact, exact)) < normal_limit() * np.sqrt(error) * np.sum(exact**2) / np.sqrt(length)


def test_variance_bounds_by_hand() -> None:
    assert level_variance(7, 512, "max") == pytest.approx((np.sqrt(1 + 511 / 49) - 1) / 2)
    assert level_variance(7, 512, "l2") == pytest.approx(np.sqrt(512) / 7 - 1)
    assert level_variance(127, 512, "l2") == pytest.approx(512 / 4 / 127**2)
    assert level_variance(7, 1, "max") == 0
    for levels in (1, 7, 127):  # never looser than the paper's
        for bucket in (1, 64, 512, 8192):
            assert level_variance(levels, bucket, "l2") <= min(bucket / levels**2, np.sqrt(bucket) / levels)
