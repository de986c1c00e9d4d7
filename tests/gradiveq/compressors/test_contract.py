"""What `gradiveq.compressors.base.Compressor` promises of every compressor of the registry, in one place.

A compressor that is registered without a setting here fails `test_every_compressor_is_here`. What each one computes is
tested beside it (test_quantisers, test_sparsifiers); here only what all have in common, at both granularities:
`gradiveq.exchange.compressed.Compression` applies it to each of several parts, empty ones included, and to the vector as a whole.

Where a claim is about an expectation, a test compares the mean of many draws with it and fails where it is Z standard
errors beyond. That has a probability of 3e-7 if the claim just holds (means of 100 draws and more of sums over the
elements are close to normal), and there are fewer than 1,000 such comparisons: a confidence of 99.9 % that no failure
is by chance. Seeds are fixed, so chance has one go at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, dataclass, field, fields
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradiveq.compressors import COMPRESSORS, Compressor, Constants, Draw
from gradiveq.compressors.base import Array, Float32
from gradiveq.compressors.identity import Identity
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.message import LENGTH_BYTES
from gradiveq.exchange.parts import Part
from gradiveq.theory import error_bound, lemma1, measure, squared_norm
from tests.support.workers_here import WorkersHere

SIZE = 3
LENGTHS = (0, 1, 2, 47, 700)
DRAW = Draw(seed=7, call=3, rank=1, part=2)
#: Standard errors beyond which a mean isn't what is claimed.
Z = 5.0
#: Of float32 arithmetic over a vector, relative to its squared norm.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Setting:
    """Fields of a compressor, and what the tests must know of it beside what it says of itself.

    Attributes:
        random: other draws give other payloads or estimates.
        shared: ... but not other ranks' (random k).
        keeps_zero: a vector of zeros decodes to zeros.
        largest: magnitude up to which the constants hold, and a sum of SIZE can't overflow.
        tolerance: of the sum of payloads, relative to the sum of the magnitudes.
    """

    fields: dict[str, Any] = field(default_factory=dict)
    random: bool = False
    shared: bool = False
    keeps_zero: bool = True
    largest: float = 1e38
    tolerance: float = 0.0


SETTINGS: dict[str, tuple[Setting, ...]] = {
    "identity": (Setting(),),
    "topk": (Setting({"ratio": 0.01}), Setting({"ratio": 0.4}), Setting({"count": 3})),
    "randomk": (
        Setting({"ratio": 0.05}, random=True, shared=True),
        Setting({"ratio": 0.6}, random=True, shared=True),
        Setting({"ratio": 0.1, "unbiased": True}, random=True, shared=True, largest=1e37),
    ),
    "threshold": (Setting({"value": 0.5}), Setting({"value": 1e-3}), Setting({"value": 0.0})),
    "adaptive": (Setting(), Setting({"multiple": 8.0})),
    "adacomp": (Setting({"bin_size": 20}), Setting({"bin_size": 500})),
    "qsgd-gather": (
        Setting(random=True),
        Setting({"levels": 7, "norm": "max", "bucket": 64}, random=True),
        Setting({"levels": 1, "bucket": 100}, random=True),
        Setting({"levels": 65536, "norm": "max"}, random=True),
    ),
    "terngrad": (Setting(random=True), Setting({"clip": 2.5}, random=True)),
    "sign": (
        Setting(keeps_zero=False),
        Setting({"rule": "mean"}, keeps_zero=False),
        Setting({"rule": "scaled"}),
    ),
    "natural": (Setting(random=True, largest=1.7e38),),
    "integer": (
        Setting(largest=31.9, tolerance=1e-6),
        Setting({"scale": 100.0, "bits": 16, "workers": 3}, largest=109.0, tolerance=1e-6),
        Setting({"scale": 2.0, "bits": 8, "workers": 3}, largest=21.0, tolerance=1e-6),
        Setting(
            {"scale": 100.0, "bits": 16, "rounding": "stochastic", "workers": 3},
            random=True,
            largest=109.0,
            tolerance=1e-6,
        ),
    ),
    "half": (
        Setting(largest=990.0, tolerance=3 * 2.0**-11),
        Setting({"dtype": "bfloat16"}, largest=4e36, tolerance=3 * 2.0**-8),
    ),
}


@dataclass(frozen=True)
class Subject(Setting):
    """A compressor of the registry, made with one of its settings."""

    compressor: Compressor = field(default_factory=Identity)

    def __str__(self) -> str:
        return "-".join([self.compressor.name, *(f"{name}={value}" for name, value in self.fields.items())])

    def compress(self, values: Float32, draw: Draw = DRAW) -> Array:
        return self.compressor.compress(values, draw, values if self.compressor.uses_latest else None)

    def estimate(self, values: Float32, draw: Draw = DRAW) -> Float32:
        """C(x)"""
        out = np.full(len(values), np.nan, np.float32)
        self.compressor.decompress(self.compress(values, draw), out, draw)
        return out


def subjects() -> Iterator[Subject]:
    for name, compressor in COMPRESSORS.items():
        for setting in SETTINGS.get(name, ()):
            values = {each.name: getattr(setting, each.name) for each in fields(Setting)}
            yield Subject(**values, compressor=compressor(**setting.fields))


SUBJECTS = tuple(subjects())
every = pytest.mark.parametrize("subject", SUBJECTS, ids=str)
gathered = pytest.mark.parametrize(
    "subject", [subject for subject in SUBJECTS if subject.compressor.collective == "all_gather"], ids=str
)
reduced = pytest.mark.parametrize(
    "subject", [subject for subject in SUBJECTS if subject.compressor.collective == "all_reduce"], ids=str
)


def vector(length: int, seed: int = 0) -> Float32:
    """Normal numbers, some of them zero; not writable."""
    rng = np.random.default_rng([seed, length])
    values = rng.standard_normal(length).astype(np.float32)
    values[rng.random(length) < 0.1] = 0
    return frozen(values)


def frozen(values: Float32) -> Float32:
    values.flags.writeable = False
    return values


def adversarial(length: int) -> dict[str, Float32]:
    """Vectors that are the worst case of one compressor or another, of magnitudes around 1."""
    rng = np.random.default_rng(length)
    signs = rng.choice(np.array([-1, 1], np.float32), length)
    peak = np.full(length, 1 / (1 + math.sqrt(length)), np.float32)
    peak[length // 2] = 1
    thousandth = np.zeros(length, np.float32)
    thousandth[length // 3] = 1e-3
    return {
        "normal": rng.standard_normal(length).astype(np.float32),
        "heavy": np.clip(rng.standard_t(2, length), -20, 20).astype(np.float32),
        "sparse": (rng.standard_normal(length) * (rng.random(length) < 0.05)).astype(np.float32),
        "equal": signs,
        "just above a power of two": signs * np.float32(4 / 3),
        "between two of bfloat16": signs * np.float32(1 + 2**-8),
        "peak": peak * signs,
        "one": thousandth,
        "geometric": signs * (0.9 ** np.arange(length)).astype(np.float32),
        "small": signs * np.float32(0.01),
        "below half": np.full(length, 0.499, np.float32),
        "above half": np.full(length, 0.501, np.float32),
    }


def bits(values: Float32) -> Array:
    return values.view(np.uint32)


def test_every_compressor_is_here() -> None:
    assert set(SETTINGS) == set(COMPRESSORS)
    for name, compressor in COMPRESSORS.items():
        assert compressor.name == name


@every
def test_it_is_frozen_and_hashable(subject: Subject) -> None:
    compressor = subject.compressor
    assert type(compressor)(**subject.fields) == compressor
    assert len({compressor, type(compressor)(**subject.fields)}) == 1
    with pytest.raises((FrozenInstanceError, AttributeError)):
        compressor.name = "another"  # type: ignore[misc]


@every
@pytest.mark.parametrize("length", LENGTHS)
def test_payload_and_estimate(subject: Subject, length: int) -> None:
    compressor, values = subject.compressor, vector(length)
    before = values.copy()
    payload = subject.compress(values)
    assert payload.ndim == 1
    assert not np.shares_memory(payload, values)
    if compressor.collective == "all_gather":
        assert payload.dtype == np.uint8
    if compressor.fixed_size:
        assert payload.nbytes == compressor.payload_bytes(length)
    else:
        assert payload.nbytes <= compressor.payload_bytes(length)
    assert 0 <= compressor.num_sent(payload, length) <= length
    sent = payload.copy()
    payload.flags.writeable = False
    out = np.full(length, np.nan, np.float32)
    compressor.decompress(payload, out, DRAW)
    assert np.isfinite(out).all()
    assert payload.tobytes() == sent.tobytes()
    assert values.tobytes() == before.tobytes()


@every
def test_a_stretch_of_a_vector_is_like_a_vector(subject: Subject) -> None:
    whole = vector(700)
    out = np.full(700, np.nan, np.float32)
    subject.compressor.decompress(subject.compress(whole[13:200]), out[13:200], DRAW)
    assert (bits(out[13:200]) == bits(subject.estimate(whole[13:200].copy()))).all()
    assert np.isnan(out[:13]).all()
    assert np.isnan(out[200:]).all()


@every
def test_a_draw_decides_all_random_numbers(subject: Subject) -> None:
    """Whatever was drawn before, here or from NumPy's global generator, which nothing touches."""
    values = vector(700)
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].tobytes()  # noqa: NPY002
    first = subject.compress(values)
    assert np.random.get_state()[1].tobytes() == before  # noqa: NPY002
    np.random.seed(2)  # noqa: NPY002
    subject.compress(vector(47, seed=1), DRAW._replace(call=9))
    assert subject.compress(values).tobytes() == first.tobytes()


