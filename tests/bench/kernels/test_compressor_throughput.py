"""The benchmark of compressors: that it runs and records what its table shows. How fast anything is, no test says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import torch

from bench.kernels import compressor_throughput
from gradiveq.compressors import COMPRESSORS


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_registered_compressor_is_measured():
    kinds = {type(compressor_throughput.compressor_of(spec)) for spec in compressor_throughput.default_specs()}
    assert kinds == set(COMPRESSORS.values())


def test_a_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compressor_throughput, "SAMPLE_S", 1e-5)
    arguments = ["--sizes", "100", "5000", "--repeats", "2", "--ratios", "0.01", "1", "--methods", "topk:0.02,randomk"]
    compressor_throughput.main([*arguments, "--out", str(tmp_path / "new")])
    record = json.loads((tmp_path / "new" / "throughput.json").read_text())
    rows = [(row["method"], row["elements"], row["operation"]) for row in record["compressors"]]
    assert rows == [
        (method, size, operation)
        for size in (100, 5000)
        for method, operations in (
            ("topk:0.02", ("compress", "decompress", "add_to")),
            ("randomk", ("compress", "decompress")),
        )
        for operation in operations
    ]
    assert [row["density"] for row in record["compressors"]] == [0.02] * 3 + [0.01] * 2 + [0.02] * 3 + [0.01] * 2
    assert record["compressors"][-1]["payload_bytes"] == 4 * 50
    assert [(row["elements"], row["k"]) for row in record["selection"]] == [
        (100, 1),
        (100, 100),
        (5000, 50),
        (5000, 5000),
    ]
    for row in record["compressors"] + record["selection"]:
        assert 0 < row["of_copy"]["low"] <= row["of_copy"]["median"] <= row["of_copy"]["high"]
    table = (tmp_path / "new" / "table.md").read_text()
    assert table.count("topk:0.02") == 6
    assert "topk:0.02" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "topk,rar"], "'rar' is no compressor; these are identity"),
        (["--methods", "topk:2"], "`ratio` is the fraction"),
        (["--sizes", "0"], "--sizes and --repeats must be at least 1"),
        (["--ratios", "1.5"], r"--ratios must be in \(0, 1\]"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        compressor_throughput.main(arguments)
    assert re.search(message, capsys.readouterr().err)
