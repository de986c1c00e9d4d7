"""PCACodec against Eq. 3-5 and 7 written out with padded slices, and against the ring."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from gradiveq.flatten import Block
from gradiveq.over_ring.pca_codec import PCACodec, gradient_codec
from gradiveq.pca import Basis, Float32, LayerBasis, PCAConfig, PCASampler, groups
from gradiveq.pca.coding import Bases
from gradiveq.pca.loss import Loss
from gradiveq.pca.projection import Projection, squares
from ring import lockstep
from ring.codec import Hop, IdentityCodec
from ring.handle import Ring
from ring.segments import PayloadMap

Float64 = npt.NDArray[np.float64]
HOP = Hop(0, 1, 0)


def basis_of(length: int, k: int, dims: list[int], reuse: float = math.inf, seed: int = 0) -> LayerBasis:
    """Random orthonormal bases of the given d's and a random mean."""
    rng = np.random.default_rng(seed)
    cut = groups("conv", length, k, reuse)
    assert len(cut) == len(dims)
    bases = []
    for d in dims:
        q, _ = np.linalg.qr(rng.standard_normal((k, d)))
        bases.append(Basis(np.ascontiguousarray(q.T, np.float32), np.ones(d, np.float32), float(k)))
    mean = rng.standard_normal(length).astype(np.float32)
    return LayerBasis("conv", length, k, mean, cut, tuple(bases))


def lost(basis: LayerBasis, gradient: Float32) -> Loss:
    """What a basis loses of a gradient."""
    exact = torch.from_numpy(gradient)
    return Loss(*squares(Projection(basis, torch.device("cpu")).there_and_back(exact), exact).tolist())


def encoded(codec: PCACodec, vector: Float32) -> npt.NDArray[np.uint8]:
    payload = np.empty(PayloadMap(codec.regions(len(vector), vector.dtype)).num_bytes, np.uint8)
    codec.encode(vector, 0, payload, HOP)
    return payload


def padded(basis: LayerBasis, g: Float32) -> list[tuple[Float64, Float64]]:
    """(g_n - µ/N, U) of each slice, padded after centring."""
    k = basis.slice_size
    slices = []
    for group, b in zip(basis.groups, basis.bases, strict=True):
        for start in range(group.start, group.stop, k):
            x = np.zeros(k)
            stop = min(start + k, group.stop)
            x[: stop - start] = g[start:stop].astype(np.float64) - basis.mean_[start:stop]
            slices.append((x, b.components_.astype(np.float64)))
    return slices


def equation_3(basis: LayerBasis, g: Float32) -> Float64:
    return np.concatenate([u @ x for x, u in padded(basis, g)])


def equation_5(basis: LayerBasis, coded: Float64, size: int) -> Float64:
    out, taken = [], 0
    for _, u in padded(basis, basis.mean_):
        out.append(u.T @ coded[taken : taken + len(u)])
        taken += len(u)
    return np.concatenate(out)[: basis.length] + size * basis.mean_.astype(np.float64)


CASES = [
    # length, K, d of each group, s: tiles and remainders of both products, short last slices
    (96, 24, [5], math.inf),
    (100, 24, [5], math.inf),
    (100, 24, [5, 24, 1], 2),
    (100, 24, [3, 3, 3, 7, 7], 1),
    (7, 7, [2], math.inf),
    (7, 20, [2], math.inf),
    (30, 1, [1], math.inf),
    (1000, 200, [33], math.inf),
    (900, 128, [16, 40, 40, 64], 2),
    (30_000, 1000, [70], math.inf),
]


@pytest.mark.parametrize(("length", "k", "dims", "reuse"), CASES)
def test_equations_3_to_5_and_7(length: int, k: int, dims: list[int], reuse: float) -> None:
    basis = basis_of(length, k, dims, reuse)
    codec = PCACodec(basis)
    codec.monitor = True
    g = np.random.default_rng(1).standard_normal(length).astype(np.float32)
    payload = encoded(codec, g)
    expected = equation_3(basis, g)
    assert len(payload) == 4 * len(expected) == basis.payload_bytes
    np.testing.assert_allclose(payload.view(np.float32), expected, atol=1e-4)
    for size in (1, 6):
        estimate = np.full(length, np.nan, np.float32)
        codec.decode(payload, 0, estimate, size)
        np.testing.assert_allclose(estimate, equation_5(basis, expected, size), atol=1e-4)
    error = np.square(g - equation_5(basis, expected, 1)).sum()
    norm = np.square(g.astype(np.float64)).sum()
    for found in (codec.take_local_loss(), lost(codec.basis, g)):
        np.testing.assert_allclose((found.error, found.norm), (error, norm), rtol=1e-4, atol=1e-4 * norm)
    assert codec.take_local_loss() == Loss(0.0, 0.0)


