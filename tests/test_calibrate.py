"""Calibration: fits of known models, files, and the commands under mpirun."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, Launch

from bench.data import load
from bench.virtual import rates
from ring.calibrate import common_link, fit_link, message_sizes, residuals, unwritable
from ring.cluster import Cluster, Link, Node, read, write
from ring.fit import LARGE_ERROR, fit_line, flag, quartiles, relative_errors, rounded, table
from ring.probe import LinkTimes, Stream, _waiting, burst_bytes


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
            probe.Probe.link = lambda *arguments: time.sleep(60)
        main(["--timeout", "1", "--out", "here.toml"])
        """,
        timeout_s=50,
    )
    assert done.returncode != 0
    assert "gave up after 1 s" in done.stderr
    assert not (tmp_path / "here.toml").exists()


# Codecs and iterations


def measured(seconds_per_amount: float = 1e-9) -> rates.MeasuredRates:
    def case(name, amount):
        return rates.Case(f"{amount}", {name: amount, "copy": 1}, [seconds_per_amount * amount] * 3)

    return rates.MeasuredRates(
        {"forward": [1.0, 2.0, 3.0], "backward": [4.0]},
        [case("qsgd.encode", 1000), case("qsgd.encode", 4000)],
        [case("pca.encode", 5000)],
        [case("pca.encode", 70)],
    )


def test_rates_are_amounts_per_second():
    found = measured()
    assert found.rates() == pytest.approx({"qsgd.encode": 1e9, "pca.encode": 1e9})
    assert found.iteration_s == 6
    assert found.qsgd[0].predicted_s(found.rates()) is None
    assert found.qsgd[0].predicted_s({**found.rates(), "copy": 1e9}) == pytest.approx(1.001e-6)


def test_ranks_are_merged_and_missed_cases_flagged():
    merged = rates.merge([measured(1e-9), measured(1e-9), measured(9e-9)])
    assert merged.rates() == pytest.approx({"qsgd.encode": 1e9, "pca.encode": 1e9})
    assert len(merged.qsgd[0].seconds) == 9
    text = rates.report(merged, {"qsgd.encode": 1e9, "pca.encode": 2e9, "copy": 1e12})
    assert [line.split()[0] for line in text.splitlines() if "misses" in line] == ["pca.encode+copy"] * 2
    assert "no rate" in rates.report(merged, {"qsgd.encode": 1e9, "pca.encode": 2e9})


def test_amounts_are_those_of_the_codecs():
    dataset = load()
    layout, gradient, seconds = rates.iterations(dataset, "resnet20", 2, 1)
    assert set(seconds) == {"forward", "backward", "update"}
    assert np.isfinite(gradient).all()
    assert gradient.any()
    before = gradient.copy()
    cases = list(rates.model_cases(layout, gradient, 8.0, 1))
    # d = K/8 and every element of a convolution is in one slice: K*d multiplications for K elements
    expected = sum(block.length * (block.filters * block.depth // 8) for block in layout.blocks if block.compressed)
    encoded = [case.amounts["pca.encode"] for case in cases if "pca.encode" in case.amounts]
    assert encoded == pytest.approx([expected] * len(rates.WORKERS))
    assert np.array_equal(gradient, before)


@pytest.fixture
def cluster_file(tmp_path: Path) -> Path:
    cluster = Cluster("here", "measured", 3, node=Node(overhead_us=3.0), link=Link(latency_us=9.0), rates={"add": 1e9})
    write(dataclasses.replace(cluster, other_links={1: Link(latency_us=20.0)}), tmp_path / "here.toml")
    return tmp_path / "here.toml"


def test_a_file_is_completed_and_the_rest_of_it_kept(mpirun: Launch, cluster_file: Path):
    before = read(cluster_file)
    command = ["-m", "bench.calibrate", "--cluster", str(cluster_file), "--repeats", "1", "--model", "resnet20"]
    for ranks in (1, 2):
        done = mpirun(ranks, [*command, "--batch-size", "1"], timeout_s=240)
        assert done.returncode == 0, done.stderr
        after = read(cluster_file)
        added = {"qsgd.encode", "qsgd.recode", "qsgd.decode", "pca.encode", "pca.decode"}
        assert set(after.rates) == {"add", *added}
        assert after.node.iteration_s is not None
        assert after.source.startswith("measured; codecs and iteration ")
        assert after.source.count("; codecs and iteration ") == 1
        kept = dataclasses.replace(
            after,
            source=before.source,
            rates={"add": after.rates["add"]},
            node=dataclasses.replace(after.node, iteration_s=None),
        )
        assert kept == before
    assert [path.name for path in cluster_file.parent.iterdir()] == ["here.toml"]


#: Options, and what is said of them.
REFUSED = {
    "--repeats 0": "--repeats must be at least 1, got 0",
    "--model vgg": "--model must be one of",
    "--ratio 1": "--ratio must be above 1",
    "--batch-size 100000": "--batch-size must be at most",
    "--cluster nowhere.toml": "nowhere.toml: can't be read",
    "--wrong": "unrecognized arguments",
}


def test_what_can_t_be_completed_is_one_line_and_status_2(mpirun: Launch, cluster_file: Path):
    before = cluster_file.read_bytes()
    options = ["--cluster", str(cluster_file)]
    done = mpirun(2, ["-m", "bench.calibrate", *options, "--data", "nowhere"])
    assert done.returncode == 2
    assert ["nowhere: no such file" in line for line in done.stderr.splitlines() if line.strip()] == [True]
    # The others one after another, in one launch.
    cases = json.dumps([[*options, *refused.split()] for refused in REFUSED])
    done = mpirun(2, [str(ROOT / "tests" / "in_turn.py"), "bench.calibrate", cases])
    assert (done.returncode, done.stderr) == (0, "")
    for line, story in zip(done.stdout.splitlines(), REFUSED.values(), strict=True):
        said = json.loads(line)
        assert said["status"] == [2, 2]
        assert [story in line for line in said["stderr"][0].splitlines() if line.strip()] == [True]
        assert said["stderr"][1] == ""
        assert said["stdout"] == ["", ""]
        assert said["files"] == ["here.toml"]
    assert cluster_file.read_bytes() == before
    assert [path.name for path in cluster_file.parent.iterdir()] == ["here.toml"]


def test_where_nothing_can_be_written_is_told(tmp_path: Path):
    (tmp_path / "file").touch()
    assert "is a folder" in unwritable(tmp_path)
    assert "can't be written" in unwritable(tmp_path / "file" / "here.toml")
    assert unwritable(tmp_path / "here.toml") == ""
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
