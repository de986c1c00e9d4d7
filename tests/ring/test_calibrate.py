"""Calibration: fits of known models, files, and the commands under mpirun."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ring.calibrate import common_link, fit_link, message_sizes, residuals, unwritable
from ring.cluster import read
from ring.fit import LARGE_ERROR, fit_line, flag, quartiles, relative_errors, rounded, table
from ring.probe import LinkTimes, Stream, _waiting, burst_bytes
from tests.support.processes import Launch


def made_up(
    *, latency_s=40e-6, rate=1.25e8, overhead_s=3e-6, copy_s=2e-10, limited=True, half=False, noise=0.01, seed=0
) -> LinkTimes:
    """Timings of a link that is exactly as the model says, but for noise."""
    generator = np.random.default_rng(seed)
    sizes = message_sizes(4 << 20)
    times = LinkTimes(sizes, [size for size in sizes if size <= 512 << 10])
    stream_sizes = np.array(times.stream_sizes)

    def noisy(values):
        return np.asarray(values) * (1 + noise * generator.standard_normal((15, len(values))))

    end = overhead_s + copy_s * np.array(sizes)
    wire = np.array(sizes) / rate
    times.one_way = noisy(latency_s + 2 * end + wire)
    end, wire = end[: len(stream_sizes)], wire[: len(stream_sizes)]
    times.streams = {
        "one way": noisy(np.maximum(end, wire)),
        "both ways": noisy(np.maximum(2 * end, wire * (2 if half else 1))),
    }
    times.busy = noisy(end)
    times.waiting = np.full((15, len(stream_sizes)), 0.9 if limited else 0.0)
    return times


# Lines


def test_a_line_is_found_again_under_noise_over_six_powers_of_ten():
    generator = np.random.default_rng(1)
    x = np.array(message_sizes(4 << 20), np.float64)
    y = (30e-6 + x / 1.25e8) * (1 + 0.02 * generator.standard_normal(len(x)))
    line = fit_line(x, y)
    assert line.intercept == pytest.approx(30e-6, rel=0.03)
    assert line.slope == pytest.approx(1 / 1.25e8, rel=0.03)


def test_an_exact_line_is_exact():
    assert fit_line([0, 1, 10, 1e6], [2, 5, 32, 3e6 + 2]) == pytest.approx((2, 3), rel=1e-9)
    assert fit_line([1, 10], [3, 30], through_origin=True) == pytest.approx((0, 3))


def test_one_size_that_is_far_off_does_not_bend_the_line():
    x = np.array(message_sizes(4 << 20), np.float64)
    y = 30e-6 + x / 1.25e8
    y[6] *= 20
    line = fit_line(x, y)
    assert line.intercept == pytest.approx(30e-6, rel=0.05)
    assert line.slope == pytest.approx(1 / 1.25e8, rel=0.05)
    errors = relative_errors(y, line.at(x))
    assert [bool(flag(error)) for error in errors] == [i == 6 for i in range(len(x))]


def test_neither_part_of_a_line_is_negative():
    falling, below = fit_line([0, 1, 2], [3, 2, 1]), fit_line([1, 2, 4], [0.5, 2, 5])
    assert falling.slope == 0
    assert falling.intercept > 0
    assert below.intercept == 0
    assert below.slope > 0


@pytest.mark.parametrize(
    ("x", "y"), [([1], [1]), ([1, 1], [1, 2]), ([1, 2], [1]), ([1, 2], [0, 1]), ([1, 2], [1, np.nan])]
)
def test_what_no_line_goes_through_is_refused(x, y):
    with pytest.raises(ValueError, match=r"line needs|must be positive"):
        fit_line(x, y)


def test_flags_begin_behind_the_bound():
    assert not flag(LARGE_ERROR)
    assert flag(-LARGE_ERROR - 1e-9)


def test_small_things():
    assert quartiles([1, 2, 3, 4, 5]) == (2, 3, 4)
    assert rounded(123456) == 123500
    assert rounded(0.00012344) == 0.0001234
    assert table(("a", "bb"), [["10", "2", " <- note"], ["1", "3"]]) == " a  bb\n10   2 <- note\n 1   3"
    assert message_sizes(100_000)[-2:] == [65536, 100_000]


# Links


def test_a_link_that_limits_is_found_again():
    fit = fit_link(made_up())
    assert fit.limited_by == "link"
    assert fit.link.bandwidth_gbps == pytest.approx(1.0, rel=0.02)
    assert fit.link.latency_us == pytest.approx(40, rel=0.05)
    assert fit.overhead_s == pytest.approx(3e-6, rel=0.03)
    assert fit.copy_s == pytest.approx(2e-10, rel=0.05)
    assert fit.link.full_duplex


def test_a_link_behind_processors_is_found_again():
    times = made_up(latency_s=2e-6, rate=1e10, overhead_s=1e-6, copy_s=1e-10, limited=False)
    times.busy = times.one_way[:, : len(times.stream_sizes)] / 2  # both measure the same here
    fit = fit_link(times)
    assert fit.limited_by == "processor"
    for size, measured_s in zip(times.sizes, np.median(times.one_way, axis=0), strict=True):
        assert fit.one_way_s(size) == pytest.approx(measured_s, rel=0.15)


def test_a_port_that_is_not_full_duplex_is_found():
    assert not fit_link(made_up(half=True)).link.full_duplex


def test_residuals_name_the_sizes_that_the_model_misses():
    times = made_up(noise=0)
    times.one_way[:, times.sizes.index(16384)] *= 2
    fit = fit_link(times)
    missed = [line.split()[0] for line in residuals(times, fit).splitlines() if "misses" in line]
    assert missed == ["16384"]


def test_the_link_that_differs_is_written_apart():
    fits = [fit_link(made_up(seed=seed, rate=2.5e7 if seed == 2 else 1.25e8)) for seed in range(5)]
    base, others = common_link(fits)
    assert base.link.bandwidth_gbps == pytest.approx(1.0, rel=0.02)
    assert list(others) == [2]
    assert others[2].bandwidth_gbps == pytest.approx(0.2, rel=0.02)


def test_links_that_are_alike_are_written_once():
    assert common_link([fit_link(made_up(seed=seed)) for seed in range(5)])[1] == {}


@pytest.mark.parametrize("burst", [12_500, 125_000])
def test_a_token_bucket_is_found(burst):
    sizes, rate = [1 << power for power in range(12, 23)], 1.25e7
    added_s = np.maximum(0, np.array(sizes) - burst) / rate + 50e-6
    assert burst_bytes(sizes, added_s, rate) == pytest.approx(burst, rel=0.1)


def test_where_nothing_passes_at_once_there_is_no_bucket():
    sizes, rate = [1 << power for power in range(12, 23)], 1.25e7
    assert burst_bytes(sizes, np.array(sizes) / rate, rate) == 0
    assert burst_bytes(sizes, 1.2 * np.array(sizes) / rate, rate) == 0


def test_what_other_processes_took_is_not_waiting_for_the_link():
    assert _waiting(Stream(1.0, 1.0, 0.1, 0.0), Stream(1.0, 0.0, 0.2, 0.0)) == pytest.approx(0.8)
    assert _waiting(Stream(1.0, 1.0, 0.1, 0.5), Stream(1.0, 0.0, 0.2, 0.4)) == 0


# The command


SHORT = ["--max-bytes", "64K", "--repeats", "1", "--seconds", "0.01"]


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_file_is_written_that_the_emulator_can_use(mpirun: Launch, tmp_path: Path, ranks: int):
    out = tmp_path / "here.toml"
    done = mpirun(ranks, ["-m", "ring.calibrate", "--out", str(out), *SHORT], timeout_s=120)
    assert done.returncode == 0, done.stderr
    cluster = read(out)
    assert (cluster.name, cluster.nodes) == ("here", ranks)
    assert cluster.shared_cores is not None
    assert set(cluster.rates) == {"add", "copy", "scale"}
    assert cluster.node.overhead_us > 0
    assert cluster.node.copy_us_per_mib > 0
    assert f"mpirun -n {ranks} python -m ring.calibrate --out" in cluster.source
    assert "NumPy" in cluster.source
    rows = [line.split()[0] for line in done.stdout.partition("half a round trip")[2].splitlines() if line.strip()]
    assert rows[2:11] == ["0", "64", "512", "4096", "16384", "32768", "65536", "a", "bytes"]
    assert f"written to {out}" in done.stdout
    for link in range(ranks):
        assert f"{link}->{(link + 1) % ranks}" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.toml"]


@pytest.mark.parametrize(
    ("options", "story"),
    [
        (["--repeats", "0"], "--repeats"),
        (["--seconds", "nan"], "--seconds and --timeout must be positive"),
        (["--max-bytes", "1K"], "--max-bytes must be at least 65536"),
        (["--max-bytes", "x"], "a size is a positive number"),
        (["--out", "nowhere/here.toml"], "nowhere/here.toml can't be written"),
        (["--out", "."], "is a folder"),
        (["--wrong"], "unrecognized arguments"),
    ],
)
def test_what_can_t_be_used_is_one_line_and_status_2(mpirun: Launch, tmp_path: Path, options: list[str], story: str):
    done = mpirun(2, ["-m", "ring.calibrate", *options])
    assert done.returncode == 2
    assert [story in line for line in done.stderr.splitlines() if line.strip()] == [True]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_one_rank_has_no_network(mpirun: Launch, tmp_path: Path):
    done = mpirun(1, ["-m", "ring.calibrate", "--out", str(tmp_path / "here.toml")])
    assert done.returncode == 2
    assert "needs 2 ranks" in done.stderr


def test_a_silent_neighbour_ends_all_ranks(mpirun: Launch, tmp_path: Path):
    done = mpirun(
        2,
        """
        import sys, time
        from mpi4py import MPI
        from ring import probe
        from ring.calibrate import main
        if MPI.COMM_WORLD.rank == 1:
            probe.CalibrationProbe.link = lambda *arguments: time.sleep(60)
        main(["--timeout", "1", "--out", "here.toml"])
        """,
        timeout_s=50,
    )
    assert done.returncode != 0
    assert "gave up after 1 s" in done.stderr
    assert not (tmp_path / "here.toml").exists()


def test_where_nothing_can_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    assert "is a folder" in unwritable(tmp_path)
    assert "can't be written" in unwritable(tmp_path / "file" / "here.toml")
    assert unwritable(tmp_path / "here.toml") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