@pytest.mark.parametrize(("length", "k", "dims", "reuse"), CASES)
def test_pieces_are_the_whole(length: int, k: int, dims: list[int], reuse: float) -> None:
    """Runs of slices from anywhere, at the place in the payload that the regions say."""
    basis = basis_of(length, k, dims, reuse)
    codec = PCACodec(basis)
    g = np.random.default_rng(1).standard_normal(length).astype(np.float32)
    places = PayloadMap(codec.regions(length, g.dtype))
    whole = encoded(codec, g)
    estimate = np.empty_like(g)
    codec.decode(whole, 0, estimate, 3)
    for per_run in (1, 2, 3):
        for start in range(0, length, per_run * k):
            stop = min(start + per_run * k, length)
            wire = slice(places.byte_at(start), places.byte_at(stop))
            payload = np.empty(wire.stop - wire.start, np.uint8)
            codec.encode(g[start:stop], start, payload, HOP)
            np.testing.assert_allclose(payload.view(np.float32), whole[wire].view(np.float32), atol=1e-4)
            part = np.empty(stop - start, np.float32)
            codec.decode(whole[wire], start, part, 3)
            np.testing.assert_allclose(part, estimate[start:stop], atol=1e-4)


@pytest.mark.parametrize(("length", "k", "dims", "reuse"), CASES)
def test_linearity(length: int, k: int, dims: list[int], reuse: float) -> None:
    """Eq. 1 and 4: the sum of the payloads decodes to what the sum, encoded by one worker, decodes to."""
    size = 5
    basis = basis_of(length, k, dims, reuse)
    codec = PCACodec(basis)
    g = np.random.default_rng(3).standard_normal((size, length)).astype(np.float32)
    total = encoded(codec, g[0])
    for part in g[1:]:
        own = encoded(codec, part)
        codec.reduce(total, part, 0, own, HOP)
        total = own
    estimate = np.empty(length, np.float32)
    codec.decode(total, 0, estimate, size)

    alone = LayerBasis("conv", length, k, basis.mean_ * np.float32(size), basis.groups, basis.bases)
    expected = equation_5(alone, equation_3(alone, g.sum(axis=0)), 1)
    np.testing.assert_allclose(estimate, expected, atol=1e-3)


@pytest.mark.parametrize(("length", "k"), [(96, 24), (100, 24), (1000, 200)])
def test_full_rank_is_lossless(length: int, k: int) -> None:
    codec = PCACodec(basis_of(length, k, [k]))
    g = np.random.default_rng(1).standard_normal(length).astype(np.float32)
    estimate = np.empty_like(g)
    codec.decode(encoded(codec, g), 0, estimate, 1)
    np.testing.assert_allclose(estimate, g, atol=1e-5)
    assert lost(codec.basis, g).relative <= 1e-5


def test_decoded_bits_do_not_depend_on_where_the_memory_is() -> None:
    """Each worker decodes the same payload from another place in memory, into another."""
    basis = basis_of(9 * 256 + 50, 256, [33])
    codec = PCACodec(basis)
    g = np.random.default_rng(1).standard_normal(basis.length).astype(np.float32)
    payload = encoded(codec, g)
    results = set()
    for shift in range(0, 64, 4):
        moved = np.empty(len(payload) + shift, np.uint8)[shift:]
        moved[:] = payload
        out = np.empty(basis.length + shift, np.float32)[shift:]
        codec.decode(moved, 0, out, 6)
        results.add(out.tobytes())
    assert len(results) == 1


def test_constant_gradients_cost_one_number_and_lose_nothing() -> None:
    block = Block("conv", 0, 40, (1, 1, 40), True)
    sampler = PCASampler([block], {"conv": 20}, PCAConfig(20), 0, 1)
    g = np.linspace(-1, 1, 40).astype(np.float32)
    for _ in range(5):
        sampler.add(g)
    dims = sampler.fit()
    (basis,) = sampler.rebuild(dims, [sampler.share(dims)[0]])
    codec = PCACodec(basis)
    assert (basis.payload_bytes, basis.ratio) == (8, 20)
    estimate = np.empty_like(g)
    codec.decode(encoded(codec, g), 0, estimate, 1)
    np.testing.assert_array_equal(estimate, g)
    assert lost(codec.basis, g).error <= 1e-5


