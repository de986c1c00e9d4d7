"""The papers' inequalities, on random vectors and on those that are made to break them.

Where a bound is on an expectation, the mean of a number of draws has to be below it by 5 standard errors' grace: 3e-7
for a bound that just holds. Whatever has no random numbers is held to its bound itself, within float32's rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiveq.compressors import Compressor, Constants, Draw
from gradiveq.compressors.base import Float32
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.integer import Integer
from gradiveq.compressors.natural import Natural
from gradiveq.compressors.qsgd_gather import QSGDGather
from gradiveq.compressors.sign import Sign
from gradiveq.compressors.terngrad import TernGrad
from gradiveq.compressors.threshold import Threshold
from gradiveq.compressors.topk import TopK
from gradiveq.exchange.parts import Part
from gradiveq.theory import Measured, error_bound, lemma1, measure, noise, squared_norm

reproducible = settings(deadline=None, derandomize=True, max_examples=150)
#: Layers of all kinds of magnitudes; no denormals, of which a relative bound can't hold in float32.
numbers = st.floats(-(2.0**40), 2.0**40, width=32, allow_subnormal=False)
layers = st.lists(st.lists(numbers, min_size=1, max_size=40), min_size=1, max_size=6)
omegas = st.lists(st.floats(0, 1e6), min_size=1, max_size=10)


def flat(values: Sequence[Sequence[float]]) -> Float32:
    return np.concatenate([np.array(layer, np.float32) for layer in values])


def cut(compressors: Sequence[Compressor], lengths: Sequence[int]) -> list[Part]:
    edges = np.cumsum([0, *lengths]).tolist()
    return [
        Part(f"layer{index}", start, stop, compressor)
        for index, ((start, stop), compressor) in enumerate(zip(pairwise(edges), compressors, strict=True))
    ]


def norms(parts: Sequence[Part], values: Float32) -> list[float]:
    return [squared_norm(values[part.start : part.stop]) for part in parts]


def holds(found: np.ndarray, bound: float, norm: float) -> bool:
    error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return bool(found.mean() <= bound + 5 * error + 1e-5 * norm)


# --- Lemma 1 and the noise terms of Dutta et al. 2020


@reproducible
@given(omegas, st.data())
def test_lemma_1_is_sharper_layer_by_layer(factors: list[float], data: st.DataObject) -> None:
    """The second inequality of Eq. 7; an equality if all layers have the same Ω."""
    count = len(factors)
    sizes = data.draw(st.lists(st.floats(0, 1e6), min_size=count, max_size=count))
    found = lemma1([Constants(omega=omega) for omega in factors], sizes)
    assert found.layer_wise == pytest.approx(
        sum((1 + omega) * size for omega, size in zip(factors, sizes, strict=True))
    )
    assert found.entire_model == pytest.approx((1 + max(factors)) * sum(sizes))
    assert found.layer_wise <= found.entire_model * (1 + 1e-12)
    same = lemma1([Constants(omega=factors[0])] * count, sizes)
    assert same.layer_wise == pytest.approx(same.entire_model)


@settings(reproducible, max_examples=50)
@given(layers, st.sampled_from([QSGDGather(4), QSGDGather(2, "max"), TernGrad(), TernGrad(1.5), Natural(), TopK(0.3)]))
def test_lemma_1_bounds_what_is_measured(values: list[list[float]], compressor: Compressor) -> None:
    vector = flat(values)
    parts = cut([compressor] * len(values), [len(layer) for layer in values])
    constants = [compressor.constants(part.length) for part in parts]
    found = measure(parts, vector, times=60)
    bounds = lemma1(constants, norms(parts, vector))
    assert holds(found.second_moments, bounds.layer_wise, found.norm)
    assert bounds.layer_wise <= bounds.entire_model * (1 + 1e-12)


def test_lemma_1_with_an_operator_for_each_layer() -> None:
    """Q = (Q_1 ... Q_L), identity included; Ω_j is each one's own at its layer's length."""
    rng = np.random.default_rng(0)
    lengths = (300, 10, 47, 1, 200)
    vector = np.concatenate([rng.standard_normal(length) * 10.0**-index for index, length in enumerate(lengths)])
    vector = vector.astype(np.float32)
    parts = cut([QSGDGather(1), Identity(), Natural(), TernGrad(), Sign("scaled")], lengths)
    constants = [part.compressor.constants(part.length) for part in parts]
    bounds = lemma1(constants, norms(parts, vector))
    found = measure(parts, vector, times=400)
    assert holds(found.second_moments, bounds.layer_wise, found.norm)
    assert bounds.layer_wise < bounds.entire_model
    # The largest Ω, of the first layer, is the one that counts for the entire model.
    assert bounds.entire_model == pytest.approx((math.sqrt(300) - 1 + 1) * found.norm)


def test_lemma_1_needs_an_omega() -> None:
    with pytest.raises(ValueError, match="layer 1 has no Ω"):
        lemma1([Constants(omega=1.0), Sign("vote").constants(10)], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"shorter|longer"):
        lemma1([Constants(omega=1.0)], [1.0, 1.0])


@reproducible
@given(omegas, st.data())
def test_noise_is_less_layer_by_layer(worker: list[float], data: st.DataObject) -> None:
    """Trace(A) <= L·max_j (end of section 4)."""
    master = data.draw(st.lists(st.floats(0, 1e6), min_size=len(worker), max_size=len(worker)))
    own, other = [Constants(omega=omega) for omega in worker], [Constants(omega=omega) for omega in master]
    found = noise(own, other)
    products = [(1 + first) * (1 + second) for first, second in zip(worker, master, strict=True)]
    assert found.layer_wise == pytest.approx(sum(products))
    assert found.entire_model == pytest.approx(len(worker) * max(products))
    assert found.layer_wise <= found.entire_model * (1 + 1e-12)
    assert noise(own) == noise(own, [Identity().constants(5)] * len(worker))


def test_bidirectional_compression_is_within_the_products() -> None:
    """E‖Q_M(Q_W(x))‖² <= Σ_j (1 + Ω_M^j)(1 + Ω_W^j)‖x^j‖²: the matrix A of Lemma 3, for one worker."""
    rng = np.random.default_rng(0)
    vector = rng.standard_normal(500).astype(np.float32)
    lengths = (100, 400)
    workers, masters = cut([QSGDGather(1)] * 2, lengths), cut([Natural(), TernGrad()], lengths)
    moments = []
    for call in range(400):
        once, twice = np.empty(500, np.float32), np.empty(500, np.float32)
        for index, (worker, master) in enumerate(zip(workers, masters, strict=True)):
            where = slice(worker.start, worker.stop)
            draw, again = Draw(0, call, 0, index), Draw(1, call, 0, index)
            worker.compressor.decompress(worker.compressor.compress(vector[where], draw), once[where], draw)
            master.compressor.decompress(master.compressor.compress(once[where], again), twice[where], again)
        moments.append(squared_norm(twice))
    bound = sum(
        (1 + part.compressor.constants(part.length).omega) * (1 + other.compressor.constants(other.length).omega) * norm
        for part, other, norm in zip(workers, masters, norms(workers, vector), strict=True)
    )
    assert holds(np.array(moments), bound, squared_norm(vector))


# --- Each operator's own bounds


@reproducible
@given(st.lists(numbers, min_size=1, max_size=200), st.integers(1, 200))
def test_top_k_is_a_contraction(values: list[float], count: int) -> None:
    """‖x - C(x)‖² <= (1 - k/d)‖x‖²; and no other k elements leave less."""
    vector = np.array(values, np.float32)
    length, kept = len(values), min(count, len(values))
    found = measure([Part("all", 0, length, TopK(count=count))], vector)
    assert found.num_sent == kept
    assert found.error <= (1 - kept / length) * found.norm * (1 + 1e-6)
    squares = np.sort(vector.astype(np.float64) ** 2)
    assert found.error == pytest.approx(math.fsum(squares[: length - kept]), rel=1e-9)
    assert found.second_moment + found.error == pytest.approx(found.norm)


@pytest.mark.parametrize("length", [1, 10, 1000])
def test_top_k_of_equal_elements_attains_its_bound(length: int) -> None:
    for count in {1, max(1, length // 3), length}:
        found = measure([Part("all", 0, length, TopK(count=count))], np.ones(length, np.float32))
        assert found.relative_error == pytest.approx(1 - count / length)


@reproducible
@given(st.lists(numbers, min_size=1, max_size=200), st.sampled_from([0.0, 1e-3, 1.0, 64.0, 1e6]))
def test_hard_threshold_is_absolute(values: list[float], threshold: float) -> None:
    """‖x - C(x)‖² <= d·λ² whatever x is, and each error is below λ (section 5 of Sahu et al. 2021)."""
    vector = np.array(values, np.float32)
    length, compressor = len(values), Threshold(threshold)
    found = measure([Part("all", 0, length, compressor)], vector)
    assert found.error <= length * float(np.float32(threshold)) ** 2
    assert compressor.constants(length).absolute == pytest.approx(length * threshold**2)


@reproducible
@given(st.integers(1, 300), st.sampled_from([1e-3, 1.0, 100.0]))
def test_hard_threshold_just_below_its_threshold(length: int, threshold: float) -> None:
    """The bound is attained but for a rounding: all that is just too small stays behind."""
    vector = np.full(length, np.nextafter(np.float32(threshold), np.float32(0)))
    found = measure([Part("all", 0, length, Threshold(threshold))], vector)
    assert found.num_sent == 0
    assert found.error == pytest.approx(length * threshold**2, rel=1e-6)


@reproducible
@given(layers, st.sampled_from([1e-3, 1.0, 64.0]))
def test_hard_threshold_is_the_same_at_both_granularities(values: list[list[float]], threshold: float) -> None:
    vector, compressor = flat(values), Threshold(threshold)
    by_layer = measure(cut([compressor] * len(values), [len(layer) for layer in values]), vector)
    entire = measure(cut([compressor], [len(vector)]), vector)
    assert by_layer.num_sent == entire.num_sent
    assert by_layer.error == entire.error


@reproducible
@given(st.lists(st.floats(-31, 31, width=32), min_size=1, max_size=100), st.sampled_from([1.0, 64.0, 2.0**20]))
def test_integer_rounding_is_absolute(values: list[float], scale: float) -> None:
    """d·ε² with ε = 1/(2·scale), of what is within the range."""
    vector = np.array(values, np.float32)
    compressor = Integer(scale)
    found = measure([Part("all", 0, len(values), compressor)], vector)
    absolute = compressor.constants(len(values)).absolute
    assert absolute == len(values) * (0.5 / scale) ** 2
    assert found.error <= absolute + 1e-13 * found.norm


@pytest.mark.parametrize("length", [4, 100, 2500])
def test_unbiased_bounds_are_attained(length: int) -> None:
    """So no smaller Ω would hold: the vectors of the derivations have them, within 5 standard errors and 2 %."""
    equal = np.ones(length, np.float32)
    peak = np.full(length, 1 / (1 + math.sqrt(length)), np.float32)
    peak[0] = 1
    thirds = np.full(length, 4 / 3, np.float32)
    for compressor, vector in ((QSGDGather(1), equal), (TernGrad(), peak), (Natural(), thirds)):
        found = measure([Part("all", 0, length, compressor)], vector, times=3000)
        variance = compressor.constants(length).variance
        assert variance is not None
        error = found.errors.std(ddof=1) / math.sqrt(len(found.errors))
        assert abs(found.error - variance * found.norm) <= 5 * error + 0.02 * variance * found.norm


# --- Granularity


@reproducible
@given(layers, st.data())
def test_entire_model_top_k_is_never_worse(values: list[list[float]], data: st.DataObject) -> None:
    """At equal total k: it has every choice that the layers have, and takes the best."""
    vector, lengths = flat(values), [len(layer) for layer in values]
    counts = [data.draw(st.integers(1, length)) for length in lengths]
    by_layer = measure(cut([TopK(count=count) for count in counts], lengths), vector)
    entire = measure(cut([TopK(count=sum(counts))], [len(vector)]), vector)
    assert by_layer.num_sent == entire.num_sent == sum(counts)
    assert entire.error <= by_layer.error * (1 + 1e-12)


def test_entire_model_top_k_may_leave_a_layer_alone() -> None:
    """Fig. 1 of Dutta et al.: with k = 50 % of the entire model nothing of a layer of small gradients is sent."""
    vector = np.array([9, 8, 7, 6, 0.4, 0.3, 0.2, 0.1], np.float32)
    entire = measure(cut([TopK(0.5)], [8]), vector)
    by_layer = measure(cut([TopK(0.5)] * 2, [4, 4]), vector)
    assert entire.error == pytest.approx(0.16 + 0.09 + 0.04 + 0.01)
    assert by_layer.error == pytest.approx(49 + 36 + 0.04 + 0.01)


@pytest.mark.parametrize("compressor", [TernGrad(), QSGDGather(4)], ids=str)
def test_a_scale_for_each_layer_is_better(compressor: Compressor) -> None:
    """Section 5.3: a norm of the entire model is loose for small layers: by more than 5 standard errors."""
    rng = np.random.default_rng(0)
    lengths = (1000, 1000, 1000)
    vector = np.concatenate([rng.standard_normal(1000) * scale for scale in (1, 0.1, 0.01)]).astype(np.float32)
    by_layer = measure(cut([compressor] * 3, lengths), vector, times=100)
    entire = measure(cut([compressor], [3000]), vector, times=100)
    spread = math.hypot(by_layer.errors.std(ddof=1), entire.errors.std(ddof=1)) / 10
    assert entire.error - by_layer.error > 5 * spread


def test_natural_compression_is_the_same_at_both_granularities() -> None:
    """It knows nothing of other elements: one layer's random numbers aside, the same distribution."""
    vector = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    first = measure(cut([Natural()] * 3, [1000] * 3), vector, times=100)
    second = measure(cut([Natural()], [3000]), vector, times=100)
    spread = math.hypot(first.errors.std(ddof=1), second.errors.std(ddof=1)) / 10
    assert abs(first.error - second.error) <= 5 * spread


