"""Estimates of M, ζ² and σ² on gradients that have known ones, and the thresholds that follow from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from gradiveq.noise import NoiseEstimate, NoiseWindow, auto_threshold, simple_threshold
from tests.support.noisy_workers import Synthetic, assert_mean_is


@pytest.mark.parametrize(("noise", "heterogeneity"), [(2.0, 0.7), (5.0, 0.02), (0.3, 4.0)])
def test_unbiased_without_drift(noise: float, heterogeneity: float) -> None:
    estimates = [Synthetic(4, 40, 0.0, noise, heterogeneity, seed).estimate(60) for seed in range(60)]
    assert_mean_is([one.total_noise for one in estimates], noise)
    assert_mean_is([one.heterogeneity for one in estimates], heterogeneity)
    assert_mean_is([one.gradient for one in estimates], 9 + heterogeneity)  # the cross terms sum to zero


def test_drift_of_the_common_gradient_is_not_noise() -> None:
    """It moves by far more than the noise within the window, and the estimates don't see it."""
    estimates = [Synthetic(3, 40, 0.0, 0.5, 0.3, seed).estimate(100, drift=0.03) for seed in range(40)]
    assert_mean_is([one.total_noise for one in estimates], 0.5)
    assert_mean_is([one.heterogeneity for one in estimates], 0.3)


def test_workers_with_the_same_data() -> None:
    """ζ² is 0, and its estimate is as often cut off there as not, and small beside the noise over T."""
    found = [Synthetic(4, 30, 0.0, 1.0, 0.0, seed).estimate(50).heterogeneity for seed in range(40)]
    assert 5 < sum(one == 0 for one in found) < 35  # of binomial(40, ≈ 1/2): 1e-6 two-sided
    assert max(found) < 1.0 / 50


def test_noise_that_grows_with_the_gradient() -> None:
    estimates = [Synthetic(4, 60, 2.0, 1.0, 0.1, seed).estimate(200, drift=0.01) for seed in range(30)]
    told = [one for one in estimates if one.multiple]
    assert len(told) == len(estimates)
    # heavier than normal: blocks of large gradients are also noisier, so no exact unbiasedness is claimed
    assert np.mean([one.multiple for one in told]) == pytest.approx(2.0, rel=0.1)
    assert np.mean([one.noise for one in told]) == pytest.approx(1.0, rel=0.3)
    for one in told:
        assert one.multiple_error is not None
        assert abs(one.multiple - 2) < 8 * one.multiple_error
        assert one.total_noise == pytest.approx(one.multiple * one.gradient + one.noise, rel=0.2)


def test_noise_that_does_not() -> None:
    """M is 0 in all but about 2.5 % of windows: at most 12 of 100 with a confidence of 1e-5."""
    estimates = [Synthetic(3, 40, 0.0, 1.0, 0.1, seed).estimate(100, drift=0.02) for seed in range(100)]
    assert sum(one.multiple > 0 for one in estimates) <= stats.binom.isf(1e-5, 100, 0.025)
    for one in estimates:
        if not one.multiple:
            assert one.noise == one.total_noise


def test_it_can_not_be_told_from_two_blocks() -> None:
    estimate = Synthetic(3, 40, 5.0, 1.0, 0.1, 0).estimate(20, drift=0.05)
    assert estimate.multiple == 0
    assert estimate.multiple_error is None
    assert estimate.noise == estimate.total_noise


def test_one_worker() -> None:
    estimates = [Synthetic(1, 40, 0.0, 0.8, 0.0, seed).estimate(50) for seed in range(60)]
    assert all(one.heterogeneity == 0 for one in estimates)
    assert_mean_is([one.total_noise for one in estimates], 0.8)


