"""The command from end to end under mpirun: killed and resumed, stopped, and given what it can't use."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest

from bench.common.command_line import UsageError
from bench.common.files import file_name
from bench.job.options import DEFAULTS, PAPER, make_parser, parse
from bench.job.record import KINDS
from bench.job.report import text
from gradiveq.compressors import COMPRESSORS
from gradiveq.specs import parse as parse_method
from tests.support.jobs import (
    DEADLINE_S,
    ITERATIONS,
    METHODS,
    SMALL,
    Cases,
    Refusals,
    assert_refused,
    assert_the_same_run,
    command,
    count,
    environment,
    job,
    lines_of,
    refused,
    said_in_turn,
    stopped,
    timeless,
    write_idx,
)
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of all three methods that nobody disturbed: (its working directory, its folder, what it printed)."""
    folder = tmp_path_factory.mktemp("job")
    write_idx(folder / "data")
    result = job(2, [*SMALL, "--data", "data", "--out", "whole"], folder)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    return folder, folder / "whole", result.stdout


def test_what_a_run_prints_and_records(whole: tuple[Path, Path, str]) -> None:
    _, run, printed = whole
    summary = json.loads((run / "summary.json").read_text())
    environment = json.loads((run / "environment.json").read_text())
    source = "IDX images (64 + 21 images from data, not the published Fashion-MNIST), not CIFAR"
    assert summary["data_source"] == environment["data_source"] == source
    # The data's source is said at the start and in the title of each table.
    assert printed.startswith(f"* Data: {source}.")
    assert printed.count(f"resnet8 on {source}, 2 ranks x 4 images, {ITERATIONS} iterations\n") == 4
    assert text(summary, notes=False) in printed
    assert text(summary).endswith("\n".join(f"* {note}" for note in summary["notes"]) + "\n")
    assert summary["complete"]
    assert tuple(summary["methods"]) == METHODS

    versions = environment["versions"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["numpy"] == np.__version__
    assert environment["ranks"] == 2
    assert environment["seed"] == 5
    assert environment["command"].startswith("mpirun -n 2 python -m bench.resnet32_cifar100 --model resnet8")
    for name in ("mpi", "cpu", "cores", "data_sha256"):
        assert environment[name]

    sent = {}
    for method in METHODS:
        lines = lines_of(run, method)
        iterations = [line for line in lines if line["type"] == "iteration"]
        assert [line["iteration"] for line in iterations] == list(range(ITERATIONS))
        assert [line["iteration"] for line in lines if line["type"] == "evaluation"] == [8, 16, 24]
        for line in iterations:
            assert set(line["seconds"]) <= set(KINDS)
            assert sum(line["seconds"].values()) == pytest.approx(line["iteration_s"])
        entry = summary["methods"][method]
        assert entry["test_accuracy"] == [line for line in lines if line["type"] == "evaluation"][-1]["test_accuracy"]
        sent[method] = entry["bytes_per_iteration"]
        assert (run / f"weights-{method}.pt").stat().st_size > 100_000
    assert sent["rar"] > sent["gradiveq"]
    assert sent["rar"] > 7 * sent["qsgd"]
    phases = [line["phase"] for line in lines_of(run, "gradiveq") if line["type"] == "iteration"]
    assert phases == (["warm-up"] * 3 + (["sample"] * 5 + ["compress"] * 6) * 2)[:ITERATIONS]
    windows = [line["window"] for line in lines_of(run, "gradiveq") if line["type"] == "window"]
    assert [window["iteration"] for window in windows] == [3, 14]
    assert all(layer["held_out_loss"] > 0 for window in windows for layer in window["layers"].values())
    # Weights, data and order are the same, so the first loss is.
    assert len({lines_of(run, method)[0]["loss"] for method in METHODS}) == 1
    assert not list(run.glob("checkpoint/*.pt"))


def kill_when(process: subprocess.Popen[bytes], due: Callable[[], bool]) -> None:
    """SIGKILL for the launcher, what it started, and what that started, once `due`."""
    deadline = time.monotonic() + DEADLINE_S
    while not due():
        assert process.poll() is None, "the run ended before it was to be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    own = psutil.Process(process.pid)
    for victim in [*own.children(recursive=True), own]:
        with contextlib.suppress(psutil.NoSuchProcess):
            victim.kill()
    process.wait(DEADLINE_S)


def test_killed_twice_and_stopped_and_resumed_is_bitwise_the_same(whole: tuple[Path, Path, str]) -> None:
    """SIGKILL in the first method and in the last, SIGTERM in between; `test_cluster` has SIGINT."""
    folder, expected, _ = whole
    run = folder / "killed"

    def killed(arguments: list[str], method: str, lines: int) -> None:
        process = subprocess.Popen(
            command(2, arguments),
            cwd=folder,
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        kill_when(process, lambda: count(run / f"metrics-{method}.jsonl") >= lines)
        manifest = json.loads((run / "checkpoint" / "manifest.json").read_text())
        assert manifest["current"]["method"] == method
        assert 0 < manifest["current"]["iteration"] < ITERATIONS

    killed([*SMALL, "--data", "data", "--out", "killed"], "rar", 13)
    stopped(2, ["--resume", "killed"], run, "qsgd", signal.SIGTERM)
    killed(["--resume", "killed"], "gradiveq", 15)
    # What a kill can leave behind at the worst moment.
    with (run / "metrics-gradiveq.jsonl").open("a") as file:
        file.write('{"type": "iter')
    (run / "checkpoint" / ".gradiveq-15-rank0.pt.tmp").write_bytes(b"half")

    result = job(2, ["--resume", "killed", *SMALL], folder)  # to repeat the options is allowed
    assert result.returncode == 0, result.stderr
    for method in ("rar", "qsgd"):
        assert f"{method}: finished before" in result.stdout
    assert "gradiveq: resumed after" in result.stdout
    assert_the_same_run(run, expected, METHODS)
    assert len(json.loads((run / "environment.json").read_text())["resumed"]) == 3
    assert not list((run / "checkpoint").glob("*rank*"))


SPECS = ("rar", "topk:0.01+ef", "sign", "half")
FILES = ("rar", "topk-0.01-ef", "sign", "half")


def test_compressors_are_recorded_stopped_and_resumed(whole: tuple[Path, Path, str]) -> None:
    """By both clocks, in files with names of their own; a run that was stopped within one is the run that was not."""
    folder, _, _ = whole
    arguments = [*SMALL[:2], "--iterations", "16", *SMALL[4:10], "--data", "data", "--cluster", "gradiveq-cpu"]
    arguments += ["--eval-every", "8", "--checkpoint-every", "5", "--no-figures", "--methods", ",".join(SPECS)]
    result = job(2, [*arguments, "--out", "specs"], folder)
    assert result.returncode == 0, result.stderr
    assert "applied to each layer (one parameter) by itself" in result.stdout
    run = folder / "specs"
    summary = json.loads((run / "summary.json").read_text())
    assert tuple(summary["methods"]) == SPECS
    rar = summary["methods"]["rar"]
    assert rar["compression"] is None
    for spec, name in zip(SPECS, FILES, strict=True):
        assert (run / f"weights-{name}.pt").exists()
        entry = summary["methods"][spec]
        lines = [line for line in lines_of(run, name) if line["type"] == "iteration"]
        assert len(lines) == 16
        assert set(entry["phases"]) == {"plain" if spec == "rar" else "compressed"}
        assert entry["virtual"]["groups"]["exposed communication"] > 0
        if spec != "rar":
            assert set(entry["compression"]) == {
                "density",
                "relative_error",
                "compression_error",
                "error",
                "payload_bytes",
            }
            measures = [line["compression"] for line in lines]
            assert all(set(one) >= set(entry["compression"]) | {"norm", "total_error", "num_sent"} for one in measures)
            assert sum(line["seconds"].get("encode", 0) for line in lines) > 0
            assert (measures[-1]["error"] > 0) == ("+ef" in spec)
            assert spec in result.stdout
    methods = summary["methods"]
    assert methods["half"]["ratio"] == pytest.approx(2, rel=1e-3)
    assert methods["topk:0.01+ef"]["ratio"] > 50
    assert methods["topk:0.01+ef"]["compression"]["density"] == pytest.approx(0.01, rel=0.1)
    assert methods["half"]["compression"]["relative_error"] < 1e-6
    assert re.search(r"method +test .*density +relative", result.stdout)

    stopping = folder / "specs-stopped"
    stopped(2, [*arguments, "--out", stopping.name], stopping, "topk:0.01+ef", signal.SIGTERM, file="topk-0.01-ef")
    result = job(2, ["--resume", stopping.name], folder)
    assert result.returncode == 0, result.stderr
    assert timeless(json.loads((stopping / "summary.json").read_text())["methods"]) == timeless(methods)
    for name in FILES:
        assert (stopping / f"weights-{name}.pt").read_bytes() == (run / f"weights-{name}.pt").read_bytes()
        assert timeless(lines_of(stopping, name)) == timeless(lines_of(run, name))
    assert {path.name for path in stopping.iterdir()} == {path.name for path in run.iterdir()}


def without(module: str, rank: int, folder: Path) -> str:
    """A PYTHONPATH with which one rank can't import a module."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        "import os, sys\n"
        f"if os.environ.get('PMI_RANK', os.environ.get('OMPI_COMM_WORLD_RANK')) == '{rank}':\n"
        f"    sys.modules['{module}'] = None\n"
    )
    return os.pathsep.join([str(folder), str(ROOT)])


def test_an_exception_on_one_rank_ends_all(whole: tuple[Path, Path, str]) -> None:
    folder, _, _ = whole
    start = time.monotonic()
    result = job(2, ["--data", "data", "--out", "torchless"], folder, PYTHONPATH=without("torch", 1, folder / "path"))
    assert result.returncode != 0
    assert "rank 1:" in result.stderr
    assert "import of torch halted" in result.stderr
    assert time.monotonic() - start < 60
    assert not (folder / "torchless").exists()


def test_skipped_steps_and_figures_that_fail_are_no_failure(whole: tuple[Path, Path, str]) -> None:
    folder, _, _ = whole
    arguments = ["--model", "resnet8", "--data", "data", "--methods", "rar", "--iterations", "6", "--out", "skipped"]
    path = without("matplotlib", 0, folder / "no-matplotlib")
    result = job(2, [*arguments, "--lr", "1e38", "--nonfinite", "skip"], folder, PYTHONPATH=path)
    assert result.returncode == 0, result.stderr
    summary = json.loads((folder / "skipped" / "summary.json").read_text())
    assert summary["complete"]
    assert 0 < summary["methods"]["rar"]["skipped"] < 6
    assert summary["methods"]["rar"]["train_loss"] is None
    (line,) = result.stderr.splitlines()
    assert line.startswith("no figures: ")
    assert result.stdout.endswith("Everything is in skipped\n")


def test_one_process_without_mpirun(whole: tuple[Path, Path, str]) -> None:
    folder, _, _ = whole
    result = job(1, [*SMALL, "--data", "data", "--out", "alone", "--iterations", "14", "--nonfinite", "skip"], folder)
    assert result.returncode == 0, result.stderr
    assert "1 ranks x 4 images, 14 iterations" in result.stdout
    summary = json.loads((folder / "alone" / "summary.json").read_text())
    assert summary["methods"]["rar"]["bytes_per_iteration"] == 0


# --- bad input: one line from rank 0, a status, no files, in seconds --------------------------------------------------


@pytest.fixture(scope="module")
def inputs(whole: tuple[Path, Path, str]) -> Path:
    """A working directory with data, good and bad, and a run."""
    folder, _, _ = whole
    write_idx(folder / "other", images=65)
    write_idx(folder / "tiny", images=3, test_images=2)
    write_idx(folder / "cut")
    images = folder / "cut" / "train-images-idx3-ubyte.gz"
    images.write_bytes(images.read_bytes()[:-2000])
    (folder / "cifar-100-binary.tar.gz").write_bytes(b"\x1f\x8b not an archive")
    (folder / "empty").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "thesis.txt").write_text("the only copy")
    return folder


SHORTLY = ["--model", "resnet8", "--no-figures", "--progress", "none"]


@pytest.mark.parametrize(
    ("ranks", "arguments", "message", "status"),
    [
        (2, ["--methods", "rar,foo"], "unknown method 'foo' in --methods, known are rar, qsgd, gradiveq", 2),
        (
            # Into a folder that was there before, and has to be there after.
            2,
            ["--data", "data", "--lr", "1e38", "--methods", "rar", "--out", "empty"],
            "non-finite gradient in iteration 1: conv1.weight, layer1.0.conv1.weight, layer1.0.conv2.weight and 20 "
            "more on rank 0; conv1.weight, ",
            1,
        ),
        (1, ["--resume", "empty"], "empty is not a run's folder", 2),
        (1, ["--data", "data", "--out", "full"], "full exists and is not an empty folder", 2),
    ],
    ids=["method", "gradient", "resume", "out"],
)
def test_bad_input(inputs: Path, ranks: int, arguments: list[str], message: str, status: int) -> None:
    refused(ranks, [*SHORTLY, *arguments], inputs, message, (status,))


TWO_RANKS: Cases = {
    "pattern": (
        [*SHORTLY, "--methods", "topk/head.*=half"],
        "pattern 'head.*' matches no layer; the 23 layers are conv1.weight",
    ),
    "data": ([*SHORTLY, "--data", "cut"], "train-images-idx3-ubyte.gz: damaged or truncated gzip file"),
    "ranks": (
        [*SHORTLY, "--data", "tiny", "--batch-size", "2"],
        "2 ranks x 2 images each need 4 training images, but there are 3",
    ),
    "iterations": ([*SHORTLY, "--data", "data", "--iterations", "0"], "`iterations` must be at least 1, got 0"),
    "other data": (["--resume", "whole", "--data", "other"], "the run in whole was begun with other data: IDX"),
}
ONE_RANK: Cases = {
    "loss threshold": ([*SHORTLY, "--loss-threshold", "1.0"], "`loss_threshold` must be in [0, 1), got 1.0"),
    "archive": ([*SHORTLY, "--data", "cifar-100-binary.tar.gz"], "cifar-100-binary.tar.gz: 17 bytes with MD5"),
    "slice size": ([*SHORTLY, "--slice-size", "1000000"], "`slice_size` must be at most 36864"),
    "folder": ([*SHORTLY, "--data", "nowhere"], "nowhere: no such file or folder"),
    "components": ([*SHORTLY, "--sample", "10", "--n-components", "10"], "`n_components` must be at most 9"),
    "same": (
        [*SHORTLY, "--methods", "rar,topk:0.01,sign,topk:ratio=1e-2"],
        "'topk:0.01' and 'topk:ratio=1e-2' are the same method",
    ),
    "per-hop": (
        [*SHORTLY, "--methods", "qsgd+ef"],
        "method 'qsgd+ef': QSGD in the ring quantises, at each hop, the sum",
    ),
    "ratio": ([*SHORTLY, "--methods", "topk:2"], "--methods: method 'topk:2': `ratio` is the fraction"),
    "other ranks": (["--resume", "whole"], "the run in whole has 2 ranks, now there are 1"),
}


@pytest.fixture(scope="module")
def refusals(inputs: Path) -> Refusals:
    return said_in_turn(1, ONE_RANK, inputs) | said_in_turn(2, TWO_RANKS, inputs)


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_bad_input_in_turn(refusals: Refusals, name: str) -> None:
    assert len(refusals[name]["status"]) == (1 if name in ONE_RANK else 2)
    assert_refused(refusals[name], {**ONE_RANK, **TWO_RANKS}[name][1])


def test_a_foreign_mpirun_is_explained(inputs: Path) -> None:
    both = [
        subprocess.Popen(
            command(1, []),
            cwd=inputs,
            env=environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK=rank),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=DEADLINE_S)[1].splitlines() for process in both]
    assert [process.returncode for process in both] == [2, 2]
    assert [len(lines) for lines in said] == [1, 0], said
    assert "this `mpirun` belongs to another MPI" in said[0][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--iterations", "many"], "argument --iterations: invalid int value: 'many'"),
        (["--sample", "few"], "argument --sample: invalid length value: 'few'"),
        (["--timeout", "0"], "--timeout must be a positive number of seconds, got 0"),
        (["--timeout", "nan"], "--timeout must be a positive number of seconds, got nan"),
        (["--max-sample", "50"], "--max-sample is for --sample auto"),
        (["--sample", "auto", "--stop-multiple", "3"], "--stop-multiple is for --compress auto"),
        (["--methods", "rar,qsgd,rar"], "names a method twice"),
        (["--methods", "rar", "--ratio", "8"], "--ratio is an option of gradiveq, which --methods leaves out"),
        (["--nonfinite", "ignore"], "argument --nonfinite: invalid choice: 'ignore'"),
        (["--whatever"], "unrecognized arguments: --whatever"),
        (["--resume", "/nonexistent/run"], "--resume: there is no folder /nonexistent/run"),
    ],
)
def test_options_that_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=r"^[^\n]*$") as caught:
        parse(arguments)
    assert message in str(caught.value)


def test_resume_takes_the_recorded_options(tmp_path: Path) -> None:
    options = {**DEFAULTS, "methods": ["rar"], "seed": 3}
    record = {"options": options, "ranks": 2, "one_process": False, "cluster": None} | dict.fromkeys(
        ("data_sha256", "data_source", "mpi"), ""
    )
    (tmp_path / "environment.json").write_text(json.dumps(record))
    resume = ["--resume", str(tmp_path)]
    assert parse(resume)[0]["seed"] == 3
    assert parse([*resume, "--seed", "3", "--methods", "rar", "--timeout", "9"])[0]["timeout"] == 9
    for bad in (["--timeout", "0"], ["--timeout", "nan"], ["--timeout", "inf"], ["--checkpoint-every", "-5"]):
        with pytest.raises(UsageError, match=rf"^{bad[0]} must be"):
            parse([*resume, *bad])
    with pytest.raises(UsageError, match=r"--seed is 4, but the run in .* was begun with 3"):
        parse([*resume, "--seed", "4"])
    with pytest.raises(UsageError, match=r"--methods is rar,qsgd, but the run in .* was begun with rar"):
        parse([*resume, "--methods", "rar,qsgd"])
    parts = [{"options": {"seed": 3}}, {"options": DEFAULTS}, {**record, "options": {**options, "timeout": "long"}}]
    for damaged in ("", "{}", "[]", *map(json.dumps, parts)):
        (tmp_path / "environment.json").write_text(damaged)
        with pytest.raises(UsageError, match=r"environment\.json"):
            parse(resume)


def test_paper_sets_its_values_and_leaves_the_rest_to_options() -> None:
    options, _ = parse(["--paper", "--data", "somewhere"])
    assert {name: options[name] for name in PAPER if name != "data"} == {
        name: value for name, value in PAPER.items() if name != "data"
    }
    assert (options["iterations"], options["warmup"], options["sample"], options["compress"]) == (
        45_000,
        2_500,
        100,
        400,
    )
    assert options["data"] == "somewhere"
    assert parse(["--paper", "--ratio", "8"])[0]["loss_threshold"] is None
    timing = parse(["--timing"])[0]
    assert timing["eval_every"] == 0
    assert timing["iterations"] < DEFAULTS["iterations"]


def test_help_lists_compressors_and_how_to_combine_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--help"])
    shown = capsys.readouterr().out
    for word in (*COMPRESSORS, "layer (the default", "+FEEDBACK", "^"):
        assert word in shown
    for spec in re.findall(r"^    ([a-z]+:?[^ \n]*) {2,}[^ \n]", shown.partition("SPEC ")[2], re.MULTILINE):
        parse_method(spec)


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("rar", "rar"),
        ("topk:0.01+ef", "topk-0.01-ef"),
        ("topk:count=100@model+ef-scaled", "topk-count-100-model-ef-scaled"),
        ("sign:mean^sign", "sign-mean-sign"),
    ],
)
def test_names_of_files(method: str, name: str) -> None:
    assert file_name(method) == name


def test_names_of_files_with_patterns_are_told_apart() -> None:
    names = [file_name(f"topk@{pattern}") for pattern in ("a*", "a?", "a|b", "a.*|b", "../a", "*")]
    assert len({name.casefold() for name in names}) == len(names)
    assert all(re.fullmatch(r"[\w.-]+", name) and not name.startswith(".") for name in names)


def test_every_option_has_a_default_and_a_place() -> None:
    actions = {action.dest for action in make_parser()._actions} - {"help"}
    assert actions == DEFAULTS.keys()