def test_regions_merge_equal_groups() -> None:
    codec = PCACodec(basis_of(100, 24, [3, 3, 3, 7, 7], 1))
    found = [(r.length, r.unit, r.unit_bytes, r.num_bytes) for r in codec.regions(100, np.dtype(np.float32))]
    assert found == [(72, 24, 12, 36), (28, 24, 28, 56)]


def test_refused_vectors() -> None:
    codec = PCACodec(basis_of(96, 24, [5]))
    with pytest.raises(ValueError, match="basis of conv is for 96 elements, got 97"):
        codec.regions(97, np.dtype(np.float32))
    with pytest.raises(ValueError, match="got a float64 vector for conv"):
        codec.regions(96, np.dtype(np.float64))


def test_description_tells_bases_apart() -> None:
    f32 = np.dtype(np.float32)
    same = [PCACodec(basis_of(96, 24, [5])).describe(f32) for _ in range(2)]
    assert same[0] == same[1]
    others = [basis_of(96, 24, [5], seed=1), basis_of(96, 24, [6]), basis_of(96, 48, [5]), basis_of(96, 24, [5, 5], 2)]
    assert len({same[0], *(PCACodec(b).describe(f32) for b in others)}) == 5
    assert PCACodec(basis_of(100, 24, [3, 3, 3, 7, 7], 1)).describe(f32).startswith("pca K=24 d=3x3,2x7 ")


def test_relative_loss() -> None:
    g = np.array([3.0, 4.0], np.float32)
    assert Loss.between(np.array([3.0, 3.0], np.float32), g).relative == pytest.approx(1 / 25)
    assert (Loss.between(g, g) + Loss(1.0, 0.0)).relative == pytest.approx(1 / 25)
    assert Loss().relative == 0.0
    assert Loss.between(g, np.zeros(2, np.float32)).relative == math.inf


BLOCKS = (
    Block("a", 0, 96, (24, 4, 1), True),
    Block("b", 96, 24, (24, 1), True),
    Block("c", 120, 7, (7,), False),
    Block("d", 127, 3, (3,), False),
)


def bases() -> list[LayerBasis]:
    a, b = basis_of(96, 24, [5]), basis_of(24, 24, [24])
    return [
        LayerBasis("a", 96, 24, a.mean_, a.groups, a.bases),
        LayerBasis("b", 24, 24, b.mean_, b.groups, b.bases),
    ]


def test_gradient_codec_parts() -> None:
    codec, layers = gradient_codec(BLOCKS, Bases(bases()).by_name, trailing=2)
    assert list(layers) == ["a"]  # b's ratio is 1
    assert [(length, type(part)) for length, part in codec.parts] == [(96, PCACodec), (36, IdentityCodec)]
    assert sum(r.num_bytes for r in codec.regions(132, np.dtype(np.float32))) == 4 * (4 * 5 + 36)
    codec, layers = gradient_codec(BLOCKS, Bases(bases()[1:]).by_name)
    assert not layers
    assert [length for length, _ in codec.parts] == [130]


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_around_the_ring(size: int) -> None:
    g = np.random.default_rng(3).standard_normal((size, 132)).astype(np.float32)

    def worker(ring: Ring) -> tuple[Float32, int, Loss]:
        codec, layers = gradient_codec(BLOCKS, Bases(bases()).by_name, trailing=2)
        layers["a"].monitor = True
        vector = g[ring.rank].copy()
        stats = ring.all_reduce(vector, codec)
        return vector, stats.bytes_sent, layers["a"].take_local_loss()

    results = lockstep.run(size, worker)
    assert len({vector.tobytes() for vector, _, _ in results}) == 1
    vector = results[0][0]
    basis = bases()[0]
    coded = np.sum([equation_3(basis, part[:96]) for part in g], axis=0)
    np.testing.assert_allclose(vector[:96], equation_5(basis, coded, size), atol=1e-4)
    np.testing.assert_allclose(vector[96:], g[:, 96:].sum(axis=0), atol=1e-4)
    assert sum(sent for _, sent, _ in results) == 2 * (size - 1) * 4 * (4 * 5 + 36)
    if size > 1:
        for part, (_, _, local) in zip(g, results, strict=True):
            error = np.square(part[:96] - equation_5(basis, equation_3(basis, part[:96]), 1)).sum()
            np.testing.assert_allclose((local.error, local.norm), (error, np.square(part[:96]).sum()), rtol=1e-4)
