"""PCA bases against a plain NumPy restatement: the covariance matrix of the slices and its full decomposition."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torch import nn

from bench.models import resnet32
from gradiveq.flatten import Block, Layout, slice_sizes
from gradiveq.pca import (
    Float32,
    GroupSamples,
    LayerBasis,
    PCAConfig,
    PCASampler,
    groups,
    held_bytes,
    is_stable,
    sampling,
    solvers,
)
from gradiveq.pca.config import assign, check_components


def correlated(samples: int, length: int, rank: int, seed: int = 0, mean: float = 0.3) -> Float32:
    """(samples, length) gradients around a mean: a few directions, and a little noise."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((samples, rank)) @ rng.standard_normal((rank, length))
    return (mean * rng.standard_normal(length) + mixed + 0.05 * rng.standard_normal((samples, length))).astype(
        np.float32
    )


def covariance(gradients: Float32, first: int, slices: int, k: int) -> npt.NDArray[np.float64]:
    """Of slices first, ..., first + slices - 1, each centred by its own mean and padded after that. Times the rows."""
    g = gradients.astype(np.float64)
    g = g - g.mean(axis=0)
    padded = np.zeros((len(g), -(-g.shape[1] // k) * k))
    padded[:, : g.shape[1]] = g
    c = np.zeros((k, k))
    for m in range(first, first + slices):
        x = padded[:, m * k : (m + 1) * k]
        c += x.T @ x
    return c


def sampler(
    length: int, config: PCAConfig, rank: int = 0, size: int = 1, shape: tuple[int, ...] = (1, 1, 1)
) -> PCASampler:
    block = Block("conv", 0, length, (1, 1, length), True)
    return PCASampler([block], slice_sizes([block], config.slice_size), config, rank, size)


def fitted(gradients: Float32, config: PCAConfig, size: int = 1) -> list[LayerBasis]:
    """Fit among `size` ranks and exchange by hand; every rank's bases must be the same bits."""
    ranks = [sampler(gradients.shape[1], config, rank, size) for rank in range(size)]
    for gradient in gradients:
        for held in ranks:
            held.add(gradient)
    dims = np.sum([held.fit() for held in ranks], axis=0)
    shared = [held.share(dims) for held in ranks]
    lengths = shared[0][1]
    for rank, (own, own_lengths) in enumerate(shared):
        assert own_lengths == lengths
        assert len(own) == lengths[rank]
    built = [held.rebuild(dims, [own for own, _ in shared])[0] for held in ranks]
    assert len({basis.digest for basis in built}) == 1
    return built


CASES = [
    # length, K, s, samples: padded and not, Gram matrix and covariance, one slice and many
    (96, 24, math.inf, 12),
    (100, 24, 2, 12),
    (100, 24, 1, 12),
    (100, 24, None, 40),
    (100, 24, 2, 60),
    (50, 50, None, 20),
    (7, 7, 1, 30),
    (30, 1, None, 8),
]


@pytest.mark.parametrize("fit_slices", ["first", "all"])
@pytest.mark.parametrize(("length", "k", "reuse", "samples"), CASES)
def test_bases_match_the_covariance(length: int, k: int, reuse: float, samples: int, fit_slices: str) -> None:
    """Eq. 6 and the bases: eigenvalues, the least d, and the same subspace."""
    threshold = 0.2
    gradients = correlated(samples, length, 3)
    config = PCAConfig(k, reuse, fit_slices, loss_threshold=threshold)  # type: ignore[arg-type]
    (layer,) = fitted(gradients, config)
    np.testing.assert_allclose(layer.mean_, gradients.astype(np.float64).mean(axis=0), rtol=1e-6, atol=1e-7)
    num_slices = -(-length // k)
    step = num_slices if reuse in (None, math.inf) else int(reuse)
    assert len(layer.bases) == -(-num_slices // step)
    for i, basis in enumerate(layer.bases):
        count = min(step, num_slices - i * step) if fit_slices == "all" else 1
        c = covariance(gradients, i * step, count, k)
        s = np.linalg.eigvalsh(c)[::-1]
        d = len(basis.components_)
        shares = np.cumsum(s) / s.sum()
        assert shares[d - 1] >= 1 - threshold
        assert d == 1 or shares[d - 2] < 1 - threshold
        dof = count * (samples - 1)
        np.testing.assert_allclose(basis.explained_variance_, s[:d] / dof, rtol=1e-4)
        assert basis.total_variance_ == pytest.approx(s.sum() / dof, rel=1e-4)
        assert basis.in_sample_loss == pytest.approx(1 - shares[d - 1], abs=1e-4)
        u = basis.components_.astype(np.float64)
        np.testing.assert_allclose(u @ u.T, np.eye(d), atol=1e-4)
        assert np.trace(u @ c @ u.T) == pytest.approx(s[:d].sum(), rel=1e-4)


@pytest.mark.parametrize("fit_slices", ["first", "all"])
@pytest.mark.parametrize("samples", [10, 80])
def test_same_bits_however_many_ranks_fit(fit_slices: str, samples: int) -> None:
    gradients = correlated(samples, 300, 3)
    digests = set()
    for size in (1, 2, 3, 6):
        config = PCAConfig(24, 2, fit_slices, loss_threshold=0.1)  # type: ignore[arg-type]
        digests |= {basis.digest for basis in fitted(gradients, config, size)}
    assert len(digests) == 1


def test_covariance_does_not_cancel() -> None:
    """A mean 10,000 times the deviation costs what rounding the input does, not the variance."""
    deviation = correlated(200, 32, 3, mean=0.0)
    (plain,) = fitted(deviation, PCAConfig(16, None, "all", n_components=3))
    (moved,) = fitted(deviation + np.float32(1e4), PCAConfig(16, None, "all", n_components=3))
    np.testing.assert_allclose(moved.bases[0].explained_variance_, plain.bases[0].explained_variance_, rtol=1e-2)
    overlap = np.linalg.svd(moved.bases[0].components_ @ plain.bases[0].components_.T, compute_uv=False)
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def test_samples_and_covariance_agree() -> None:
    """The same samples just below and above the switch."""
    gradients = correlated(25, 24, 3)
    (group,) = groups("conv", 24, 24)
    config = PCAConfig(24, n_components=5)
    few, many = GroupSamples(group, config), GroupSamples(group, config)
    for gradient in gradients:
        many.add(gradient)
    for gradient in gradients[:24]:
        few.add(gradient)
    assert (few.weights, many.weights) == (True, False)
    assert few.num_bytes == 4 * 24 * 24
    assert many.num_bytes == 4 * 24 * 24 + 8 * 24
    for held, count in ((few, 24), (many, 25)):
        s = np.linalg.eigvalsh(covariance(gradients[:count], 0, 1, 24))[::-1]
        np.testing.assert_allclose(held.fit().explained_variance, s[:5] / (count - 1), rtol=1e-4)


def test_threshold_zero_keeps_the_rank() -> None:
    rng = np.random.default_rng(0)
    gradients = (rng.standard_normal((50, 4)) @ rng.standard_normal((4, 16))).astype(np.float32)
    for samples in (10, 50):
        (layer,) = fitted(gradients[:samples], PCAConfig(16, loss_threshold=0.0))
        assert len(layer.bases[0].components_) == 4
        assert layer.in_sample_loss < 1e-6


@pytest.mark.parametrize("fit_slices", ["first", "all"])
@pytest.mark.parametrize("options", [{"loss_threshold": 0.01}, {"n_components": 3}, {"ratio": 2.0}])
def test_constant_gradients(fit_slices: str, options: dict[str, float]) -> None:
    for value in (0.0, 0.1):
        for samples in (5, 30):
            gradients = np.full((samples, 20), value, np.float32)
            (layer,) = fitted(gradients, PCAConfig(8, None, fit_slices, **options))  # type: ignore[arg-type]
            (basis,) = layer.bases
            assert basis.components_.shape == (1, 8)
            assert not basis.components_.any()
            assert layer.in_sample_loss == 0.0
            np.testing.assert_array_equal(layer.mean_, gradients[0])


def test_components_from_ratio_or_number() -> None:
    gradients = correlated(40, 60, 20)
    assert len(fitted(gradients, PCAConfig(20, ratio=3.0))[0].bases[0].components_) == 6
    assert len(fitted(gradients, PCAConfig(20, ratio=1000.0))[0].bases[0].components_) == 1
    assert len(fitted(gradients, PCAConfig(20, n_components=7))[0].bases[0].components_) == 7


def test_more_components_than_samples_show() -> None:
    (group,) = groups("layer1.0.conv1", 256 * 9, 256)
    message = (
        "`n_components` must be at most 99 (samples - 1, with sample=100 and fit_slices='first'), "
        "got 128 for layer1.0.conv1"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        check_components(group, 100, PCAConfig(n_components=128))
    check_components(group, 129, PCAConfig(n_components=128))
    check_components(group, 100, PCAConfig(n_components=128, fit_slices="all"))
    with pytest.raises(ValueError, match=r"at most 9 \(9 slices x \(samples - 1\), with sample=2 and .*'all'\)"):
        check_components(group, 2, PCAConfig(n_components=128, fit_slices="all"))
    with pytest.raises(ValueError, match=r"`ratio` must be at least 2.586 \(slice size 256 / 99 .* got 2 for layer1.0"):
        check_components(group, 100, PCAConfig(ratio=2.0))
    with pytest.raises(ValueError, match="at least 2 samples, got sample=1"):
        check_components(group, 1, PCAConfig())
    with pytest.raises(ValueError, match=r"must be below 24 \(the largest slice size, of conv\), got 24"):
        sampler(96, PCAConfig(24, n_components=24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_threshold": 1.0}, r"`loss_threshold` must be in \[0, 1\), got 1.0"),
        ({"loss_threshold": -0.1}, r"`loss_threshold` must be in \[0, 1\), got -0.1"),
        ({"loss_threshold": math.nan}, r"`loss_threshold` must be in \[0, 1\), got nan"),
        ({"loss_threshold": 0.1, "ratio": 8.0}, "got loss_threshold and ratio"),
        ({"n_components": 0}, "`n_components` must be a whole number of at least 1, got 0"),
        ({"ratio": 0.5}, "`ratio` must be at least 1, got 0.5"),
        ({"ratio": "8"}, "`ratio` must be at least 1, got '8'"),
        ({"loss_threshold": "0.1"}, r"`loss_threshold` must be in \[0, 1\), got '0.1'"),
        ({"reuse": "2"}, "`reuse` must be a whole number of slices from 1 on, or inf, got '2'"),
        ({"reuse": 0}, "`reuse` must be a whole number of slices from 1 on, or inf, got 0"),
        ({"reuse": 1.5}, "got 1.5"),
        ({"fit_slices": "some"}, "`fit_slices` must be 'first' or 'all', got 'some'"),
        ({"slice_size": 0}, "`slice_size` must be a whole number of at least 1, got 0"),
        ({"slice_size": 2.5}, "`slice_size` must be a whole number of at least 1, got 2.5"),
    ],
)
def test_refused_configurations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PCAConfig(**options)


def test_non_finite_samples_are_named() -> None:
    gradients = correlated(5, 16, 2)
    gradients[2, 3] = np.nan
    held = [sampler(16, PCAConfig(16, n_components=2), rank, 2) for rank in range(2)]
    for gradient in gradients:
        for one in held:
            one.add(gradient)
    dims = held[0].fit() + held[1].fit()
    assert held[0].failures(dims) == {(0, "the variance of the samples is not finite in float32"): ["conv"]}
    assert held[1].failures(dims) == held[0].failures(dims)
    assert held[0].failures(np.array([2.0])) == {}


@pytest.mark.parametrize(("loss_threshold", "n_components"), [(None, 20), (0.3, None), (0.01, None)])
def test_large_solver(monkeypatch: pytest.MonkeyPatch, loss_threshold: float | None, n_components: int | None) -> None:
    """The randomised solver against the exact one on a slowly falling spectrum."""
    monkeypatch.setattr(solvers, "EXACT_SIZE", 64)
    rng = np.random.default_rng(2)
    x = (rng.standard_normal((600, 300)) / np.sqrt(np.arange(1, 301))).astype(np.float32)
    matrix = np.asfortranarray(np.tril(x.T @ x))
    _, vectors = solvers.leading_eigenpairs(matrix, n_components, loss_threshold)
    exact = np.linalg.eigvalsh(x.T.astype(np.float64) @ x)[::-1]
    d = vectors.shape[1]
    captured = float(np.square(x @ vectors).sum())
    assert captured >= 0.99 * exact[:d].sum()
    if loss_threshold is None:
        assert d == n_components
    else:
        least = int(np.argmax(np.cumsum(exact) >= (1 - loss_threshold) * exact.sum())) + 1
        assert least <= d <= 1.03 * least + 1
        assert captured >= (1 - loss_threshold) * exact.sum() * (1 - 1e-5)
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(d), atol=1e-4)
    again = solvers.leading_eigenpairs(matrix, n_components, loss_threshold)
    np.testing.assert_array_equal(vectors, again[1])


def test_many_samples_with_the_large_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gram matrix above EXACT_SIZE, from which weights and then the basis are made."""
    monkeypatch.setattr(solvers, "EXACT_SIZE", 32)
    monkeypatch.setattr(sampling, "EXACT_SIZE", 32)
    gradients = correlated(80, 200, 10)
    (layer,) = fitted(gradients, PCAConfig(200, n_components=10))
    u = layer.bases[0].components_
    np.testing.assert_allclose(u @ u.T, np.eye(10), atol=1e-4)
    s = np.linalg.eigvalsh(covariance(gradients, 0, 1, 200))[::-1]
    assert layer.in_sample_loss == pytest.approx(1 - s[:10].sum() / s.sum(), abs=1e-3)


def test_assignment_is_balanced_and_complete() -> None:
    assert assign([1.0, 5.0, 3.0, 3.0], 2) == [0, 0, 1, 1]
    assert assign([2.0, 2.0, 2.0], 5) == [0, 1, 2]
    assert assign([], 3) == []
    costs = [float(c) for c in np.random.default_rng(0).integers(1, 50, 40)]
    owners = assign(costs, 6)
    load = [sum(c for c, o in zip(costs, owners, strict=True) if o == rank) for rank in range(6)]
    assert max(load) - min(load) <= min(costs) + max(costs) / 2


@pytest.mark.parametrize("fit_slices", ["first", "all"])
def test_held_bytes(fit_slices: str) -> None:
    for samples in (3, 8, 9, 300):
        for owned in (True, False):
            config = PCAConfig(24, None, fit_slices, n_components=2)  # type: ignore[arg-type]
            (group,) = groups("conv", 70, 24)
            held = GroupSamples(group, config, owned)
            most = 0
            for gradient in correlated(samples, 70, 2):
                if owned or fit_slices == "first":
                    held.add(gradient)
                most = max(most, held.num_bytes)
            assert most == held_bytes(group, samples, config, owned)


@pytest.mark.parametrize(("fit_slices", "least", "most"), [("first", 23, 23), ("all", 27, 35)])
def test_memory_of_resnet32_is_what_the_aggregator_states(fit_slices: str, least: int, most: int) -> None:
    """The numbers in `Aggregator`'s docstring: MiB on the rank that holds least, and most, of 6, with Lt = 100."""
    layout = Layout(resnet32(100))
    config, sizes = PCAConfig(fit_slices=fit_slices), slice_sizes(layout.blocks)  # type: ignore[arg-type]
    ranks = [PCASampler(layout.blocks, sizes, config, rank, 6, 100) for rank in range(6)]
    gradient, peaks = np.zeros(layout.length, np.float32), [0] * 6
    for _ in range(100):
        for rank, held in enumerate(ranks):
            held.add(gradient)
            peaks[rank] = max(peaks[rank], held.num_bytes)
    assert (round(min(peaks) / 2**20), round(max(peaks) / 2**20)) == (least, most)
    mu = 8 * sum(block.length for block in layout.blocks if block.compressed)
    for held, peak in zip(ranks, peaks, strict=True):  # groups don't all hold most at the same time
        bound = mu + sum(held_bytes(one.group, 100, config, one.owned) for one in held.groups)
        assert 0.95 * bound < peak <= bound
    if fit_slices == "all":
        assert round((mu + sum(held_bytes(one.group, 100, config) for one in ranks[0].groups)) / 2**20) == 175


def test_state_dict_resumes_bit_for_bit() -> None:
    gradients = correlated(60, 100, 3)
    for fit_slices in ("first", "all"):
        config = PCAConfig(24, 2, fit_slices, n_components=4)
        for stop in (3, 10, 50):
            whole, before, after = (sampler(100, config) for _ in range(3))
            for gradient in gradients:
                whole.add(gradient)
            for gradient in gradients[:stop]:
                before.add(gradient)
            after.load_state_dict(before.state_dict())
            for gradient in gradients[stop:]:
                after.add(gradient)
            ends = []
            for held in (whole, after):
                dims = held.fit()
                ends.append(held.rebuild(dims, [held.share(dims)[0]])[0].digest)
            assert ends[0] == ends[1]
    with pytest.raises(ValueError, match="groups of slices"):
        sampler(24, PCAConfig(24, n_components=4)).load_state_dict(whole.state_dict())


def test_fitting_on_the_way_loses_no_sample() -> None:
    gradients = correlated(60, 48, 3)
    held = sampler(48, PCAConfig(24, fit_slices="all", n_components=4))
    for i, gradient in enumerate(gradients):
        held.add(gradient)
        if i % 7 == 6:
            held.fit()
    dims = held.fit()
    basis = held.rebuild(dims, [held.share(dims)[0]])[0].bases[0]
    s = np.linalg.eigvalsh(covariance(gradients, 0, 2, 24))[::-1]
    np.testing.assert_allclose(basis.explained_variance_, s[:4] / (2 * 59), rtol=1e-4)


def test_whole_model() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Linear(4, 4))
    layout = Layout(model)
    sizes = slice_sizes(layout.blocks)
    ranks = [PCASampler(layout.blocks, sizes, PCAConfig(ratio=8.0), rank, 2) for rank in range(2)]
    for gradient in correlated(20, layout.length, 5):
        for held in ranks:
            held.add(gradient)
    dims = ranks[0].fit() + ranks[1].fit()
    assert dims.tolist() == [3.0, 8.0]
    shares = [held.share(dims)[0] for held in ranks]
    first, second = ranks[0].rebuild(dims, shares), ranks[1].rebuild(dims, shares)
    assert [b.name for b in first] == ["0.weight", "2.weight"]
    assert [b.digest for b in first] == [b.digest for b in second]
    assert first[1].ratio == 8.0


def test_digest_tells_bases_and_means_apart() -> None:
    gradients = correlated(20, 48, 3)
    config = PCAConfig(24, n_components=3)
    changed = gradients.copy()
    changed[0, 40] += 1  # outside the first slice: only the mean differs
    assert fitted(gradients, config)[0].digest != fitted(changed, config)[0].digest
    assert fitted(gradients, config)[0].digest == fitted(gradients.copy(), config)[0].digest


def test_stability() -> None:
    assert not is_stable([50, 50, 50])
    assert is_stable([10, 30, 50, 50, 51, 50], tolerance=0.02, checks=3)
    assert not is_stable([10, 30, 48, 50, 51, 50], tolerance=0.02, checks=3)
