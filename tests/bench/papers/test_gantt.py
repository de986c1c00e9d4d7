"""The picture of Fig. 2: from short real runs, and from what an earlier one has written."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib import image

from bench.drawing import page as figure_page
from bench.papers.gradiveq import gantt, gantt_figure
from ring import Codec, Timeline, perfetto
from ring.cluster import Cluster, Link
from ring.lockstep import LockstepRing, run
from ring.trace import RunTrace, keeping, records
from ring.virtual import VirtualRing
from tests.support.processes import ROOT, Launch
from tests.support.toy_codecs import HalfPerHop, PairSums

pytestmark = pytest.mark.slow

SHORT = ["--slice-size", "64", "--sample", "4", "--batch-size", "1", "--repeats", "3", "--chunks", "2"]
CLUSTER = """
name = "three"
source = "made up"
nodes = 3
[link]
latency_us = 20.0
bandwidth_gbps = 1.0
"""


def recorded(codec: Codec, virtual: bool, chunk_bytes: int) -> dict[str, Any]:
    def work(ring: LockstepRing) -> dict[str, Any]:
        described = Cluster(nodes=3, link=Link(latency_us=10, bandwidth_gbps=0.1))
        emulated = VirtualRing(ring, described)
        timeline = Timeline(virtual=Timeline(emulated.clock))
        with keeping(timeline):
            emulated.all_reduce(np.ones(3000, np.float32), codec, timeline=timeline, chunk_bytes=chunk_bytes)
        return records(timeline.virtual if virtual else timeline)

    return RunTrace("virtual" if virtual else "wall", run(3, work)).as_json()


def record(virtual: bool) -> dict[str, Any]:
    panels = [
        {
            "method": method,
            "codec": "toy",
            "chunks": chunks,
            "bytes_sent": 1234,
            "loss": 0.25,
            "lengths_s": [0.001, 0.002],
            "trace": recorded(codec, virtual, chunk_bytes),
        }
        for method, codec, chunks, chunk_bytes in (("qsgd", HalfPerHop(), 1, 10**9), ("gradiveq", PairSums(), 4, 500))
    ]
    return {
        "figure": "2",
        "cluster": {"name": "slow", "source": "made up"} if virtual else None,
        "ranks": 3,
        "model": "resnet32",
        "data_source": "a sample",
        "batch_size": 1,
        "ratio": 8.0,
        "slice_size": 64,
        "panels": panels,
        "environment": {
            "cpu": "a processor",
            "cores": 2,
            "mpi": None if virtual else "MPICH",
            "seed": 5,
            "commit": "0123456789abcdef",
            "command": "python -m bench.gantt",
        },
    }


@pytest.mark.parametrize("virtual", [True, False])
def test_a_picture_is_drawn_from_a_record_and_again_with_the_same_bytes(
    virtual: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    captions: list[str] = []
    page = figure_page.new_figure

    def watched(width: float, height: float, title: str, caption: str):
        captions.append(f"{title}\n{caption}")
        return page(width, height, title, caption)

    monkeypatch.setattr(figure_page, "new_figure", watched)
    written = gantt.write_all(record(virtual), tmp_path, "x")
    assert [path.name for path in written] == ["x.json", "x.png", "x-qsgd.perfetto.json", "x-gradiveq.perfetto.json"]
    pixels = image.imread(tmp_path / "x.png")
    assert pixels.shape[1] == 12.5 * figure_page.DPI
    assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 50
    for path in written[2:]:
        perfetto.check(json.loads(path.read_text()))
    text = capsys.readouterr().out
    assert "QSGD in the ring, 1 chunk a segment: " in text
    assert "GradiVeQ, 4 chunks a segment: " in text
    assert ("not known" in text) != virtual
    assert "a sample, 1 images a rank" in captions[0]
    assert "Seed 5" in captions[0] or "seed 5" in captions[0]
    assert ("cluster slow (made up)" in captions[0]) == virtual
    assert ("more ranks than cores" in captions[0]) != virtual

    before = (tmp_path / "x.png").read_bytes()
    (tmp_path / "x.png").unlink()
    assert gantt.main(["--draw", str(tmp_path / "x.json")]) == 0
    assert (tmp_path / "x.png").read_bytes() == before


def test_the_detail_covers_the_steps_messages_and_computations():
    trace = RunTrace.from_json(record(True)["panels"][0]["trace"])
    step, start_s, end_s = gantt_figure._detail(trace)
    assert step == 1
    received = next(m for m in trace.transfers[2] if m.step == 0)
    sent = next(m for m in trace.transfers[0] if m.step == 1)
    (recode,) = (a for a in trace.activities[0] if a.kind == "recode" and a.step == 1)
    assert start_s <= received.departed_s < received.left_s <= recode.start_s < recode.end_s <= sent.departed_s
    assert end_s == sent.left_s


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a --cluster, or start this under mpirun"),
        (["--cluster", "nowhere"], "there is no cluster 'nowhere'"),
        (["--chunks", "0"], "--chunks must be at least 1, got 0"),
        (["--ratio", "nan"], "--ratio must be at least 1, got nan"),
        (["--draw", "nowhere.json"], "nowhere.json can't be read"),
    ],
)
def test_what_cant_be_used_is_told_in_a_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gantt, "limit_threads", lambda threads: None)
        assert gantt.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error


def test_damaged_records_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for content in ('{"figure": "4"}', '{"figure": "2"}', "[]"):
        (tmp_path / "x.json").write_text(content)
        assert gantt.main(["--draw", str(tmp_path / "x.json")]) == 2
        assert str(tmp_path / "x.json") in capsys.readouterr().err


def assert_written(folder: Path, name: str, clock: str, ranks: int) -> None:
    written = json.loads((folder / f"{name}.json").read_text())
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert written["ranks"] == ranks
    for panel in written["panels"]:
        trace = RunTrace.from_json(panel["trace"])
        assert (trace.clock, trace.size) == (clock, ranks)
        assert 0 < panel["loss"] < 1
        assert sum(m.num_bytes for m in trace.transfers[0]) == panel["bytes_sent"]
        start_s, end_s = trace.span()
        assert end_s - start_s == pytest.approx(sorted(panel["lengths_s"])[1])
        (path,) = folder.glob(f"{name}-{panel['method']}.perfetto.json*")
        data = path.read_bytes()
        perfetto.check(json.loads(gzip.decompress(data) if path.suffix == ".gz" else data))
    qsgd, gradiveq = (RunTrace.from_json(panel["trace"]) for panel in written["panels"])
    assert len(qsgd.transfers[0]) == 2 * ranks - 2
    assert len(gradiveq.transfers[0]) > 2 * ranks - 2
    assert {a.kind for a in qsgd.activities[0]} - {"wait"} == {"encode", "recode", "decode"}
    assert {a.kind for a in gradiveq.activities[0]} - {"wait"} == {"encode", "add", "decode"}


def test_over_mpi(mpirun: Launch, tmp_path: Path):
    result = mpirun(2, ["-m", "bench.gantt", *SHORT, "--out", "out"], timeout_s=120)
    assert result.returncode == 0, result.stderr
    assert "rank    exposed (ms)    hidden (ms)" in result.stdout
    assert_written(tmp_path / "out", "mpi-2", "wall", 2)


def test_in_virtual_time_without_mpi(tmp_path: Path):
    (tmp_path / "three.toml").write_text(CLUSTER)
    result = subprocess.run(
        [sys.executable, "-m", "bench.gantt", *SHORT, "--cluster", "three.toml", "--out", "out"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert_written(tmp_path / "out", "three", "virtual", 3)