@every
def test_another_draw_has_other_random_numbers(subject: Subject) -> None:
    values = vector(700)
    estimates = {
        name: subject.estimate(values, draw).tobytes()
        for name, draw in {
            "this": DRAW,
            "seed": DRAW._replace(seed=8),
            "call": DRAW._replace(call=4),
            "part": DRAW._replace(part=0),
            "rank": DRAW._replace(rank=0),
        }.items()
    }
    if not subject.random:
        assert len(set(estimates.values())) == 1
    elif subject.shared:
        assert estimates.pop("rank") == estimates["this"]
        assert len(set(estimates.values())) == 4
    else:
        assert len(set(estimates.values())) == 5


@every
@pytest.mark.parametrize("length", LENGTHS)
def test_zeros(subject: Subject, length: int) -> None:
    estimate = subject.estimate(frozen(np.zeros(length, np.float32)))
    if subject.keeps_zero:
        assert (estimate == 0).all()
    else:
        assert np.isfinite(estimate).all()


@every
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_denormals(subject: Subject, length: int) -> None:
    """What is left of them is small (but of a sign's)."""
    for smallest in (1e-45, 1e-40):
        values = frozen(np.where(np.arange(length) % 2, smallest, -3 * smallest).astype(np.float32))
        estimate = subject.estimate(values)
        if subject.keeps_zero:
            # natural: the smallest normal number, 1.2e-38; stochastic rounding: a step
            assert (abs(estimate) <= max(1.2e-38, 1 / subject.fields.get("scale", math.inf))).all()
        else:
            assert np.isfinite(estimate).all()


