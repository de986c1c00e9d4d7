"""PyTorch's hooks beside ours: the command under torchrun, the bytes it counts, and how it finds equal ones."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.common.statistics import Quartiles
from bench.hooks import command as ddp
from bench.hooks.command import METHODS, RATIOS, main, parse, skipped
from bench.hooks.equal_bytes import (
    PLAIN,
    TOLERANCE,
    Entry,
    Handed,
    Length,
    blocks_of,
    entries,
    filled,
    iteration_bytes,
    method_of,
    run_bytes,
)
from bench.hooks.figures import family
from bench.hooks.findings import BELOW_PLAIN, Row, extras_table, group_table, methods_table, rows
from bench.hooks.runs import SAMPLING, TIME, TRAIN, wire_bytes
from bench.models import MODELS
from gradiveq.compressors.topk import TopK
from tests.support.images import write_images
from tests.support.redrawn import check_drawn_again

pytestmark = pytest.mark.slow

BLOCKS = blocks_of(MODELS["alexnet"](10, width=0.25))
ELEMENTS = sum(block.length for block in BLOCKS)
LENGTH = Length(300, 2, 2)


# --- equal bytes -----------------------------------------------------------------------------------------------------


def test_what_is_sent_depends_on_the_collective() -> None:
    handed = Handed(all_reduce=100, all_gather=10, broadcast=8)
    assert handed.sent(2) == 100 + 10 + 4
    assert handed.sent(4) == 150 + 30 + 6
    assert handed.sent(1) == handed.sent(2)


def test_the_bytes_of_an_iteration() -> None:
    """Against sums by hand."""
    matrices = [(block.shape[0], math.prod(block.shape[1:])) for block in BLOCKS if len(block.shape) > 1]
    vectors = sum(block.length for block in BLOCKS if len(block.shape) == 1)
    assert [n * m for n, m in matrices] == [432, 6912, 41472, 55296, 36864, 640]
    assert iteration_bytes(PLAIN, BLOCKS) == iteration_bytes("rar", BLOCKS) == Handed(4 * ELEMENTS)
    assert iteration_bytes("torch:fp16", BLOCKS) == iteration_bytes("half", BLOCKS) == Handed(2 * ELEMENTS)
    by_hand = vectors + sum(min(2 * (n + m), n * m) if n * m > 2 * 2 * (n + m) else n * m for n, m in matrices)
    assert iteration_bytes("torch:powersgd:2", BLOCKS) == Handed(4 * by_hand)
    assert iteration_bytes("powersgd:2:min_compression_rate=2", BLOCKS) == Handed(4 * by_hand)
    kept = sum(TopK(0.01).payload_bytes(block.length) for block in BLOCKS)
    assert iteration_bytes("topk:0.01+ef", BLOCKS) == Handed(all_gather=kept + 8)
    biases = [block.length for block in BLOCKS if block.name.endswith(".bias")]
    weights = kept - sum(TopK(0.01).payload_bytes(length) for length in biases)
    mixed = iteration_bytes("topk:0.01/*.bias=identity+ef", BLOCKS)
    assert mixed == Handed(all_reduce=4 * sum(biases), all_gather=weights + 8)
    coded = sum(-(-n * m // 256) * 32 if n * m > 432 else 32 * 2 for n, m in matrices[:-1])
    assert iteration_bytes("gradiveq:ratio=8:slice_size=256", BLOCKS) == Handed(4 * (coded + 640 + vectors))


def test_a_runs_bytes_count_what_goes_uncompressed_and_the_bases() -> None:
    dense = 4 * ELEMENTS
    half = run_bytes("half", BLOCKS, LENGTH)
    assert half.all_reduce == pytest.approx((2 * dense + 298 * dense / 2) / 300)
    text = "gradiveq:ratio=16:fit_slices=all:slice_size=256:sample=10:compress=90"
    each = iteration_bytes(text, BLOCKS).all_reduce
    windows = [(10, 90), (10, 90), (10, 88)]
    found = run_bytes(text, BLOCKS, LENGTH)
    sampled, compressed = (sum(part) for part in zip(*windows, strict=True))
    assert found.all_reduce == pytest.approx(((2 + sampled) * dense + compressed * each) / 300)
    assert found.broadcast == pytest.approx(3 * 4 * 5 * (1 + 16 + 16 * 256) / 300)
    assert method_of(text, 2).warmup == 2
    later = run_bytes(f"{text}:warmup=12", BLOCKS, LENGTH)
    assert later.all_reduce == pytest.approx(((12 + 30) * dense + 258 * each) / 300)
    with pytest.raises(ValueError, match="`ratio` must be at least"):
        run_bytes("gradiveq:ratio=8:slice_size=256:sample=10", BLOCKS, LENGTH)  # of one slice at most 9 components
    with pytest.raises(ValueError, match="must be numbers"):
        run_bytes("gradiveq:sample=auto:loss_threshold=0.1", BLOCKS, LENGTH)
    with pytest.raises(ValueError, match="loss threshold"):
        run_bytes("gradiveq:loss_threshold=0.1", BLOCKS, LENGTH)


def test_the_number_is_the_closest_one() -> None:
    """Also where bytes fall with the number, and where some numbers are none."""

    def square(text: str) -> float:
        return float(text.removeprefix("topk:")) ** 2

    assert filled("topk:?", 0.25, square) == "topk:0.5"
    assert filled("topk:?", 9.0, square) == "topk:1"
    assert filled("powersgd:?", 24.0, lambda text: float(text[9:]) ** 2) == "powersgd:5"

    def falling(text: str) -> float:
        ratio = float(text.removeprefix("gradiveq:ratio="))
        if ratio < 20:
            raise ValueError("too few samples")
        return 1000 / ratio

    assert filled("gradiveq:ratio=?", 25.0, falling) == "gradiveq:ratio=40"
    assert filled("gradiveq:ratio=?", 900.0, falling) == "gradiveq:ratio=20"
    with pytest.raises(ValueError, match="one \\? may stand"):
        filled("topk:?:?", 1.0, square)
    with pytest.raises(ValueError, match="unknown method"):
        filled("nothing:?", 1.0, lambda text: float(bool(method_of(text, 2))))


def test_the_default_methods_are_compared_at_equal_bytes() -> None:
    found, left_out = entries(METHODS, RATIOS, BLOCKS, Length(400, 2, 2))
    assert found[0] == Entry(PLAIN, None, 1.0)
    for ratio in RATIOS:
        group = [entry for entry in found if entry.ratio == ratio]
        for name in ("torch:powersgd:", "powersgd:", "topk:", "gradiveq:"):
            assert sum(entry.text.startswith(name) for entry in group) == 1, name
        assert all(abs(entry.expected - 1) <= TOLERANCE for entry in group)
    same = {entry.text: entry.expected for entry in found}
    assert same["torch:fp16"] == same["half"]
    # samples go uncompressed, and 20 of them alone are more than 1/25 of 400
    template = next(one for one in METHODS if one.startswith("gradiveq:ratio=?"))
    assert [line.partition(": the nearest")[0] for line in left_out] == [f"{template} at 1/25"]
    with pytest.raises(ValueError, match="comes twice"):
        entries([PLAIN, "half", "half"], RATIOS, BLOCKS, LENGTH)


# --- rows and tables -------------------------------------------------------------------------------------------------


def trained(method: str, seed: int, accuracies: list[float], handed: Handed) -> dict[str, Any]:
    total = [sum(handed) * 50 * (i + 1) for i in range(len(accuracies))]
    return {
        "spec": {"kind": TRAIN, "method": method, "seed": seed},
        "result": {
            "handed": handed._asdict(),
            "compressed": handed._asdict(),
            "evaluations": [
                {"accuracy": accuracy, "handed": bytes_} for accuracy, bytes_ in zip(accuracies, total, strict=True)
            ],
            "diverged": False,
        },
    }


def timed(rate: float | None, times: dict[str, list[float]], **more: Any) -> dict[str, Any]:
    result = {"times_s": times, "defaults_s": {}, "wire": {}, **more}
    return {"spec": {"kind": TIME, "rate_mbps": rate, "rounds": 3}, "result": result}


def test_rows_and_tables() -> None:
    gradiveq = "gradiveq:ratio=8"
    runs = {
        "a": trained(PLAIN, 0, [0.5, 0.8], Handed(1000)),
        "b": trained(PLAIN, 1, [0.7, 0.9], Handed(1000)),
        "c": trained(gradiveq, 0, [0.3, 0.83], Handed(100, 0, 20)),
        "d": trained(gradiveq, 1, [0.825, 0.7], Handed(100, 0, 20)),
        "e": trained("topk:0.1", 0, [0.825, 0.9], Handed(0, 115)),
        "f": trained("topk:0.1", 1, [0.1, 0.825], Handed(0, 115)),
        "g": timed(100, {PLAIN: [1, 2, 4], gradiveq: [0.5, 0.5, 1], "topk:0.1": [2, 2, 4]}, wire={PLAIN: 1100.0}),
        "h": timed(
            None, {PLAIN: [1, 1, 1], gradiveq: [1, 2, 3], gradiveq + SAMPLING: [2, 2, 2], "topk:0.1": [3, 3, 3]}
        ),
    }
    chosen = [Entry("topk:0.1", 9, 1), Entry(PLAIN, None, 1), Entry(gradiveq, 9, 1)]
    plain, topk, pca = rows(runs, chosen, 2)
    assert [row.method for row in (plain, topk, pca)] == [PLAIN, "topk:0.1", gradiveq]
    assert (plain.share, topk.share, pca.share) == (1, 0.115, 0.11)
    assert pca.off == pytest.approx(0.11 * 9 - 1)
    assert (pca.bytes_per_iteration, pca.sent_per_iteration) == (120, 110)
    assert plain.times == {"loopback": Quartiles(1, 1, 1), "100 Mbit/s": Quartiles(1, 1, 1)}
    assert pca.times == {"loopback": Quartiles(2, 1.5, 2.5), "100 Mbit/s": Quartiles(0.25, 0.25, 0.375)}
    assert pca.sampling == {"loopback": Quartiles(2, 2, 2)}
    assert plain.wire_bytes == {"100 Mbit/s": 1100.0}
    goal = 0.85 - BELOW_PLAIN
    assert pca.reached_bytes == (120 * 100, 120 * 50)
    assert topk.reached_bytes == (115 * 50, 115 * 100)
    assert plain.reached_bytes == (None, 1000 * 100)
    # among four ranks, gathering costs three times a payload and summing one and a half times
    assert rows(runs, chosen, 4)[0].share == pytest.approx(1)
    assert {row.method: row.share for row in rows(runs, chosen, 4)}["topk:0.1"] == pytest.approx(0.23)

    table = methods_table([plain, topk, pca], goal)
    assert "MB until 82.0 %" in table
    assert "| 85.0 ± 7.1 " in table
    assert "- (1 of 2 never)" in table
    assert "2.00 (1.50-2.50)" in table
    group = group_table([plain, topk, replace(pca, diverged=1)], 9)
    assert PLAIN not in group
    assert group.index("topk") < group.index("gradiveq")
    assert "+3.5 %" in group
    assert "70.0-83.0; 1 of 2 diverged" in group
    extras = extras_table([plain, topk, pca])
    assert "1,100" in extras
    assert "topk" not in extras
    bare: Row = replace(plain, wire_bytes={})
    assert extras_table([bare, topk]) == ""


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("torch:powersgd:7", "torch:powersgd"),
        (PLAIN, PLAIN),
        ("topk:0.1+ef", "topk+ef"),
        ("gradiveq:ratio=8:sample=20", "gradiveq"),
        ("sign:scaled+ef", "sign:scaled+ef"),
        ("powersgd:2:min_compression_rate=2", "powersgd"),
        ("rar", "rar"),
    ],
)
def test_what_looks_alike_in_the_figure(method: str, name: str) -> None:
    assert family(method) == name


# --- the command -----------------------------------------------------------------------------------------------------


def test_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Starts torchrun; PyTorch's PowerSGD and ours hand over the bytes that were expected; and goes on."""
    out = tmp_path / "out"
    words = (
        "--methods torch:none,torch:powersgd:2,gradiveq:ratio=?:fit_slices=all:slice_size=64:sample=3 --ratios 2 "
        "--width 0.125 --batch-size 4 --iterations 12 --evaluations 2 --seeds 1 --rounds 2 --stretch 1 --rate none "
        f"--data {write_images(tmp_path / 'images')} --out {out}"
    ).split()
    assert main(words) == 0, capfd.readouterr().err
    said = capfd.readouterr().out
    assert "4 of 4 runs" in said
    record = json.loads((out / "ddp.json").read_text())
    assert record["notes"] == ["No times between shaped hosts: --rate none."]
    assert record["environment"]["command"].startswith("python -m bench.ddp --methods 'torch:none,")
    blocks = blocks_of(MODELS["alexnet"](10, width=0.125))
    results = {run["spec"].get("method"): run["result"] for run in record["runs"].values()}
    # of DDP without a hook, and of PyTorch's by PyTorch's own formula, exactly
    for method in (PLAIN, "torch:powersgd:2"):
        assert results[method]["compressed"] == iteration_bytes(method, blocks)._asdict()
        assert results[method]["handed"] == pytest.approx(run_bytes(method, blocks, Length(12, 2, 2))._asdict())
    # ours has a few more: codes in each sum, d and hashes of bases
    (method,) = set(results) - {None, PLAIN, "torch:powersgd:2"}
    expected = run_bytes(method, blocks, Length(12, 2, 2))
    counted = Handed(**results[method]["handed"])
    assert counted.broadcast == pytest.approx(expected.broadcast)
    assert 0 < counted.all_reduce - expected.all_reduce < 100
    stats = results[method]["stats"]
    since_start = 12 * sum(counted) - 2 * (4 * sum(block.length for block in blocks))
    assert since_start - stats["bytes_after"] < 200
    assert record["rows"][0]["method"] == PLAIN
    assert record["rows"][-1]["times"].keys() == {"loopback"}
    for name in ("table.md", "ddp.png"):
        assert (out / name).stat().st_size > 500
    assert f"| {method} " in said
    check_drawn_again(out)
    capfd.readouterr()

    (out / "ddp.png").unlink()
    assert main(words) == 2
    assert "is there already; resume" in capfd.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert "of 4 runs" not in capfd.readouterr().out
    assert (out / "ddp.png").exists()
    assert main([*words, "--resume", "--lr", "0.2"]) == 2
    assert "was run with lr = 0.1, now it is 0.2" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--nproc 0", "--nproc must be at least 1, got 0"),
        ("--start 1", "--start must be at least 2, got 1"),
        ("--iterations 2", "--iterations must be at least 3, got 2"),
        ("--evaluations 401", "--evaluations must be at most 400 (the iterations), got 401"),
        ("--lr nan", "--lr must be above 0 and below inf, got nan"),
        ("--model vgg", "--model must be one of"),
        ("--model resnet20 --width 0.5", "--width is for alexnet"),
        ("--ratios 8,1", "--ratios must be above 1, got 8, 1"),
        ("--methods half", "--methods must have torch:none"),
        ("--methods torch:none,torch:topk", "those of PyTorch are torch:none"),
        ("--methods torch:none,nothing", "unknown method 'nothing'"),
        ("--methods torch:none,qsgd", "collectives can't carry it out"),
        ("--methods torch:none,gradiveq:lt=3", "it has no 'lt'"),
        ("--rate fast", "argument --rate: invalid"),
        ("--rate 0", "--rate must be 1 to 100,000 Mbit/s, got 0"),
        ("--backend nccl", "--backend nccl needs --device cuda"),
        ("--data nowhere", "nowhere"),
    ],
)
def test_bad_options(words: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main([*words.split(), "--out", str(out)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_why_nothing_is_timed_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ddp, "why_not", lambda: "network namespaces need root")
    assert skipped(parse([]), False) == "network namespaces need root"
    assert skipped(parse(["--nproc", "8"]), False) == "there can be 2 to 6 hosts, --nproc is 8"
    assert skipped(parse(["--rate", "none"]), False) == "--rate none"
    assert "launcher" in str(skipped(parse([]), True))


def test_the_device_counts() -> None:
    assert wire_bytes("no-such-device") is None
    assert wire_bytes("lo") is None or wire_bytes("lo") >= 0  # type: ignore[operator]
