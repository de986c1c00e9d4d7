"""Each quantiser against its paper's formula in plain NumPy, and what it puts on the wire, byte by byte.

A stochastic one has no one result. What its formula says of an element is two values and a probability; the tests ask
that there is nothing but these values, and that 3,000 draws have them as often as that: no count may be in a tail of
the binomial distribution of less than 1e-8 on either side. There are fewer than 10,000 counts: a confidence of 99.98 %
that no failure is by chance, and seeds are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from gradiveq.arrays.reductions import largest, standard_deviation, sum_of_magnitudes, sum_of_squares
from gradiveq.compressors import Compressor, Draw
from gradiveq.compressors.base import Array, Float32
from gradiveq.compressors.half import Half
from gradiveq.compressors.integer import Integer
from gradiveq.compressors.natural import Natural
from gradiveq.compressors.qsgd_gather import QSGDGather
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.terngrad import TernGrad

DRAW = Draw(seed=1, call=2, rank=3, part=4)
TIMES = 3000
TAIL = 1e-8

reproducible = settings(deadline=None, derandomize=True, max_examples=100)
finite = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=50)


def gaussian(length: int, seed: int = 0) -> Float32:
    return np.random.default_rng(seed).standard_normal(length, dtype=np.float32)


def estimate(compressor: Compressor, values: Float32, draw: Draw = DRAW) -> Float32:
    out = np.full(len(values), np.nan, np.float32)
    compressor.decompress(compressor.compress(values, draw), out, draw)
    return out


def check_frequencies(compressor: Compressor, values: Float32, lower: Array, upper: Array, probability: Array) -> None:
    """Each element decodes to `upper` with its probability and to `lower` otherwise, and to nothing else.

    The formulas are evaluated in float64, so values are compared within float32's rounding.
    """
    counts = np.zeros(len(values), np.int64)
    tolerance = 1e-6 * np.maximum(abs(lower), abs(upper))
    for call in range(TIMES):
        found = estimate(compressor, values, DRAW._replace(call=call)).astype(np.float64)
        is_upper = abs(found - upper) <= tolerance
        assert (is_upper | (abs(found - lower) <= tolerance)).all()
        counts += is_upper
    probability = np.where(abs(upper - lower) <= tolerance, 1.0, probability)  # a value that is exact
    # Of y in float32, near its ends; a few 2^-24 are invisible in this many draws.
    certain = (probability < 1e-5) | (probability > 1 - 1e-5)
    assert (counts[certain] == np.rint(probability[certain]) * TIMES).all()
    tails = np.minimum(stats.binom.cdf(counts, TIMES, probability), stats.binom.sf(counts - 1, TIMES, probability))
    assert (tails[~certain] > TAIL).all()


# --- QSGD: Alistarh et al. 2017, section 3.1


def qsgd(values: Float32, levels: int, norm: str, bucket: int | None) -> tuple[Array, Array, Array]:
    """‖v‖·sgn(v_i)·ξ_i(v, s), ξ_i = l/s with probability 1 - p, (l + 1)/s with p = s|v_i|/‖v‖ - l."""
    exact = values.astype(np.float64)
    lower, upper, probability = np.empty_like(exact), np.empty_like(exact), np.empty_like(exact)
    for start in range(0, len(values), bucket or len(values)):
        where = slice(start, start + (bucket or len(values)))
        part = exact[where]
        scale = np.linalg.norm(part) if norm == "l2" else abs(part).max()
        y = levels * abs(part) / scale
        level = np.floor(y)
        lower[where] = scale * np.sign(part) * level / levels
        upper[where] = scale * np.sign(part) * (level + 1) / levels
        probability[where] = y - level
    return lower, upper, probability


@pytest.mark.parametrize(
    ("levels", "norm", "bucket"),
    [(256, "l2", None), (1, "l2", None), (7, "max", None), (3, "l2", 16), (1000, "max", 7)],
)
def test_qsgd(levels: int, norm: str, bucket: int | None) -> None:
    values = gaussian(40)
    values[5] = 0
    compressor = QSGDGather(levels, norm, bucket)  # type: ignore[arg-type]
    check_frequencies(compressor, values, *qsgd(values, levels, norm, bucket))


@pytest.mark.parametrize(("levels", "bits"), [(1, 2), (2, 3), (3, 3), (7, 4), (127, 8), (128, 9), (255, 9), (256, 10)])
def test_qsgd_takes_the_bits_that_its_codes_need(levels: int, bits: int) -> None:
    compressor = QSGDGather(levels)
    assert compressor.bits == bits == math.ceil(math.log2(2 * levels + 1))
    for length in (1, 2, 47, 700, 70_000):
        assert compressor.payload_bytes(length) == 4 + math.ceil(length * bits / 8)
        bucketed = QSGDGather(levels, "max", 100)
        assert bucketed.payload_bytes(length) == 4 * math.ceil(length / 100) + math.ceil(length * bits / 8)


def test_qsgd_of_buckets_is_qsgd_of_each() -> None:
    """Norms, levels and the largest element, over more elements than are quantised at a time."""
    length, bucket = 150_001, 1_000
    values = gaussian(length)
    found = estimate(QSGDGather(levels=4, norm="max", bucket=bucket), values)
    for start in range(0, length, bucket):
        part, own = values[start : start + bucket], found[start : start + bucket]
        scale = abs(part).max()
        assert abs(own[abs(part).argmax()]) == scale
        assert (abs(own - part) <= scale / 4 * (1 + 1e-6)).all()
        levels = own / scale * 4
        np.testing.assert_allclose(levels, np.rint(levels), atol=1e-6)


def test_qsgd_with_a_norm_beyond_float32_is_unbiased() -> None:
    """‖x‖ = 7e38: sent as the largest float32, 3.4e38, of which no element is larger."""
    values = np.full(8, 2.5e38, np.float32)
    largest_norm = np.finfo(np.float32).max
    y = 4 * values.astype(np.float64) / largest_norm
    compressor = QSGDGather(levels=4)
    check_frequencies(
        compressor, values, largest_norm * np.floor(y) / 4, largest_norm * (np.floor(y) + 1) / 4, y - np.floor(y)
    )


# --- TernGrad: Wen et al. 2017


@pytest.mark.parametrize("clip", [None, 2.5, 1.0])
def test_terngrad(clip: float | None) -> None:
    """s·sign(g)·b with P(b = 1) = |g|/s and s = max|g| (Eq. 1-3), after clipping at c·σ (section 3.3)."""
    values = gaussian(47)
    values[3], values[7] = 0, 6
    exact = values.astype(np.float64)
    if clip is not None:
        cut = clip * exact.std()
        exact = np.where(abs(exact) <= cut, exact, np.sign(exact) * cut)
    scale = abs(exact).max()
    assert (scale < 6) == (clip is not None)
    check_frequencies(TernGrad(clip), values, np.zeros(47), np.sign(exact) * scale, abs(exact) / scale)


@pytest.mark.parametrize("length", [1, 4, 5, 6, 701])
def test_terngrad_sends_five_trits_a_byte(length: int) -> None:
    values = gaussian(length)
    payload = TernGrad().compress(values, DRAW)
    assert len(payload) == 4 + math.ceil(length / 5)
    (scale,) = payload[:4].view(np.float32)
    assert scale == abs(values).max()
    trits = payload[4:].astype(int)
    assert trits.max() <= 242
    digits = np.concatenate([trits // 3**k % 3 for k in range(5)])
    assert (digits[length:] == 0).all()
    assert (estimate(TernGrad(), values) == scale * (digits[:length] - 1)).all()


def test_terngrad_decodes_every_byte() -> None:
    payload = np.concatenate([np.array([2], np.float32).view(np.uint8), np.arange(243, dtype=np.uint8)])
    out = np.empty(5 * 243, np.float32)
    TernGrad().decompress(payload, out, DRAW)
    for k in range(5):
        assert (out[k * 243 : (k + 1) * 243] == 2.0 * (np.arange(243) // 3**k % 3 - 1)).all()


def test_terngrad_leaves_equal_elements_unclipped() -> None:
    """Their σ is 0, at which nothing would ever be sent; also of a vector of one element."""
    for value in (0.1, -3e38, 1e-44):
        for length in (1, 2, 1001):
            values = np.full(length, value, np.float32)
            assert (estimate(TernGrad(clip=2.5), values) == values).all()


# --- signSGD: Bernstein et al. 2018, and EF-signSGD: Karimireddy et al. 2019


def plain_sign(values: Float32) -> Float32:
    """sign with sign(0) = 1, as a bit has no third value."""
    return np.where(values < 0, -1, 1).astype(np.float32)


@reproducible
@given(finite)
def test_sign(numbers: list[float]) -> None:
    values = np.array([0.0, -0.0, *numbers], np.float32)
    for rule in ("vote", "mean"):
        compressor = Sign(rule)  # type: ignore[arg-type]
        assert (estimate(compressor, values) == plain_sign(values)).all()
        payload = compressor.compress(values, DRAW)
        assert len(payload) == math.ceil(len(values) / 8)
        assert (np.unpackbits(payload, bitorder="little", count=len(values)) == (values < 0)).all()
    scale = np.float32(np.linalg.norm(values.astype(np.float64), 1) / len(values))
    np.testing.assert_allclose(estimate(Sign("scaled"), values), scale * plain_sign(values), rtol=1e-6)
    assert Sign("scaled").payload_bytes(len(values)) == 4 + math.ceil(len(values) / 8)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_majority_vote(size: int) -> None:
    """sign(Σ sign(g)); a tie of an even number is 0."""
    gradients = [gaussian(100, seed) for seed in range(size)]
    votes = np.sum([estimate(Sign(), gradient) for gradient in gradients], axis=0)
    total = votes.astype(np.float32)
    Sign().finish(total, size)
    assert (total == np.sign(np.sum([plain_sign(gradient) for gradient in gradients], axis=0))).all()
    assert (size % 2 == 0) == (0 in total)
    mean = votes.astype(np.float32)
    Sign("mean").finish(mean, size)
    np.testing.assert_allclose(mean, np.mean([plain_sign(gradient) for gradient in gradients], axis=0), rtol=1e-6)


# --- Natural compression: Horváth et al. 2019, Eq. 2


def test_natural() -> None:
    """sign(t)·2^floor(log2|t|) or sign(t)·2^ceil(log2|t|), the latter with probability |t|/2^floor(log2|t|) - 1."""
    values = np.concatenate([gaussian(30), gaussian(10) * np.float32(1e-30), gaussian(10) * np.float32(1e37)])
    values[:4] = 0, 1, -0.25, 2**-126
    exact = values.astype(np.float64)
    power = np.where(exact == 0, 0, 2.0 ** np.floor(np.log2(np.where(exact == 0, 1, abs(exact)))))
    probability = np.divide(abs(exact), power, out=np.ones(50), where=power > 0) - 1
    check_frequencies(Natural(), values, np.sign(exact) * power, 2 * np.sign(exact) * power, probability)


def test_natural_of_denormals_is_unbiased() -> None:
    """0 or the smallest normal number."""
    smallest = 2.0**-126
    values = (smallest * np.array([0.25, -0.5, 0.999, -0.001])).astype(np.float32)
    signs = np.sign(values.astype(np.float64))
    check_frequencies(Natural(), values, 0 * signs, signs * smallest, abs(values.astype(np.float64)) / smallest)


def test_natural_at_the_end_of_float32() -> None:
    values = np.array([3e38, -3e38, 2.0**127, np.inf, -np.inf], np.float32)
    for call in range(20):
        found = estimate(Natural(), values, DRAW._replace(call=call))
        assert found.tolist() == [2.0**127, -(2.0**127), 2.0**127, math.inf, -math.inf]


@pytest.mark.parametrize("length", [1, 8, 9, 701])
def test_natural_takes_nine_bits(length: int) -> None:
    values = gaussian(length)
    payload = Natural().compress(values, DRAW)
    assert len(payload) == math.ceil(length * 9 / 8)
    powers = np.ldexp(np.float32(1), payload[:length].astype(int) - 127)
    signs = np.unpackbits(payload[length:], bitorder="little", count=length)
    assert (estimate(Natural(), values) == np.where(signs, -powers, powers)).all()


# --- Scaled integers: Sapio et al. 2019


@reproducible
@given(finite, st.sampled_from((8, 16, 32)), st.sampled_from((0.3, 1.0, 100.0, 2.0**20)), st.integers(1, 100))
def test_integer_nearest(numbers: list[float], bits: int, scale: float, workers: int) -> None:
    """round(f·x), cut so that a sum of `workers` fits, then divided by f."""
    values = np.array(numbers, np.float32)
    compressor = Integer(scale, bits, workers=workers)
    most = (2 ** (bits - 1) - 1) // workers
    steps = np.clip(values.astype(np.float64) * scale, -most, most)
    payload = compressor.compress(values, DRAW)
    assert payload.dtype == f"int{bits}"
    assert (abs(payload - steps) <= 0.5).all()
    np.testing.assert_allclose(estimate(compressor, values), payload / scale, rtol=1e-6)
    total = payload.copy()
    for _ in range(workers - 1):
        total += payload
    assert (total == payload.astype(np.int64) * workers).all()
    out = np.empty(len(values), np.float32)
    compressor.decompress(total, out, DRAW, workers)
    np.testing.assert_allclose(out, payload / scale * workers, rtol=1e-6)
    with pytest.raises(ValueError, match=f"`workers` must be at least {workers + 1}"):
        compressor.decompress(total, out, DRAW, workers + 1)
    inside = abs(values) <= compressor.limit
    slack = 1e-6 * abs(values)
    assert (abs(estimate(compressor, values) - values) <= 0.5 / scale + slack)[inside].all()


def test_integer_rounds_at_the_middle() -> None:
    middles = np.arange(-1000, 1000, dtype=np.float32) + np.float32(0.5)
    below, above = np.nextafter(middles, np.float32(-np.inf)), np.nextafter(middles, np.float32(np.inf))
    compressor = Integer(1.0, 32)
    assert (compressor.compress(below, DRAW) == np.floor(middles)).all()
    assert (compressor.compress(above, DRAW) == np.ceil(middles)).all()


def test_integer_stochastic() -> None:
    values = 10 * gaussian(40)
    steps = values.astype(np.float64) * 3
    lower = np.floor(steps)
    compressor = Integer(3.0, 16, "stochastic", workers=4)
    check_frequencies(compressor, values, lower / 3, (lower + 1) / 3, steps - lower)


# --- Half precision


def reference_half(values: Float32, dtype: str, limit: float) -> Float32:
    """NumPy's and ml_dtypes's own conversions."""
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    return np.clip(values, -limit, limit).astype(kind).astype(np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_rounds_as_numpy_does(dtype: str) -> None:
    """Every number of the type, the middles between neighbours, their neighbours, and any bits."""
    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    every = np.arange(2**16, dtype=np.uint16).view(kind).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    middles = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    patterns = np.random.default_rng(0).integers(0, 2**32, 200_000).astype(np.uint32).view(np.float32)
    values = np.concatenate(
        [every, middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(np.inf)), patterns]
    )
    values = values[np.isfinite(values)]
    for workers in (1, 64):
        compressor = Half(dtype, workers)  # type: ignore[arg-type]
        expected = reference_half(values, dtype, compressor.limit)
        assert (estimate(compressor, values).view(np.uint32) == expected.view(np.uint32)).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("workers", [1, 2, 3, 50, 64, 1000])
def test_half_sums_of_the_largest_fit(dtype: str, workers: int) -> None:
    compressor = Half(dtype, workers)  # type: ignore[arg-type]
    values = np.array([3e38, -3e38, compressor.limit], np.float32)
    payload = compressor.compress(values, DRAW)
    total = payload.copy()
    for _ in range(workers - 1):
        total += payload
    assert np.isfinite(total.astype(np.float32)).all()
    # no more room is given away than the rounding of the additions may take
    bits = 11 if dtype == "float16" else 8
    room = workers * compressor.limit * (1 + 2.0**-bits) ** workers
    top = float(ml_dtypes.finfo(payload.dtype).max)
    assert top / (1 + 2.0 ** (2 - bits)) <= room <= top
    with pytest.raises(ValueError, match=f"`workers` must be at least {workers + 1}"):
        compressor.decompress(total, np.empty(3, np.float32), DRAW, workers + 1)


def test_half_shows_what_is_not_a_number() -> None:
    for dtype in ("float16", "bfloat16"):
        found = estimate(Half(dtype), np.array([np.nan, 1], np.float32))  # type: ignore[arg-type]
        assert np.isnan(found[0])
        assert found[1] == 1


# --- What they share


STOCHASTIC = [QSGDGather(200), QSGDGather(3, "max"), TernGrad(), Natural(), Integer(3.0, 16, "stochastic")]


@pytest.mark.parametrize("compressor", STOCHASTIC, ids=str)
@pytest.mark.parametrize(
    "other", [DRAW._replace(seed=0), DRAW._replace(call=3), DRAW._replace(rank=2), DRAW._replace(part=5)], ids=str
)
def test_errors_of_two_draws_are_uncorrelated(compressor: Compressor, other: Draw) -> None:
    """So they average out over workers and calls; and those of elements some way apart: 5 standard errors each."""
    # Of one sign and size, as otherwise equal random numbers would round to errors of either sign.
    values = np.random.default_rng(0).uniform(0.2, 0.3, 200_000).astype(np.float32)
    error, another = (estimate(compressor, values, draw).astype(np.float64) - values for draw in (DRAW, other))
    for products in (error * another, *(error[lag:] * error[:-lag] for lag in (1, 192, 2**16))):
        assert abs(products.mean()) <= 5 * products.std() / math.sqrt(len(products))


@pytest.mark.parametrize("compressor", STOCHASTIC, ids=str)
@pytest.mark.parametrize("length", [47, 700])
def test_errors_of_elements_are_independent(compressor: Compressor, length: int) -> None:
    """The sum of n errors has n times the variance of one: no two elements share a random number, wherever they are.

    A variance of 1,000 draws has a standard error of sqrt(2/1000) of itself; 5 of them are allowed, and it would be 2
    to 5 times as large if pairs, or all elements of a byte, had the same number.
    """
    values = np.full(length, 0.3, np.float32)
    values[0] = 1
    errors = np.array([estimate(compressor, values, DRAW._replace(call=call)) for call in range(1000)], np.float64)
    assert errors.sum(axis=1).var() == pytest.approx(errors.var(axis=0).sum(), rel=5 * math.sqrt(2 / 1000))


@reproducible
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=100), st.integers(0, 3))
def test_reductions(numbers: list[float], times: int) -> None:
    values = np.tile(np.array(numbers, np.float32), times)
    exact = values.astype(np.float64)
    assert largest(values) == abs(values).max(initial=0)
    assert sum_of_squares(values) == pytest.approx(math.fsum(exact**2), rel=1e-12)
    assert sum_of_magnitudes(values) == pytest.approx(math.fsum(abs(exact)), rel=1e-12)
    deviation = exact.std() if len(exact) else 0
    assert standard_deviation(values) == pytest.approx(deviation, rel=1e-6, abs=1e-7 * float(abs(exact).max(initial=0)))


def test_the_largest_of_what_is_not_finite() -> None:
    assert largest(np.array([1, -np.inf], np.float32)) == np.inf
    assert np.isnan(largest(np.array([1, -np.inf, np.nan, 3], np.float32)))


def test_a_vector_that_is_not_finite_does_not_become_finite() -> None:
    for bad in (np.inf, np.nan):
        values = gaussian(600)
        values[300] = bad
        assert np.isnan(estimate(QSGDGather(), values)).all()
        assert np.isnan(estimate(QSGDGather(bucket=100), values)[300:400]).all()
        assert not np.isfinite(estimate(Natural(), values)[300])


REFUSED: list[tuple[Callable[[], Compressor], str]] = [
    (lambda: QSGDGather(0), "`levels` must be in 1 ... 65536, .* got 0"),
    (lambda: QSGDGather(65537), "`levels` must be in 1 ... 65536, .* got 65537"),
    (lambda: QSGDGather(norm="l1"), "`norm` must be 'max' or 'l2', got 'l1'"),  # type: ignore[arg-type]
    (lambda: QSGDGather(bucket=0), "`bucket` must be at least 1, got 0"),
    (lambda: TernGrad(0.0), "`clip` must be positive, .* got 0.0"),
    (lambda: TernGrad(math.nan), "`clip` must be positive, .* got nan"),
    (lambda: Sign("majority"), "`rule` must be one of vote, mean, scaled, got 'majority'"),  # type: ignore[arg-type]
    (lambda: Integer(0.0), "`scale` must be positive and finite, got 0.0"),
    (lambda: Integer(math.inf), "`scale` must be positive and finite, got inf"),
    (lambda: Integer(bits=4), "`bits` must be one of 8, 16, 32, got 4"),
    (lambda: Integer(rounding="down"), "`rounding` must be 'nearest' or 'stochastic', got 'down'"),  # type: ignore[arg-type]
    (lambda: Integer(bits=8, workers=128), "`workers` must be in 1 ... 127, .* got 128"),
    (lambda: Half("float8"), "`dtype` must be one of float16, bfloat16, got 'float8'"),  # type: ignore[arg-type]
    (lambda: Half(workers=0), "`workers` must be in 1 ... 1024, .* got 0"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_what_is_refused(make: Callable[[], Compressor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