@every
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_huge_values(subject: Subject, length: int) -> None:
    """Nothing overflows, though a norm may; what is beyond a range is cut."""
    ordinary = vector(length)
    beyond = [min(3e38, 3 * subject.largest)] + [3e38] * (subject.largest < 1e30)
    for huge in (subject.largest, *beyond):
        mixed = ordinary.copy()
        mixed[0] = -huge
        for values in (np.full(length, huge, np.float32), mixed):
            estimate = subject.estimate(frozen(values))
            assert np.isfinite(estimate).all()
            # as many times larger as an unbiased random k takes
            assert (abs(estimate) <= 10.001 * np.float64(huge)).all()
            large = abs(values) > 0.9 * huge
            assert (np.sign(estimate) * np.sign(values) >= 0)[large].all()


@every
@settings(max_examples=60, deadline=None, derandomize=True)
@given(values=st.lists(st.floats(-(2.0**120), 2.0**120, width=32), max_size=40), call=st.integers(0, 2**40))
def test_any_finite_vector(subject: Subject, values: list[float], call: int) -> None:
    array = frozen(np.array(values, np.float32))
    draw = DRAW._replace(call=call)
    payload = subject.compress(array, draw)
    assert payload.nbytes <= subject.compressor.payload_bytes(len(array))
    out = np.full(len(array), np.nan, np.float32)
    subject.compressor.decompress(payload, out, draw)
    assert np.isfinite(out).all()
    if subject.compressor.copies:
        assert ((bits(out) == bits(array)) | (out == 0)).all()


