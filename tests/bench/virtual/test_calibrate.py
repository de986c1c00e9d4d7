"""Calibration of codecs and iterations: rates, and the command that completes a cluster file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from bench.data import load
from bench.virtual import rates
from ring.cluster import Cluster, Link, Node, read, write
from tests.support.processes import Launch


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
    done = mpirun(2, ["-m", "tests.support.in_turn", "bench.calibrate", cases])
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
