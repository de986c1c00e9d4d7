"""The comparison between shaped hosts: it measures what it says, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.shaped import busbw as shaped_busbw
from bench.shaped.hosts import why_not

pytestmark = pytest.mark.slow

REFUSED = why_not()
here = pytest.mark.skipif(REFUSED is not None, reason=f"no hosts here: {REFUSED}")


@here
def test_a_short_comparison_is_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shaped_busbw, "AGGREGATION_S", 0.01)  # one call of each method, of the whole 16 MiB
    status = shaped_busbw.main(
        f"--hosts 2 3 --rates 1000 --max-bytes 256K --repeats 2 --seconds 0.01 --out {tmp_path}".split()
    )
    said = capsys.readouterr()
    assert status == 0, said.err
    recorded = json.loads((tmp_path / "busbw.json").read_text())
    assert [link["hosts"] for link in recorded["links"]] == [2, 3]
    assert "rate 1Gbit" in recorded["links"][0]["qdisc"]
    assert recorded["environment"]["command"].startswith("python -m bench.shaped_busbw --hosts 2 3")
    cells = {(row["hosts"], row["implementation"], row.get("size_bytes")) for row in recorded["rows"]}
    names = ("ring", "ring, caller's memory", "MPI_Allreduce", "Gloo")
    assert cells == {(hosts, name, size) for hosts in (2, 3) for name in names for size in (65536, 262144)} | {
        (2, "TCP stream", None),
        (3, "TCP stream", None),
    }
    for row in recorded["rows"]:
        assert row["rate_mbps"] == 1000
        if row["implementation"] == "TCP stream":
            assert 0 < row["bytes_per_s"] < 130e6
        else:
            assert row["wrong"] == 0
            assert len(row["times_s"]) == 2
            share = 2 * (row["hosts"] - 1) / row["hosts"]
            assert row["busbw_bytes_per_s"] == pytest.approx(share * row["size_bytes"] / row["time_s"])

    recorded = json.loads((tmp_path / "aggregation.json").read_text())
    for hosts in (2, 3):
        rows = {row["method"]: row for row in recorded["rows"] if row["hosts"] == hosts}
        assert rows.keys() == {"rar", "qsgd", "linear"}
        assert rows["rar"]["bytes_sent"] == pytest.approx(2 * (hosts - 1) / hosts * 4 * shaped_busbw.ELEMENTS)
        assert rows["rar"]["bytes_sent"] == pytest.approx(8 * rows["linear"]["bytes_sent"], rel=1e-4)
        assert rows["rar"]["times_faster"] == 1
        assert {"encode", "wait", "add", "decode"} <= rows["linear"]["spans_s"].keys()
        assert sum(rows["linear"]["spans_s"].values()) <= max(rows["linear"]["times_s"])
    assert "TCP stream" in said.out
    assert "x faster" in said.out


def test_sizes_stay_within_what_slow_links_carry() -> None:
    options = shaped_busbw.parse(["--min-bytes", "64K", "--max-bytes", "64M"])
    assert shaped_busbw.sizes(options, 6, 1000) == [65536 * 4**power for power in range(6)]
    assert shaped_busbw.sizes(options, 6, 100)[-1] == 16 << 20
    assert shaped_busbw.sizes(options, 6, 1) == [65536]


def test_where_hosts_can_not_be_built_it_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(shaped_busbw, "why_not", lambda: "network namespaces need root")
    assert shaped_busbw.main(["--out", str(tmp_path / "none")]) == 0
    assert capsys.readouterr().out == "skipped: network namespaces need root\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--hosts 1", "--hosts must be 2 to 6"),
        ("--min-bytes 1M --max-bytes 4K", "--max-bytes must be at least --min-bytes"),
        ("--seconds nan", "--seconds must be above 0"),
        ("--rates 0", "must be a positive whole number"),
        ("--parts speed", "invalid choice: 'speed'"),
    ],
)
def test_bad_options(options: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shaped_busbw.main(options.split())
    assert said in capsys.readouterr().err
