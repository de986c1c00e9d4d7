"""What `ring.codec.Codec` promises of every codec of the product, in one place.

What a codec computes is tested beside it (test_qsgd, test_pca_codec); here only what all have in common.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gradiveq.flatten import Block
from gradiveq.over_ring.pca_codec import PCACodec, gradient_codec
from gradiveq.over_ring.qsgd import QSGD
from ring import Codec, Composite, Hop, IdentityCodec, Stats
from ring.codec import Array
from ring.lockstep import LockstepRing, run
from tests.support.bases import fitted

SIZE = 3
LENGTHS = (0, 1, 2, 47, 700)
HOP = Hop(rank=1, size=SIZE, step=1)


@dataclass(frozen=True)
class Subject:
    """A codec, and what it claims.

    Attributes:
        make: the codec for a vector of a given length, anew for every worker.
        shortest: length that it can be made for.
        tolerance: of linearity, relative to the largest value; the data are whole numbers, for an exact sum.
        shows_nonfinite: a non-finite value can't become a finite one.
        ignores_chunks: the result has the same bits whatever the size of the chunks (a matrix product's needn't).
    """

    name: str
    make: Callable[[int], Codec]
    dtype: Any = np.float32
    shortest: int = 0
    tolerance: float = 0.0
    shows_nonfinite: bool = True
    ignores_chunks: bool = True

    @property
    def lengths(self) -> Iterator[int]:
        return (length for length in LENGTHS if length >= self.shortest)


def pca(fit_slices: str) -> Callable[[int], Codec]:
    return lambda length: PCACodec(fitted(length, fit_slices))


def quantised_and_exact(length: int) -> Codec:
    """What a sampling iteration uses: the gradients quantised, two control values as they are."""
    exact = min(2, length)
    return Composite([(length - exact, QSGD(bucket=16)), (exact, IdentityCodec())])


def compressed_and_exact(length: int) -> Codec:
    """What a compressed iteration uses: a layer that PCA makes shorter, and the rest."""
    layer = length - length // 4
    blocks = [Block("conv", 0, layer, (1, 1, layer), True), Block("bias", layer, length - layer, (1,), False)]
    return gradient_codec(blocks, {"conv": fitted(layer, "first")} if layer else {})[0]


def all_three(length: int) -> Codec:
    layer = length // 2
    parts: list[tuple[int, Codec]] = [(layer, PCACodec(fitted(layer, "all")))] if layer else []
    return Composite([*parts, (length - layer - layer // 2, QSGD(bucket=16)), (layer // 2, IdentityCodec())])


SUBJECTS = [
    *(
        Subject(f"identity-{np.dtype(dtype).name}", lambda length: IdentityCodec(), dtype)
        for dtype in (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)
    ),
    *(
        Subject(f"qsgd-{bits}-{norm}", lambda length, bits=bits, norm=norm: QSGD(bits, 16, norm))  # type: ignore[misc]
        for bits in (2, 4, 8)
        for norm in ("max", "l2")
    ),
    *(
        Subject(name, make, shortest=shortest, tolerance=1e-5, shows_nonfinite=False, ignores_chunks=False)
        for name, make, shortest in (
            ("pca-first", pca("first"), 1),
            ("pca-all", pca("all"), 1),
            ("pca+identity", compressed_and_exact, 0),
            ("pca+qsgd+identity", all_three, 0),
        )
    ),
    Subject("qsgd+identity", quantised_and_exact),
]
every_codec = pytest.mark.parametrize("subject", SUBJECTS, ids=lambda subject: subject.name)


def numbers(subject: Subject, length: int, seed: int = 0) -> Array:
    """Whole numbers, few enough that sums of SIZE vectors are exact in every dtype."""
    values: Array = np.random.default_rng([seed, length]).integers(-40, 41, length).astype(subject.dtype)
    return values


def inputs(subject: Subject, length: int) -> dict[str, Array]:
    limits = ml_dtypes.finfo(subject.dtype)
    return {
        "numbers": numbers(subject, length),
        "zeros": np.zeros(length, subject.dtype),
        "negative zeros": -np.zeros(length, subject.dtype),
        "tiny": np.full(length, limits.smallest_subnormal, subject.dtype),
        "normal, tiny": (limits.smallest_normal * np.sign(numbers(subject, length))).astype(subject.dtype),
        "constant": np.full(length, -0.3, subject.dtype),
    }


def declared_bytes(codec: Codec, vector: Array) -> int:
    return sum(region.num_bytes for region in codec.regions(len(vector), vector.dtype))


def guarded(num_bytes: int, filling: int) -> tuple[Array, Array]:
    """A payload, and the memory that it lies in."""
    memory = np.full(num_bytes + 32, filling, np.uint8)
    return memory[16:-16], memory


def encode(codec: Codec, vector: Array, filling: int = 0x55) -> Array:
    """The payload; whatever was in its memory, and nothing beside it is written."""
    payload, memory = guarded(declared_bytes(codec, vector), filling)
    codec.encode(vector, 0, payload, HOP)
    assert (memory[:16] == filling).all()
    assert (memory[-16:] == filling).all()
    return payload


def reduce(codec: Codec, incoming: Array, vector: Array) -> Array:
    payload = encode(codec, vector) if codec.linear else guarded(len(incoming), 0x55)[0]
    codec.reduce(incoming, vector, 0, payload, HOP)
    return payload


def decode(codec: Codec, payload: Array, like: Array, size: int) -> Array:
    values = np.full_like(like, 7)
    codec.decode(payload, 0, values, size)
    return values


def frozen(array: Array) -> Array:
    array.flags.writeable = False
    return array


@every_codec
def test_regions_cover_the_vector(subject: Subject) -> None:
    for length in subject.lengths:
        codec = subject.make(length)
        regions = codec.regions(length, np.dtype(subject.dtype))
        assert sum(region.length for region in regions) == length
        assert list(regions) == list(codec.regions(length, np.dtype(subject.dtype)))
        assert codec.describe(np.dtype(subject.dtype)) == subject.make(length).describe(np.dtype(subject.dtype))


@every_codec
def test_same_bytes_again_and_inputs_untouched(subject: Subject) -> None:
    """Encoding, adding and decoding depend on their arguments only, fill all they should and change nothing else."""
    for length in subject.lengths:
        codec, other = subject.make(length), subject.make(length)
        for kind, vector in inputs(subject, length).items():
            frozen(vector)
            payload = encode(codec, vector, 0x00)
            assert encode(codec, vector, 0xFF).tobytes() == payload.tobytes(), (length, kind)
            assert encode(other, vector).tobytes() == payload.tobytes(), (length, kind)
            frozen(payload)
            own = frozen(numbers(subject, length, seed=1))
            total = reduce(codec, payload, own)
            assert reduce(other, payload, own).tobytes() == total.tobytes(), (length, kind)
            result = decode(codec, frozen(total), vector, 2)
            assert decode(other, total, vector, 2).tobytes() == result.tobytes(), (length, kind)


@every_codec
def test_finite_stays_finite(subject: Subject) -> None:
    for length in subject.lengths:
        codec = subject.make(length)
        for kind, vector in inputs(subject, length).items():
            result = decode(codec, encode(codec, vector), vector, 1)
            assert np.isfinite(result.astype(float)).all(), (length, kind)
            if isinstance(codec, IdentityCodec):
                assert result.tobytes() == vector.tobytes(), (length, kind)


@every_codec
def test_payloads_of_a_linear_codec_add_up(subject: Subject) -> None:
    """The sum of the payloads decodes to the sum of what each decodes to."""
    for length in subject.lengths:
        codec = subject.make(length)
        if not codec.linear:
            continue
        vectors = [numbers(subject, length, seed) for seed in range(SIZE)]
        total, expected = encode(codec, vectors[0]), np.zeros(length)
        for vector in vectors[1:]:
            total = reduce(codec, total, vector)
        for vector in vectors:
            expected += decode(codec, encode(codec, vector), vector, 1).astype(float)
        result = decode(codec, total, vectors[0], SIZE).astype(float)
        np.testing.assert_allclose(result, expected, rtol=0, atol=subject.tolerance * 40 * SIZE)


def all_reduced(subject: Subject, length: int, **options: Any) -> tuple[list[Array], list[Stats]]:
    """Of every worker the result and what was sent; two calls with one codec, which have to agree."""

    def work(ring: LockstepRing) -> tuple[Array, Stats]:
        codec = subject.make(length)
        first, second = (numbers(subject, length, ring.rank) for _ in range(2))
        stats = ring.all_reduce(first, codec, **options)
        assert ring.all_reduce(second, codec, **options) == stats
        assert first.tobytes() == second.tobytes()
        return first, stats

    results = run(SIZE, work)
    return [vector for vector, _ in results], [stats for _, stats in results]


@every_codec
def test_around_the_ring(subject: Subject) -> None:
    """Shape and dtype stay, every worker has the same bits, and what was declared is what was sent."""
    for length in subject.lengths:
        vectors, stats = all_reduced(subject, length)
        assert {(vector.shape, vector.dtype) for vector in vectors} == {((length,), np.dtype(subject.dtype))}
        assert len({vector.tobytes() for vector in vectors}) == 1, length
        declared = declared_bytes(subject.make(length), vectors[0])
        assert sum(one.bytes_sent for one in stats) == 2 * (SIZE - 1) * declared, length
        if subject.name.startswith("identity"):
            expected = sum(numbers(subject, length, rank).astype(float) for rank in range(SIZE))
            np.testing.assert_array_equal(vectors[0].astype(float), expected)


@every_codec
def test_chunks_change_no_bit(subject: Subject) -> None:
    """Nor what is sent. Where products may round differently, all workers still agree."""
    for length in subject.lengths:
        whole, stats = all_reduced(subject, length, chunk_bytes=sys.maxsize)
        for chunk_bytes in (1, 40, 1000):
            vectors, chunked = all_reduced(subject, length, chunk_bytes=chunk_bytes)
            assert len({vector.tobytes() for vector in vectors}) == 1, (length, chunk_bytes)
            assert [one.bytes_sent for one in chunked] == [one.bytes_sent for one in stats]
            if subject.ignores_chunks:
                assert vectors[0].tobytes() == whole[0].tobytes(), (length, chunk_bytes)


@pytest.mark.parametrize(
    "subject", [subject for subject in SUBJECTS if subject.shows_nonfinite], ids=lambda subject: subject.name
)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_values_stay_visible(subject: Subject, bad: float) -> None:
    """Wherever in the ring they come in, no worker sees a finite number there."""
    for length in (1, 47):
        for place, culprit in ((0, 0), (length // 2, 1), (length - 1, SIZE - 1)):

            def work(ring: LockstepRing, length: int = length, place: int = place, culprit: int = culprit) -> Array:
                vector = numbers(subject, length, ring.rank)
                if ring.rank == culprit:
                    vector[place] = bad
                with np.errstate(invalid="ignore"):
                    ring.all_reduce(vector, subject.make(length))
                return vector

            for vector in run(SIZE, work):
                assert not np.isfinite(vector[place].astype(float)), (length, place, culprit)