# --- The functions themselves


def test_error_bound_takes_the_smaller_of_both_kinds() -> None:
    relative, absolute = Constants(variance=0.5), Constants(absolute=3.0)
    both = Constants(variance=0.5, absolute=3.0)
    assert error_bound([relative, absolute, both, both], [10.0, 10.0, 10.0, 2.0]) == 5 + 3 + 3 + 1
    assert error_bound([relative, Constants()], [1.0, 1.0]) is None
    assert error_bound([], []) == 0


def test_measured_numbers() -> None:
    found = Measured(4.0, np.array([1.0, 3.0]), np.array([2.0, 4.0]), 7)
    assert (found.second_moment, found.error, found.relative_error) == (2.0, 3.0, 0.75)
    assert Measured(0.0, np.zeros(1), np.zeros(1), 0).relative_error == 0


def test_measure_draws_anew_each_time_and_the_same_again() -> None:
    vector = np.random.default_rng(0).standard_normal(100).astype(np.float32)
    vector.flags.writeable = False
    parts = cut([TernGrad(), TernGrad()], [50, 50])
    first, again = measure(parts, vector, times=5), measure(parts, vector, times=5)
    assert (first.errors == again.errors).all()
    assert len(set(first.errors)) == 5
    assert (measure(parts, vector, times=5, seed=1).errors != first.errors).all()
    exact = vector.astype(np.float64)
    out = np.empty(100, np.float32)
    for index, part in enumerate(parts):
        draw = Draw(0, 4, 0, index)
        payload = part.compressor.compress(vector[part.start : part.stop], draw)
        part.compressor.decompress(payload, out[part.start : part.stop], draw)
    assert first.errors[4] == pytest.approx(np.sum((out - exact) ** 2))
    assert first.second_moments[4] == pytest.approx(np.sum(out.astype(np.float64) ** 2))
