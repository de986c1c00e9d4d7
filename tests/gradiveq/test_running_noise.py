"""Estimates of M, ζ² and σ² along training, from sketches: what they are equal to, and what the sketches add."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from bench.job.checkpoint import restored, storable
from gradiveq.noise import NoiseEstimate, NoiseWindow
from gradiveq.running_noise import BLOCKS, WIDTH, RunningNoise, estimate_here
from tests.support.noisy_workers import SIGMAS, Synthetic, assert_mean_is

Vector = npt.NDArray[np.float32]


def follow(
    data: Synthetic, iterations: int, drift: float = 0.0, seed: int = 0, width: int = WIDTH
) -> list[NoiseEstimate | None]:
    """The estimate after each iteration."""
    noises = [RunningNoise(data.size, seed=seed, width=width) for _ in range(data.size)]
    return [
        estimate_here(noises, [data.gradient(rank, t, drift) for rank in range(data.size)]) for t in range(iterations)
    ]


@pytest.mark.parametrize("size", [1, 3])
def test_the_same_as_of_gradients_that_no_sketch_mixes(size: int) -> None:
    """Gradients shorter than the sketch lose nothing: then it is `NoiseWindow` of the blocks that are in the window."""
    data, drift = Synthetic(size, WIDTH - 9, 0.5, 1.0, 0.4, 7), 0.01
    found = follow(data, 10 * (BLOCKS + 3) + 4, drift)
    assert found[:9] == [None] * 9
    for end in range(10, len(found) + 1, 10):
        assert all(one is found[end - 1] for one in found[end - 1 : end + 9])  # until the next block has ended
        first = max(0, end - 10 * BLOCKS)
        if end - first < 20:
            continue
        windows = [NoiseWindow(data.length, size, end - first) for _ in range(size)]
        for t in range(first, end):
            gradients = [data.gradient(rank, t, drift) for rank in range(size)]
            mean = np.mean(gradients, axis=0, dtype=np.float64)
            for window, gradient in zip(windows, gradients, strict=True):
                window.add(gradient, mean)  # type: ignore[arg-type]
        wanted, one = windows[0].estimate(np.array([window.row() for window in windows])), found[end - 1]
        assert one is not None
        assert (one.multiple_error is None) == (wanted.multiple_error is None)
        known = {name: value for name, value in wanted.as_dict().items() if value is not None}
        assert {name: getattr(one, name) for name in known} == pytest.approx(known, rel=1e-6, abs=1e-9), end


def test_a_sketch_is_linear_and_keeps_squares_in_the_mean() -> None:
    """Over 4,000 choices of the signs; their spread is what the module says."""
    generator = np.random.default_rng(3)
    x, y = generator.standard_normal((2, 40 * WIDTH + 77)).astype(np.float32)
    shares = []
    for seed in range(4000):
        noise = RunningNoise(1, seed=seed)
        noise.see(x)
        shares.append(float(noise._seen @ noise._seen) / float(np.dot(x, x)))
    spread = float(np.std(shares))
    assert abs(np.mean(shares) - 1) < SIGMAS * spread / math.sqrt(len(shares))
    assert spread == pytest.approx(math.sqrt(2 / WIDTH), rel=SIGMAS / math.sqrt(2 * len(shares)) + 0.03)
    sketches = []
    for vector in (x, y, x + 2 * y):
        noise.see(vector)
        sketches.append(noise._seen.copy())
    np.testing.assert_allclose(sketches[2], sketches[0] + 2 * sketches[1], rtol=1e-4, atol=1e-4)


def test_known_noise_of_long_gradients() -> None:
    """Unbiased, over gradients and signs alike, with a common gradient that moves by far more than the noise."""
    truth = {"total_noise": 2.0, "heterogeneity": 0.7}
    found = [follow(Synthetic(4, 2000, 0.0, 2.0, 0.7, seed), 40, 0.02, seed)[-1] for seed in range(40)]
    for name, value in truth.items():
        assert_mean_is([getattr(one, name) for one in found], value)


def test_known_noise_that_grows_with_the_gradient() -> None:
    found = [follow(Synthetic(4, 1500, 2.0, 1.0, 0.1, seed), 100, 0.02, seed)[-1] for seed in range(12)]
    told = [one for one in found if one is not None and one.multiple]
    assert len(told) == len(found)
    # M is V over G, and G keeps what the signs make of one direction: 6 % in each run
    assert np.mean([one.multiple for one in told]) == pytest.approx(2.0, rel=0.15)
    assert np.mean([one.noise for one in told]) == pytest.approx(1.0, rel=0.4)


def test_what_has_left_the_window_is_forgotten() -> None:
    loud, quiet = Synthetic(3, 700, 0.0, 9.0, 4.0, 1), Synthetic(3, 700, 0.0, 1.0, 0.0, 2)
    noises = [RunningNoise(3) for _ in range(3)]
    for data, iterations in ((loud, 60), (quiet, 10 * BLOCKS)):
        for t in range(iterations):
            estimate = estimate_here(noises, [data.gradient(rank, t, 0.0) for rank in range(3)])
        assert estimate is not None
        assert estimate.total_noise == pytest.approx(9.0 if data is loud else 1.0, rel=0.1)
        assert estimate.heterogeneity == pytest.approx(4.0, rel=0.15) if data is loud else estimate.heterogeneity < 0.03


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("stop", [0, 7, 10, 33])
def test_resumed_it_goes_on_bitwise(size: int, stop: int) -> None:
    """With an iteration that is seen and skipped on the way, which leaves no trace."""
    data = Synthetic(size, 600, 0.1, 1.0, 0.1, 0)
    gradients = [[data.gradient(rank, t, 0.01) for rank in range(size)] for t in range(45)]
    whole = [RunningNoise(size, seed=5) for _ in range(size)]
    wanted = [estimate_here(whole, ranks) for ranks in gradients]
    stopped = [RunningNoise(size, seed=5) for _ in range(size)]
    found = [estimate_here(stopped, ranks) for ranks in gradients[:stop]]
    resumed = [RunningNoise(size, seed=5) for _ in range(size)]
    for noise, other in zip(resumed, stopped, strict=True):
        stored = io.BytesIO()
        torch.save(storable(other.state_dict()), stored)
        stored.seek(0)
        noise.load_state_dict(restored(torch.load(stored, weights_only=True)))
        noise.see(np.full(600, 1e9, np.float32))
    found += [estimate_here(resumed, ranks) for ranks in gradients[stop:]]
    assert found == wanted
    assert wanted[-1] is not None


def test_states_and_values_that_do_not_fit() -> None:
    noise = RunningNoise(2)
    for other in (RunningNoise(2, width=5), RunningNoise(1), RunningNoise(2, block=50)):
        for _ in range(10):
            message = other.accept()
            if message is not None:
                other.take(message)
        with pytest.raises(ValueError, match="another size, or of another number of workers"):
            noise.load_state_dict(other.state_dict())
    assert noise.estimate is None
    values: dict[str, Any]
    for values, said in (
        ({"size": 0}, "`size` must be at least 1, got 0"),
        ({"size": 1, "width": 0}, "`width` must be at least 1, got 0"),
        ({"size": 1, "block": 1}, "`block` must be at least 2, got 1"),
        ({"size": 1, "blocks": 0}, "`blocks` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            RunningNoise(**values)