@every
@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_decoded_and_the_error_are_the_original(subject: Subject, length: int) -> None:
    values = vector(length)
    estimate = subject.estimate(values)
    error = values - estimate
    if subject.compressor.copies:
        assert (bits(estimate + error) == bits(values)).all()
        assert ((bits(estimate) == bits(values)) | (estimate == 0)).all()
    else:
        np.testing.assert_allclose(estimate + error, values, rtol=0, atol=2e-7 * max(1, abs(estimate).max(initial=0)))


@gathered
@pytest.mark.parametrize("length", LENGTHS)
def test_a_payload_may_be_any_slice_of_a_message(subject: Subject, length: int) -> None:
    values = vector(length)
    payload = subject.compress(values)
    expected = subject.estimate(values)
    for offset in (1, 2, 3, 5):
        message = np.full(offset + len(payload) + 7, 0xA5, np.uint8)
        message[offset : offset + len(payload)] = payload
        out = np.full(length, np.nan, np.float32)
        subject.compressor.decompress(message[offset : offset + len(payload)], out, DRAW)
        assert (bits(out) == bits(expected)).all()


@gathered
@pytest.mark.parametrize("length", LENGTHS)
def test_adding_is_decoding_and_adding(subject: Subject, length: int) -> None:
    values = vector(length)
    payload = subject.compress(values)
    total = 0.5 + vector(length, seed=5)
    expected = total + subject.estimate(values)
    subject.compressor.add_to(payload, total, DRAW, np.full(length, np.nan, np.float32))
    assert (bits(total) == bits(expected)).all()


@every
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_a_payload_of_another_length_is_refused(subject: Subject, length: int) -> None:
    payload = subject.compress(vector(length))
    cut = [payload[:-1], payload[:0], np.concatenate([payload, payload[:1]])]
    for wrong in cut:
        with pytest.raises(ValueError, match=r".+"):
            subject.compressor.decompress(wrong, np.empty(length, np.float32), DRAW)


@reduced
@pytest.mark.parametrize("length", LENGTHS)
def test_sums_of_payloads_decode_to_sums(subject: Subject, length: int) -> None:
    values = [vector(length, seed=rank) for rank in range(SIZE)]
    draws = [DRAW._replace(rank=rank) for rank in range(SIZE)]
    payloads = [subject.compress(each, draw) for each, draw in zip(values, draws, strict=True)]
    assert len({(payload.dtype, payload.shape) for payload in payloads}) == 1
    total, expected = payloads[0].copy(), subject.estimate(values[0], draws[0])
    for payload, each, draw in zip(payloads[1:], values[1:], draws[1:], strict=True):
        total += payload
        expected += subject.estimate(each, draw)
    assert total.dtype == payloads[0].dtype
    for draw in draws:
        out = np.full(length, np.nan, np.float32)
        subject.compressor.decompress(total, out, draw, SIZE)
        magnitudes = np.sum([abs(each) for each in values], axis=0)
        assert (abs(out - expected) <= subject.tolerance * (magnitudes + abs(expected))).all()


UNBIASED = [subject for subject in SUBJECTS if not subject.compressor.biased]


@pytest.mark.parametrize("subject", UNBIASED, ids=str)
@pytest.mark.parametrize("length", [47, 700])
@pytest.mark.parametrize("kind", ["normal", "heavy", "peak"])
def test_unbiased(subject: Subject, length: int, kind: str) -> None:
    """The mean error along eight directions is 0; with 400 draws, a bias of a few percent of an element's spread fails.

    Along the vector and its signs a bias that shrinks or stretches adds up, along random signs any other.
    """
    values = adversarial(length)[kind]
    rng = np.random.default_rng(1)
    directions = np.array(
        [values, np.sign(values), np.ones(length), *(rng.choice([-1.0, 1.0], length) for _ in range(5))], np.float64
    )
    exact = values.astype(np.float64)
    calls = range(400 if subject.random else 1)
    errors = np.array([subject.estimate(values, DRAW._replace(call=call)) - exact for call in calls])
    along = errors @ directions.T
    rounding = 1e-6 * abs(directions) @ abs(exact)
    if subject.random:
        standard_error = along.std(axis=0, ddof=1) / math.sqrt(len(along))
        assert (abs(along.mean(axis=0)) <= Z * standard_error + rounding).all()
    else:
        assert (abs(along) <= rounding).all()


