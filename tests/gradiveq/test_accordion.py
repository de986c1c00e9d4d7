"""ACCORDION's critical regimes against a plain restatement of its Algorithm 1 and of its authors' code."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from gradiveq.compressors.identity import Identity
from gradiveq.exchange.critical_regimes import CriticalRegimes
from gradiveq.exchange.parts import Part

Vector = npt.NDArray[np.float32]
LAYERS = [Part("a", 0, 3, Identity()), Part("b", 3, 10, Identity()), Part("c", 10, 12, Identity())]
LENGTH = 12


def gradient(iteration: int) -> Vector:
    """Layer a keeps its size, b halves and more every few iterations, c is zero at first."""
    values = np.random.default_rng(iteration).uniform(0.5, 1, LENGTH).astype(np.float32)
    values[3:10] *= np.float32(0.9**iteration)
    values[10:] *= np.float32(iteration >= 8)
    return values


def restated(interval: int, window: int, eta: float, rates: list[float]) -> list[list[bool]]:
    """What each iteration compresses less: the loop of the authors' main.py, with windows for its epochs."""
    low = [True] * 3
    previous: list[float] | None = None
    used, norms = [], np.zeros(3)
    total = np.zeros(LENGTH)
    for iteration, rate in enumerate(rates):
        if iteration and rate < rates[iteration - 1]:
            low = [True] * 3
        used.append(list(low))
        place = iteration % interval
        if place == 0:
            total = np.zeros(LENGTH)
        if place < window:
            total += gradient(iteration)
        if place == window - 1:
            norms = [float(np.linalg.norm(total[layer.start : layer.stop])) for layer in LAYERS]
            if previous is not None:
                low = [p == 0 or abs(p - n) / p >= eta for p, n in zip(previous, norms, strict=True)]
            previous = norms
    return used


def follow(regimes: CriticalRegimes, rates: list[float], start: int = 0) -> list[list[bool]]:
    used = []
    for iteration in range(start, len(rates)):
        used.append(regimes.critical_at(rates[iteration]))
        mean = gradient(iteration)
        regimes.accept(mean, rates[iteration])
        assert (mean == gradient(iteration)).all()
    return used


CONSTANT = [0.1] * 40
STEPS = [0.01 * i for i in range(1, 5)] + [0.1] * 13 + [0.01] * 13 + [0.001] * 10
FALLING = [1 - 0.01 * i for i in range(40)]


@pytest.mark.parametrize("rates", [CONSTANT, STEPS, FALLING])
@pytest.mark.parametrize(("interval", "window", "eta"), [(5, 5, 0.5), (6, 2, 0.5), (1, 1, 0.2), (7, 1, 0.9)])
def test_the_authors_loop(interval: int, window: int, eta: float, rates: list[float]) -> None:
    regimes = CriticalRegimes(LAYERS, interval=interval, window=window, eta=eta)
    used = follow(regimes, rates)
    assert used == restated(interval, window, eta, rates)
    if rates is FALLING:
        assert np.all(used)
    else:
        assert not np.all(used)  # some layers aren't critical some time
        assert np.any(used[interval + window :])


def test_the_log() -> None:
    regimes = CriticalRegimes(LAYERS, interval=5, eta=0.4)
    follow(regimes, [0.1] * 17 + [0.01] * 3)
    assert [(entry["iteration"], entry["cause"]) for entry in regimes.log] == [
        (4, "first"),
        (9, "norms"),
        (14, "norms"),
        (17, "lr"),
        (19, "norms"),
    ]
    first, second, third, decay, last = regimes.log
    assert first["critical"] == decay["critical"] == ["a", "b", "c"]
    assert first["changes"] == decay["changes"] == {}
    assert second["critical"] == ["b", "c"]
    assert second["changes"]["c"] is None
    assert second["changes"]["b"] == pytest.approx(1 - 0.9**5, abs=0.1)
    assert third["changes"]["c"] > 0.4  # two gradients in the window before, five in this
    assert last["critical"] == ["b"]


def test_state_dict_resumes() -> None:
    whole = CriticalRegimes(LAYERS, interval=6, window=4)
    used = follow(whole, STEPS)
    for stop in (0, 3, 5, 8, 17, 30):
        first = CriticalRegimes(LAYERS, interval=6, window=4)
        before = follow(first, STEPS[:stop])
        state = copy.deepcopy(first.state_dict())
        follow(first, STEPS, stop)  # what was copied isn't changed
        resumed = CriticalRegimes(LAYERS, interval=6, window=4)
        resumed.load_state_dict(state)
        assert before + follow(resumed, STEPS, stop) == used
        assert resumed.log == whole.log
    other = CriticalRegimes(LAYERS[:2], interval=6)
    with pytest.raises(ValueError, match="of 3 layers and 12 elements, this is of 2 and 10"):
        other.load_state_dict(whole.state_dict())


def test_asking_changes_nothing() -> None:
    regimes = CriticalRegimes(LAYERS, interval=5)
    follow(regimes, [0.1] * 12)
    before = regimes.state_dict()
    assert regimes.critical_at(0.1) == regimes.critical_at(0.2) == [False, False, True]
    assert regimes.critical_at(0.05) == [True] * 3
    after = regimes.state_dict()
    assert after.pop("sum").tobytes() == before.pop("sum").tobytes()
    assert after == before


def test_sums_beyond_float32_are_critical() -> None:
    regimes = CriticalRegimes([Part("a", 0, 2, Identity())], interval=2)
    for _ in range(6):
        regimes.accept(np.full(2, 3e38, np.float32), 0.1)
    assert regimes.critical == [True]


def test_no_layers() -> None:
    regimes = CriticalRegimes([], interval=2)
    for _ in range(4):
        regimes.accept(np.empty(0, np.float32), 0.1)
    assert regimes.critical_at(0.1) == []


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"interval": 0}, "`interval` must be a whole number of at least 1, got 0"),
        ({"interval": 2.5}, "`interval` must be a whole number"),
        ({"interval": 4, "window": 5}, r"`window` must be a whole number from 1 to 4 \(the interval\), got 5"),
        ({"interval": 4, "window": 0}, "`window` must be a whole number from 1 to 4"),
        ({"interval": 4, "eta": 0}, "`eta` must be a positive number, got 0"),
        ({"interval": 4, "eta": float("nan")}, "`eta` must be a positive number"),
    ],
)
def test_values_out_of_range(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CriticalRegimes(LAYERS, **values)
