"""The job on an emulated cluster: the same weights as ever, whether its workers are processes or threads."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.clusters import names
from bench.drawing import page as figure_page
from bench.job import figures as run_figures
from bench.job.emulated_cluster import choose, note
from bench.job.report import text
from ring import perfetto
from ring.cluster import ClusterError, parse, read
from tests.support.jobs import (
    DEADLINE_S,
    METHODS,
    SMALL,
    Cases,
    assert_refused,
    assert_the_same_run,
    environment,
    job,
    lines_of,
    refused,
    said_in_turn,
    stopped,
    timeless,
    write_idx,
)

pytestmark = pytest.mark.slow

#: Processor time that isn't in the table counts for almost nothing, so that seconds are the same in every run.
CLUSTER = """\
name = "two/racks of one"
source = "made up"
nodes = 2

[node]
iteration_s = 0.3
compute_speed = 1e9

[link]
bandwidth_gbps = 0.01
latency_us = 200.0
"""
SLOWER = """
[override.node.1]
iteration_s = 0.6
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with data and clusters."""
    folder = tmp_path_factory.mktemp("cluster")
    write_idx(folder / "data")
    (folder / "two.toml").write_text(CLUSTER)
    (folder / "uneven.toml").write_text(CLUSTER + SLOWER)
    (folder / "bad.toml").write_text(CLUSTER.replace("0.01", "-1"))
    (folder / "large.toml").write_text(CLUSTER.replace("nodes = 2", "nodes = 1000"))
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    """The same training as threads of one process that can't import MPI, as processes, and without any cluster."""
    blocked = folder / "no-mpi"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text("import sys\nsys.modules['mpi4py'] = None\n")
    path = f"{blocked}:{environment()['PYTHONPATH']}"
    arguments = [*SMALL, "--data", "data", "--threads", "1", "--progress", "none"]
    results = {
        "threads": job(
            1, [*arguments, "--cluster", "two.toml", "--trace", "--out", "threads"], folder, PYTHONPATH=path
        ),
        "processes": job(2, [*arguments, "--cluster", "two.toml", "--trace", "--out", "processes"], folder),
        "none": job(2, [*arguments, "--cluster", "none", "--out", "none"], folder),
    }
    for result in results.values():
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    return results