def holds(found: Float32 | Array, bound: float, norm: float) -> bool:
    """Whether numbers that were found may have a mean of at most `bound`."""
    standard_error = found.std(ddof=1) / math.sqrt(len(found)) if len(found) > 1 else 0.0
    return bool(found.mean() <= bound + Z * standard_error + ROUNDING * norm)


@every
@pytest.mark.parametrize("length", [1, 2, 47, 700])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_constants_hold(subject: Subject, length: int, scale: float) -> None:
    """Each bound of `Constants`, for the worst vectors that we know; without random numbers for sure."""
    constants = subject.compressor.constants(length)
    for kind, values in adversarial(length).items():
        scaled = values * np.float32(scale)
        found = measure([Part("all", 0, length, subject.compressor)], scaled, 100 if subject.random else 1)
        norm = found.norm
        if constants.omega is not None:
            assert holds(found.second_moments, (1 + constants.omega) * norm, norm), kind
        if constants.delta is not None:
            assert holds(found.errors, (1 - constants.delta) * norm, norm), kind
        if constants.variance is not None:
            assert holds(found.errors, constants.variance * norm, norm), kind
        if constants.absolute is not None:
            assert holds(found.errors, constants.absolute, norm), kind


@every
@pytest.mark.parametrize("length", LENGTHS)
def test_constants_agree_with_each_other(subject: Subject, length: int) -> None:
    constants = subject.compressor.constants(length)
    assert isinstance(constants, Constants)
    for bound in (constants.omega, constants.variance, constants.absolute):
        assert bound is None or 0 <= bound < math.inf
    if constants.delta is not None:
        assert 0 < constants.delta <= 1
        assert constants.variance == pytest.approx(1 - constants.delta, abs=1e-12)
    if constants.variance is not None and not subject.compressor.biased:
        # E‖Q(x)‖² = ‖x‖² + E‖Q(x) - x‖² of an unbiased one
        assert constants.omega == pytest.approx(constants.variance)


#: A model's layers, of which one is empty.
LAYERS = (5, 0, 47, 1, 700)


def layer_parts(*compressors: Compressor) -> list[Part]:
    """A part for each layer; the compressors in turn."""
    edges = np.cumsum([0, *LAYERS]).tolist()
    return [
        Part(f"layer{index}", start, stop, compressors[index % len(compressors)])
        for index, (start, stop) in enumerate(pairwise(edges))
    ]


def model_parts(compressor: Compressor) -> list[Part]:
    return [Part("model", 0, sum(LAYERS), compressor)]


def parts_at(granularity: str, compressor: Compressor) -> list[Part]:
    return layer_parts(compressor) if granularity == "layer" else model_parts(compressor)


def expected_exchange(
    parts: list[Part], corrected: list[Float32], latest: list[Float32], call: int, seed: int
) -> tuple[Float32, list[Float32]]:
    """What an exchange should give, and each worker's own estimate, part by part from the compressors alone."""
    mean = np.zeros(sum(LAYERS), np.float32)
    own = [np.empty(sum(LAYERS), np.float32) for _ in corrected]
    for index, part in enumerate(parts):
        where, compressor = slice(part.start, part.stop), part.compressor
        payloads = []
        for rank, values in enumerate(corrected):
            draw = Draw(seed, call, rank, index)
            payloads.append(compressor.compress(values[where], draw, latest[rank][where]))
            compressor.decompress(payloads[-1], own[rank][where], draw)
        if compressor.collective == "all_reduce":
            total = payloads[0].copy()
            for payload in payloads[1:]:
                total += payload
            compressor.decompress(total, mean[where], Draw(seed, call, 0, index), len(corrected))
        else:
            for estimate in own:
                mean[where] += estimate[where]
        compressor.finish(mean[where], len(corrected))
    return mean, own