def test_restated_from_all_gradients() -> None:
    """The estimates as the module's table writes them, from everything at once."""
    data, iterations, block, drift = Synthetic(3, 12, 0.5, 1.0, 0.4, 7), 50, 10, 0.02
    estimate = data.estimate(iterations, drift, block)
    g = np.array([[data.gradient(r, t, drift) for t in range(iterations)] for r in range(3)], np.float64)
    x = g - g.mean(axis=0)
    zeta = np.mean([np.sum(x[r].mean(0) ** 2) - x[r].var(0, ddof=1).sum() / iterations for r in range(3)])
    assert estimate.heterogeneity == pytest.approx(max(0, zeta), rel=1e-4)
    noises, gradients = [], []
    for start in range(0, iterations, block):
        part = slice(start, start + block)
        noises.append(np.mean([x[r, part].var(0, ddof=1).sum() for r in range(3)]) * 3 / 2)
        gradients.append(np.mean([np.sum(g[r, part].mean(0) ** 2) for r in range(3)]) - noises[-1] / block)
    assert estimate.total_noise == pytest.approx(np.mean(noises), rel=1e-4)
    assert estimate.gradient == pytest.approx(np.mean(gradients), rel=1e-4)
    fit = stats.linregress(gradients, noises)
    assert estimate.multiple_error == pytest.approx(fit.stderr, rel=1e-3)
    if fit.slope > stats.t.isf(0.025, 3) * fit.stderr and fit.intercept > 0:
        assert estimate.multiple == pytest.approx(fit.slope, rel=1e-3)
        assert estimate.noise == pytest.approx(fit.intercept, rel=1e-3)
    else:
        assert estimate.multiple == 0
        assert estimate.noise == estimate.total_noise


def test_no_noise_at_all() -> None:
    estimate = Synthetic(3, 12, 0.0, 0.0, 1.5, 1).estimate(30, drift=0.01)
    assert estimate.total_noise == pytest.approx(0, abs=1e-10)
    assert estimate.heterogeneity == pytest.approx(1.5, rel=1e-5)
    zeros = NoiseWindow(5, 2, 20)
    for _ in range(20):
        zeros.add(np.zeros(5, np.float32), np.zeros(5, np.float32))
    assert zeros.estimate(np.array([zeros.row()] * 2)) == NoiseEstimate(0.0, 0.0, 0.0, None, 0.0, 0.0)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stop", [0, 7, 10, 33])
def test_state_dict_resumes_bitwise(size: int, stop: int) -> None:
    data = Synthetic(size, 20, 0.1, 1.0, 0.1, 0)
    gradients = [[data.gradient(rank, t, 0.01) for rank in range(size)] for t in range(35)]
    whole, first, second = (NoiseWindow(20, size, 35) for _ in range(3))
    for t, ranks in enumerate(gradients):
        mean = np.mean(ranks, axis=0, dtype=np.float32)
        whole.add(ranks[0], mean)
        if t == stop:
            second.load_state_dict(first.state_dict())
        first.add(ranks[0], mean)
        if t >= stop:
            second.add(ranks[0], mean)
    assert whole.full
    assert second.row() == first.row() == whole.row()
    with pytest.raises(ValueError, match="another length"):
        NoiseWindow(21, size, 35).load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="35 iterations is full"):
        whole.add(gradients[0][0], gradients[0][0])
    with pytest.raises(ValueError, match="has 0 of its 20 iterations"):
        NoiseWindow(3, size, 20).row()


def test_the_formulas() -> None:
    estimate = NoiseEstimate(3.0, 0.5, 0.02, None, 0.5, 1.0)
    k, d = 100, 50_000
    assert auto_threshold(k, d, estimate) == pytest.approx(2 / 10 * math.sqrt((1000 + 3) * 0.02 + 0.5))
    homogeneous = NoiseEstimate(0.0, 1 / 16, 0.0, None, 1 / 16, 1.0)
    assert auto_threshold(k, d, homogeneous) == pytest.approx(simple_threshold(k, d))
    # Table 6 of Sahu et al. 2021: ResNet-18 on CIFAR-10, 0.1 % of 11,173,962
    assert simple_threshold(round(0.001 * 11_173_962), 11_173_962) == pytest.approx(4.73e-3, abs=5e-6)
    assert auto_threshold(k, d, NoiseEstimate(0.0, 0.0, 0.0, None, 0.0, 0.0)) == 0


@pytest.mark.parametrize("kept", [0, 11])
def test_more_than_all_or_nothing_kept(kept: int) -> None:
    with pytest.raises(ValueError, match=f"`num_kept` must be from 1 to 10 .*, got {kept}"):
        simple_threshold(kept, 10)
    with pytest.raises(ValueError, match="`num_kept`"):
        auto_threshold(kept, 10, NoiseEstimate(0.0, 0.0, 0.0, None, 0.0, 0.0))


def test_windows_too_short() -> None:
    with pytest.raises(ValueError, match=r"`iterations` must be at least 20 \(two blocks\), got 19"):
        NoiseWindow(3, 2, 19)
    with pytest.raises(ValueError, match="`block` must be at least 2, as a variance needs, got 1"):
        NoiseWindow(3, 2, 19, 1)