def summary_of(run: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def test_weights_are_the_same_bits(folder: Path, runs: dict[str, Any]) -> None:
    for method in METHODS:
        assert len({(folder / run / f"weights-{method}.pt").read_bytes() for run in runs}) == 1
        kept = [timeless(lines_of(folder / run, method)) for run in runs]
        assert kept[0] == kept[1] == kept[2]


def test_two_clocks_are_recorded(folder: Path, runs: dict[str, Any]) -> None:
    for run in ("threads", "processes"):
        summary = summary_of(folder / run)
        assert summary["one_process"] == (run == "threads")
        assert parse(summary["cluster"], "summary") == read(folder / "two.toml")
        for method, entry in summary["methods"].items():
            elapsed = 0.0
            for line in lines_of(folder / run, method):
                if line["type"] == "iteration":
                    elapsed += sum(line["virtual_seconds"].values()) - line["virtual_seconds"].get("measure", 0.0)
                    assert line["virtual_seconds"]["forward"] == pytest.approx(0.1, rel=1e-5)
                    assert line["virtual_seconds"]["backward"] == pytest.approx(0.2, rel=1e-5)
                assert line["virtual_s"] == pytest.approx(elapsed)
            virtual = entry["virtual"]
            assert virtual["time_s"] == pytest.approx(elapsed, rel=0.01)  # rank 0's and the mean
            for key in ("seconds", "groups"):
                measure = virtual[key]["measure"]
                assert sum(virtual[key].values()) - measure == pytest.approx(virtual["time_s"])
            phases = [part["virtual"]["time_s"] for part in entry["phases"].values()]
            assert sum(phases) == pytest.approx(virtual["time_s"])
            assert virtual["groups"]["compute"] == pytest.approx(0.3 * entry["iterations"], rel=1e-5)
        # 2 ranks send each other half of 311 KB twice, at 1.25 MB/s
        rar = summary["methods"]["rar"]
        sending_s = rar["bytes_per_iteration"] / 1.25e6
        assert rar["virtual"]["groups"]["exposed communication"] / rar["iterations"] == pytest.approx(
            sending_s, rel=0.02
        )
    one, two = (summary_of(folder / run)["methods"] for run in ("threads", "processes"))
    for method in METHODS:
        assert one[method]["virtual"]["time_s"] == pytest.approx(two[method]["virtual"]["time_s"], rel=1e-4)
    assert all("virtual" not in entry for entry in summary_of(folder / "none")["methods"].values())
    assert summary_of(folder / "none")["cluster"] is None


def test_tables_name_the_clock(folder: Path, runs: dict[str, Any]) -> None:
    here, there = "On this machine: seconds of training", "On two/racks of one, 2 nodes (emulated): seconds of training"
    for run, tables in (("threads", [there]), ("processes", [here, there]), ("none", [here])):
        printed = runs[run].stdout
        assert [line for line in printed.splitlines() if ": seconds of training" in line] == [
            f"{table}, mean over ranks; bytes sent per rank" for table in tables
        ]
        assert text(summary_of(folder / run), notes=False) in printed
    assert "2 nodes, is emulated (made up); computing takes 0.3 s an iteration there" in runs["threads"].stdout


def test_figures_by_the_clusters_clock(folder: Path, runs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figure_page, "DPI", 30)
    drawn = {run: [path.name for path in run_figures.draw(folder / run)] for run in runs}
    common = ["loss.png", "compression.png"]
    there = ["accuracy-two-racks-of-one.png", "breakdown-two-racks-of-one.png"]
    assert drawn["threads"] == [*there, *common]
    assert drawn["processes"] == ["accuracy.png", "breakdown.png", *there, *common]
    assert drawn["none"] == ["accuracy.png", "breakdown.png", *common]


def test_traces(folder: Path, runs: dict[str, Any]) -> None:
    there, here = "-two-racks-of-one.perfetto.json.gz", ".perfetto.json.gz"
    for run, endings in (("threads", [there]), ("processes", [there, here]), ("none", [])):
        names = {f"trace-{method}{ending}" for method in METHODS for ending in endings}
        assert {path.name for path in (folder / run).glob("trace-*")} == names
        for name in names:
            content = json.loads(gzip.decompress((folder / run / name).read_bytes()))
            perfetto.check(content)
            slices = [event for event in content["traceEvents"] if event["ph"] == "X"]
            kinds = {event["name"] for event in slices}
            assert {"forward", "backward", "update", "control", "wait"} <= kinds
            assert ("encode" in kinds) == ("-rar" not in name)
            if name.endswith(there):
                (forward, _) = [event["dur"] for event in slices if event["name"] == "forward"]  # of one iteration
                assert forward == pytest.approx(0.1e6, rel=1e-4)
                assert f"{name[6:].removesuffix(there)}, an iteration on two/racks of one, 2 nodes" in runs[run].stdout


@pytest.mark.parametrize("ranks", [1, 2], ids=["threads", "processes"])
def test_stopped_and_resumed(folder: Path, runs: dict[str, Any], ranks: int) -> None:
    run, expected = folder / f"stopped-{ranks}", folder / ("threads" if ranks == 1 else "processes")
    arguments = [*SMALL, "--data", "data", "--threads", "1", "--cluster", "two.toml", "--out", run.name]
    arguments += ["--methods", "gradiveq"]
    status = stopped(ranks, arguments, run, "gradiveq", signal.SIGINT)
    assert status == 130 or ranks > 1
    # The cluster is what it was when the run began, whatever has become of the file since.
    (folder / "two.toml").write_text(CLUSTER.replace("0.01", "7"))
    result = job(ranks, ["--resume", run.name, "--cluster", "two.toml"], folder)
    (folder / "two.toml").write_text(CLUSTER)
    assert result.returncode == 0, result.stderr
    assert_the_same_run(run, expected, ("gradiveq",))
    mine, theirs = lines_of(run, "gradiveq"), lines_of(expected, "gradiveq")
    # Two ranks tell each other in which iteration they are, once: 0.4 ms of latency.
    for line, other in zip(mine, theirs, strict=True):
        assert line["virtual_s"] == pytest.approx(other["virtual_s"], abs=5e-4)


def test_one_thread_that_fails_ends_all(folder: Path) -> None:
    arguments = ["--model", "resnet8", "--data", "data", "--methods", "rar", "--cluster", "two.toml", "--lr", "1e38"]
    refused(1, [*arguments, "--progress", "none"], folder, "non-finite gradient in iteration 1: conv1.weight", (1,))


PROGRAM = """\
import sys, time
from bench.common.launch import run_as_threads
def main(workers, ring, stop):
    workers.gather(workers.rank)
    print("here", flush=True)
    if sys.argv[1] == "interrupted":
        time.sleep(60)
    if sys.argv[1] == "unexpected" and workers.rank == 1:
        raise LookupError("rank 1 fell over")
    ring.barrier() if sys.argv[1] == "unexpected" else workers.gather(None, 0.2 if workers.rank else 0.1)
    if workers.rank == 0:
        time.sleep(1)
    workers.gather(None, 0.2)
sys.exit(run_as_threads(main, 3, timeout_s=30, chunk_bytes=4096))
"""


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("interrupted", 130, "interrupted\n"),
        ("unexpected", 1, "LookupError: rank 1 fell over\n"),
        ("late", 1, " waited 0.2 s for another rank\n"),
    ],
)
def test_how_threads_end(tmp_path: Path, how: str, status: int, message: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.readline()
    if how == "interrupted":
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status
    assert errors.endswith(message)
    assert how == "unexpected" or errors.count("\n") == 1


ALIKE = """\
import sys
from bench.common.launch import run_as_threads
from bench.common.workers import Failure
def main(workers, ring, stop):
    workers.gather(None)
    sys.stdout.write(f"{workers.rank}\\n")
    raise Failure("nothing fits", 3)
sys.exit(run_as_threads(main, 8, timeout_s=30, chunk_bytes=4096))
"""


def test_a_failure_that_all_threads_have_keeps_none_of_them_from_tidying_up(tmp_path: Path) -> None:
    process = subprocess.run(
        [sys.executable, "-c", ALIKE], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (process.returncode, process.stderr) == (3, "error: nothing fits\n")
    assert sorted(process.stdout.split()) == [str(rank) for rank in range(8)]


HERE = ["--model", "resnet8", "--data", "data", "--cluster"]
EITHER_WAY: Cases = {
    "nowhere": ([*HERE, "nowhere"], "there is no cluster 'nowhere': give gradiveq-cpu, gradiveq-k80"),
    "bad": ([*HERE, "bad.toml"], "bad.toml: `link.bandwidth_gbps` must be above 0, got -1"),
}
ONE_RANK = EITHER_WAY | {
    "of two ranks": (["--resume", "processes"], "the run in processes has 2 ranks, now there are 1"),
}
TWO_RANKS = EITHER_WAY | {
    "of one process": (["--resume", "threads"], "the run in threads was begun without mpirun"),
}


@pytest.mark.usefixtures("runs")
@pytest.mark.parametrize(("ranks", "cases"), [(1, ONE_RANK), (2, TWO_RANKS)], ids=["threads", "processes"])
def test_what_is_refused(folder: Path, ranks: int, cases: Cases) -> None:
    refusals = said_in_turn(ranks, cases, folder)
    for name, (_, message) in cases.items():
        assert len(refusals[name]["status"]) == ranks
        assert_refused(refusals[name], message)


def test_a_number_of_nodes_that_is_refused(folder: Path) -> None:
    message = "uneven.toml: `nodes` is 2, some of which are described one by one"
    refused(3, [*HERE, "uneven.toml"], folder, message)


def test_the_cluster_that_is_chosen(folder: Path) -> None:
    assert choose("none", {}, 6) is None
    default = choose(None, {}, 6)
    assert default is not None
    assert (default.name, default.nodes) == ("gradiveq-cpu", 6)
    fewer = choose(None, {}, 2)
    assert fewer is not None
    assert fewer.nodes == 2
    assert fewer.source == f"{default.source}; with 2 nodes instead of 6"
    assert fewer.source in note(fewer)
    two = str(folder / "two.toml")
    recorded = {"cluster": {"name": "as it was", "nodes": 2}}
    assert choose(two, recorded, 2) == parse(recorded["cluster"], "")
    for name in names():
        assert choose(name, {}, None) is not None
    large = choose(str(folder / "large.toml"), {}, None)
    assert large is not None
    assert large.nodes == 1000
    with pytest.raises(ClusterError, match="described one by one"):
        choose(str(folder / "uneven.toml"), {}, 3)


def test_whose_seconds_encoding_takes_is_told(folder: Path, runs: dict[str, Any]) -> None:
    summary = summary_of(folder / "threads")
    assert "compressors in the processor time" not in text(summary)
    summary["cluster"]["rates"] = {"qsgd.encode": 1e9}
    summary["methods"]["rar"]["compression"] = {"density": 1.0, "relative_error": 0.0}
    assert "QSGD in the ring and GradiVeQ encode and decode at the cluster's rates, compressors in the" in text(summary)