def check_exchanges(parts: list[Part], feedback: ErrorFeedback | None, subject: Subject | None = None) -> None:
    length, seed = sum(LAYERS), 11
    workers = WorkersHere(parts, SIZE, seed=seed, feedback=feedback)
    memories = [np.zeros(length, np.float32) for _ in range(SIZE)]
    for call in range(3):
        gradients = [vector(length, seed=10 * call + rank) for rank in range(SIZE)]
        out = np.full(length, np.nan, np.float32)
        workers.aggregate(gradients, out, call)
        corrected = [gradient + memory for gradient, memory in zip(gradients, memories, strict=True)]
        expected, own = expected_exchange(parts, corrected, gradients, call, seed)
        assert (bits(out) == bits(expected)).all()
        for rank, measures in enumerate(workers.measures):
            assert measures is not None
            error = corrected[rank] - own[rank]
            assert measures.norm == pytest.approx(squared_norm(corrected[rank]), rel=1e-4)
            assert measures.compression_error == pytest.approx(squared_norm(error), rel=1e-4, abs=1e-12)
            declared = sum(part.compressor.payload_bytes(part.length) for part in parts)
            declared += LENGTH_BYTES * sum(not part.compressor.fixed_size for part in parts)
            if all(part.compressor.fixed_size for part in parts):
                assert measures.payload_bytes == declared
            else:
                assert measures.payload_bytes <= declared
            assert 0 <= measures.density <= 1
            if feedback is not None:
                assert (bits(workers.memory(rank)) == bits(error)).all()
                memories[rank] = error
                if all(part.compressor.copies for part in parts):
                    assert (bits(own[rank] + error) == bits(corrected[rank])).all()


@every
@pytest.mark.parametrize("granularity", ["layer", "model"])
@pytest.mark.parametrize("feedback", [None, ErrorFeedback()], ids=["plain", "feedback"])
def test_exchange(subject: Subject, granularity: str, feedback: ErrorFeedback | None) -> None:
    """Three exchanges of three workers give what the compressor gives part by part; memories hold what was left out."""
    check_exchanges(parts_at(granularity, subject.compressor), feedback)


@every
def test_exchange_beside_others(subject: Subject) -> None:
    """A different operator for each layer, identity included."""
    check_exchanges(layer_parts(subject.compressor, Identity(), COMPRESSORS["natural"]()), ErrorFeedback())


@every
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_every_worker_receives_the_same_bits(subject: Subject, granularity: str) -> None:
    parts, length = parts_at(granularity, subject.compressor), sum(LAYERS)
    workers = WorkersHere(parts, SIZE)
    begun = [workers.begun(rank, vector(length, seed=rank), 2) for rank in range(SIZE)]
    payloads = zip(*(asked.requests[0].payloads for _, asked, _ in begun), strict=True)
    totals = [np.sum(of_all, axis=0, dtype=of_all[0].dtype) for of_all in payloads]
    messages = [asked.requests[1].message for _, asked, _ in begun]
    received = []
    for exchange, _, call in begun:
        call.out.fill(np.nan)
        with pytest.raises(StopIteration):
            exchange.send([totals, messages])
        received.append(call.out.tobytes())
    assert len(set(received)) == 1
    assert np.isfinite(np.frombuffer(received[0], np.float32)).all()


@every
@pytest.mark.parametrize("granularity", ["layer", "model"])
def test_bounds_over_the_layers(subject: Subject, granularity: str) -> None:
    """Lemma 1 of Dutta et al., and the sum of the layers' bounds on the error, of layers of very different norms."""
    parts = parts_at(granularity, subject.compressor)
    values = vector(sum(LAYERS), seed=3).copy()
    values[:5] *= 10
    values[5:52] *= 0.01
    constants = [part.compressor.constants(part.length) for part in parts]
    norms = [squared_norm(values[part.start : part.stop]) for part in parts]
    found = measure(parts, frozen(values), 100 if subject.random else 1)
    if all(layer.omega is not None for layer in constants):
        bounds = lemma1(constants, norms)
        assert bounds.layer_wise <= bounds.entire_model * (1 + 1e-12)
        assert holds(found.second_moments, bounds.layer_wise, found.norm)
    bound = error_bound(constants, norms)
    if bound is not None:
        assert holds(found.errors, bound, found.norm)
