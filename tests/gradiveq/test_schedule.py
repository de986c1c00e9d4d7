from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradiveq.methods import METHODS, GradiVeQ, Plain, QSGDRing
from gradiveq.pca.schedule import CHECK_EVERY, LossWatch, Schedule, majority
from gradiveq.powersgd import PowerSGD


def phases(schedule: Schedule, count: int, **advance: bool) -> list[str]:
    result = []
    for _ in range(count):
        result.append(schedule.phase)
        schedule.advance(**advance)
    return result


def test_phases_follow_each_other() -> None:
    schedule = Schedule(2, 3, 4)
    window = ["sample"] * 3 + ["compress"] * 4
    assert phases(schedule, 16) == ["warm-up"] * 2 + window * 2
    assert schedule.window == 2


def test_no_warmup_starts_with_samples() -> None:
    assert phases(Schedule(0, 2, 1), 4) == ["sample", "sample", "compress", "sample"]


def test_the_end_of_each_phase_is_reported() -> None:
    schedule = Schedule(1, 2, 3)
    assert [schedule.advance() for _ in range(6)] == [True, False, True, False, False, True]


def test_numbers_don_t_listen() -> None:
    schedule = Schedule(0, 3, 3)
    assert not schedule.check_due
    assert phases(schedule, 6, stable=True, stop=True) == ["sample"] * 3 + ["compress"] * 3


def test_automatic_lengths() -> None:
    schedule = Schedule(0, 1000, "auto", until_stable=True)
    checks = []
    for i in range(25):
        checks += [i] if schedule.check_due else []
        schedule.advance()
    assert checks == [CHECK_EVERY - 1, 2 * CHECK_EVERY - 1]
    assert schedule.advance(stable=True)
    assert phases(schedule, 50) == ["compress"] * 50
    assert schedule.advance(stop=True)
    assert (schedule.phase, schedule.window, schedule.done) == ("sample", 1, 0)


def test_automatic_sampling_is_bounded() -> None:
    assert phases(Schedule(0, 7, 1, until_stable=True), 8) == ["sample"] * 7 + ["compress"]


@given(
    warmup=st.integers(0, 5),
    sample=st.integers(2, 5),
    compress=st.integers(1, 5),
    before=st.integers(0, 30),
    after=st.integers(0, 15),
)
def test_state_goes_on_where_it_was(warmup: int, sample: int, compress: int, before: int, after: int) -> None:
    schedule, resumed = Schedule(warmup, sample, compress), Schedule(warmup, sample, compress)
    phases(schedule, before)
    resumed.load_state_dict(schedule.state_dict())
    assert phases(resumed, after) == phases(schedule, after)
    assert resumed.state_dict() == schedule.state_dict()


def test_unknown_phase_in_a_state() -> None:
    with pytest.raises(ValueError, match="`phase` must be 'warm-up', 'sample' or 'compress', got 'sleep'"):
        Schedule(0, 2, 1).load_state_dict({"phase": "sleep", "done": 0, "window": 0})


def test_a_worker_votes_when_its_loss_has_multiplied() -> None:
    watch = LossWatch(multiple=2.0)
    assert [watch.votes_to_stop(loss) for loss in (0.1, 0.05, 0.2, 0.21, 0.1)] == [False, False, False, True, False]
    assert watch.first == 0.1


def test_rounding_errors_are_no_loss() -> None:
    watch = LossWatch(multiple=2.0)
    assert [watch.votes_to_stop(loss) for loss in (0.0, 1e-7, 1e-3)] == [False, False, True]


def test_half_is_no_majority() -> None:
    assert [majority(votes, 4) for votes in range(5)] == [False, False, False, True, True]
    assert [majority(votes, 5) for votes in range(6)] == [False, False, False, True, True, True]
    assert majority(1, 1)


def test_methods_by_name() -> None:
    assert dict(METHODS) == {"rar": Plain, "qsgd": QSGDRing, "gradiveq": GradiVeQ, "powersgd": PowerSGD}


def test_defaults_are_the_paper_s() -> None:
    method = GradiVeQ()
    assert (method.warmup, method.sample, method.compress) == (2500, 100, 400)
    assert (method.sampling, method.reuse, method.loss_threshold) == (QSGDRing(4), math.inf, 0.01)
    assert GradiVeQ(ratio=8.0).loss_threshold is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"warmup": -1}, "`warmup` must be a whole number of at least 0, got -1"),
        ({"warmup": 1.5}, r"`warmup` must be a whole number of at least 0, got 1\.5"),
        ({"sample": 1}, "`sample` must be a whole number of at least 2, as PCA needs 2 samples, or 'auto', got 1"),
        ({"sample": "automatic"}, "`sample` must be .* or 'auto', got 'automatic'"),
        ({"compress": 0}, "`compress` must be a whole number of at least 1 or 'auto', got 0"),
        ({"max_sample": 1}, "`max_sample` must be a whole number of at least 2"),
        ({"holdout_every": -1}, "`holdout_every` must be a whole number of at least 0"),
        ({"stop_multiple": 1.0}, "`stop_multiple` must be above 1"),
        ({"stop_multiple": math.nan}, "`stop_multiple` must be above 1"),
        ({"stop_multiple": "2"}, "`stop_multiple` must be above 1, .* got '2'"),
        ({"sampling": "qsgd"}, r"`sampling` must be QSGDRing\(...\) or Plain\(\), got 'qsgd'"),
        ({"loss_threshold": 1.0}, r"`loss_threshold` must be in \[0, 1\), got 1\.0"),
        ({"ratio": 0.5}, "`ratio` must be at least 1"),
        ({"slice_size": 2.5}, "`slice_size` must be a whole number of at least 1"),
        ({"reuse": 0}, "`reuse` must be a whole number"),
        ({"fit_slices": "last"}, "`fit_slices` must be 'first' or 'all'"),
        ({"ratio": 8.0, "n_components": 3}, "only one of them can decide"),
        ({"sample": "auto", "ratio": 8.0}, "sample=.auto. waits for a stable number of .*, which `ratio` fixes"),
        ({"sample": "auto", "n_components": 8}, "which `n_components` fixes"),
    ],
)
def test_invalid_hyper_parameters(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradiVeQ(**arguments)


def test_invalid_quantisation() -> None:
    with pytest.raises(ValueError, match="`bits` must be one of"):
        QSGDRing(bits=3)
