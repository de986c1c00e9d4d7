"""Where compression pays, by number of nodes and by bandwidth."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bench import clusters
from bench.models import resnet_cifar
from bench.virtual import scaling
from bench.virtual.method_times import METHODS, PHASES, Gradient, build, iteration_s
from bench.virtual.scaling import PAYS, Point, Sweep, crossings, stretches
from ring import dry
from ring.cluster import Cluster, ClusterError, Node, Racks, read, write
from ring.codec import IdentityCodec
from tests.support.redrawn import check_drawn_again

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gradient() -> Gradient:
    return Gradient.of(resnet_cifar(8, 100))


def sweep_of(what: str, gradient: Gradient, base: Cluster | None = None) -> Sweep:
    cluster = base or clusters.load("gradiveq-k80")
    return Sweep(what, cluster, gradient, iteration_s(cluster))


def imagined(whole: bool, seconds: Any) -> Any:
    """A sweep whose plain ring takes 1 s, and QSGD what a function of x says."""
    return SimpleNamespace(whole=whole, at=lambda x: Point(x, {"rar": 1.0, "qsgd": seconds(x), "gradiveq": 1.0}, 1.0))


def faster(point: Point) -> bool:
    return point.speedup("qsgd") > 1


def test_stretches_end_where_the_curve_crosses() -> None:
    sweep = imagined(True, lambda n: 0.5 if 37 <= n <= 4_711 else 2.0)
    points = [sweep.at(float(10**i)) for i in range(6)]
    assert stretches(points, sweep, faster) == [(37, 4_711)]
    assert stretches(points, sweep, lambda point: not faster(point)) == [(None, 36), (4_712, None)]
    assert stretches(points, sweep, lambda point: True) == [(None, None)]
    assert stretches(points, sweep, lambda point: False) == []


def test_crossings_between_whole_numbers_are_found_to_a_thousandth() -> None:
    sweep = imagined(False, lambda gbps: gbps / 3)
    ((begin, end),) = stretches([sweep.at(x) for x in (0.01, 1.0, 10.0)], sweep, faster)
    assert begin is None
    assert end == pytest.approx(3, rel=1.1e-3)


def test_a_point_is_the_mean_over_a_window(gradient: Gradient) -> None:
    sweep = sweep_of("nodes", gradient)
    point = sweep.at(6)
    each = {phase: gradient.aggregation(sweep.base, phase).time_s for phase in PHASES}
    adding_nothing = replace(sweep.base, rates={**sweep.base.rates, "add": 1e300})
    bases = dry.all_reduce(adding_nothing, IdentityCodec(), gradient.basis_bytes // 4)
    window = 100 * each["qsgd"] + 400 * each["compress"] + bases.time_s / 2
    computing_s = 0.216667
    assert point.iteration_s["rar"] == pytest.approx(computing_s + each["rar"])
    assert point.iteration_s["qsgd"] == pytest.approx(computing_s + each["qsgd"])
    assert point.iteration_s["gradiveq"] == pytest.approx(computing_s + window / 500)
    assert point.compressed_s == pytest.approx(computing_s + each["compress"])


def test_the_bases_are_gathered_at_the_links_speed(gradient: Gradient) -> None:
    cluster = clusters.load("gradiveq-cpu").with_nodes(4)
    sent_s = 3 / 4 * gradient.basis_bytes / cluster.link.bytes_per_s
    assert gradient.share_s(cluster) == pytest.approx(sent_s, rel=0.01)
    assert gradient.share_s(cluster.with_nodes(1)) == 0


def test_the_sweeps_reach_from_end_to_end(gradient: Gradient) -> None:
    nodes, bandwidth = (sweep_of(what, gradient).grid() for what in ("nodes", "bandwidth"))
    assert nodes[:8] == list(range(1, 9))
    assert nodes[-1] == 100_000
    assert all(x == int(x) for x in nodes)
    assert (bandwidth[0], bandwidth[-1]) == (0.01, pytest.approx(400))
    for grid in (nodes, bandwidth):
        assert grid == sorted(set(grid))
    shared = clusters.load("v100-8gpu").with_nodes(8, racks=Racks(4, 10.0))
    assert sweep_of("nodes", gradient, shared).grid()[-1] == 256


@pytest.mark.parametrize("phase", PHASES)
def test_counting_goes_over_into_the_closed_form(gradient: Gradient, phase: str) -> None:
    cluster = clusters.load("gradiveq-k80").with_nodes(scaling.COUNTED)
    counted, closed = (gradient.aggregation(cluster, phase, run) for run in (dry.all_reduce, dry.closed_form))
    assert not counted.closed_form
    assert closed.time_s == pytest.approx(counted.time_s, rel=0.01)


@pytest.mark.parametrize("phase", PHASES)
def test_the_few_segments_that_have_a_slice_set_the_pace(
    gradient: Gradient, phase: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 20,000 segments of a short vector most are empty; the closed form must not look at empty ones only."""
    cluster = clusters.load("gradiveq-k80").with_nodes(20_000)
    sampled_s = gradient.aggregation(cluster, phase, dry.closed_form).time_s
    monkeypatch.setattr(dry, "MOST_SEGMENTS", cluster.nodes)
    assert sampled_s == pytest.approx(gradient.aggregation(cluster, phase, dry.closed_form).time_s, rel=0.01)


def test_compression_pays_on_a_slow_link_and_stops_where_it_says(gradient: Gradient) -> None:
    sweep = sweep_of("bandwidth", gradient)
    found = crossings([sweep.at(x) for x in sweep.grid()], sweep)
    for method in METHODS[1:]:
        ((begin, end),) = found[method]["pays"]
        assert begin is None
        assert sweep.at(0.998 * end).speedup(method) > PAYS > sweep.at(1.002 * end).speedup(method)
        ((begin, last),) = found[method]["slower"]
        assert last is None
        assert sweep.at(0.998 * begin).speedup(method) > 1 > sweep.at(1.002 * begin).speedup(method)
        assert found[method]["most"]["x"] == 0.01


def test_many_nodes_are_slower_with_compression(gradient: Gradient) -> None:
    sweep = sweep_of("nodes", gradient)
    many, latency_s = sweep.at(100_000), 2 * 99_999 * 100e-6
    assert many.iteration_s["rar"] > latency_s
    assert many.iteration_s["rar"] < many.iteration_s["qsgd"] < many.iteration_s["gradiveq"]
    longest = 2048 / sweep.base.link.bytes_per_s
    assert many.compressed_s == pytest.approx(latency_s + 2 * 99_999 * longest, rel=0.01)


def test_words_say_where() -> None:
    sweep = imagined(False, lambda gbps: 1.0)
    sweep.what = "bandwidth"
    found = {"qsgd": {"pays": [(None, 0.0737), (2.0, 5.0)], "slower": [], "most": {"x": 0.01, "speedup": 3.0}}}
    (line,) = scaling.words(sweep, found)
    assert "up to 73.7 Mbit/s, from 2 Gbit/s to 5 Gbit/s; most at 10 Mbit/s, 3.00 times" in line
    assert line.endswith("slower than plain nowhere.")


def test_it_writes_numbers_and_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = clusters.load("gradiveq-cpu").with_nodes(4, name="racks", racks=Racks(2, 0.01))
    write(shared, tmp_path / "racks.toml")
    assert read(tmp_path / "racks.toml") == shared
    out = tmp_path / "new" / "folder"
    arguments = ["--cluster", str(tmp_path / "racks.toml"), "--model", "resnet20", "--batch", "2", "--out", str(out)]
    monkeypatch.setattr(scaling, "MOST_COUNTED", 8)
    monkeypatch.setattr(scaling, "PER_DECADE", 1)
    assert scaling.main(arguments) == 0
    text = capsys.readouterr().out
    assert "resnet20 on racks, 4 nodes" in text
    assert "2(N-1)" not in text
    assert sorted(path.name for path in out.iterdir()) == ["bandwidth.png", "nodes.png", "scaling.json"]
    check_drawn_again(out)
    record = json.loads((out / "scaling.json").read_text())
    assert record["computing_s"] == pytest.approx(2 * 1.3)
    assert record["cluster"]["racks"]["size"] == 2
    points = record["sweeps"]["nodes"]["points"]
    assert [point["x"] for point in points] == list(range(1, 9))
    for point in points:
        for method, speedup in point["speedup"].items():
            assert speedup == pytest.approx(point["iteration_s"]["rar"] / point["iteration_s"][method])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--cluster", "v100"], "there is no cluster 'v100': give gradiveq-cpu"),
        (["--model", "vgg"], "`model` must be one of resnet20"),
        (["--ratio", "0.5"], "`ratio` must be at least 1, got 0.5"),
        (["--batch", "-1"], "argument --batch: must be a positive number, got -1"),
        (["--batch", "many"], "argument --batch: must be a positive number, got many"),
        (["--iteration-s", "inf"], "argument --iteration-s: must be a positive number, got inf"),
        (["--bandwidth", "1"], "unrecognized arguments"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}")
    assert error.count("\n") == 1


def test_a_cluster_has_to_say_what_an_iteration_computes() -> None:
    cluster = clusters.load("v100-8gpu")
    assert iteration_s(cluster.with_nodes(8, node={"slowdown": 2.0})) == 2 * 0.0946
    with pytest.raises(ClusterError, match=r"v100-8gpu .*`node.iteration_s` is missing"):
        iteration_s(cluster.with_nodes(8, node=Node()))


def test_models_are_those_of_the_job() -> None:
    assert Gradient.of(build("resnet32")).length == 470_004 + 2
