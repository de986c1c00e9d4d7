"""`bench.resnet32_cifar100` as a process of its own: started, stopped, and what it leaves."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.processes import MPIRUN, ROOT

DEADLINE_S = 100
METHODS = ("rar", "qsgd", "gradiveq")
ITERATIONS = 24
SMALL = [
    "--model",
    "resnet8",
    "--iterations",
    str(ITERATIONS),
    "--batch-size",
    "4",
    "--lr",
    "0.05",
    "--seed",
    "5",
    "--warmup",
    "3",
    "--sample",
    "5",
    "--compress",
    "6",
    "--fit-slices",
    "all",
    "--n-components",
    "4",
    "--eval-every",
    "8",
    "--checkpoint-every",
    "5",
    "--no-figures",
]


def launcher(ranks: int) -> list[str]:
    return [str(MPIRUN), "-n", str(ranks)] if ranks > 1 else []


def command(ranks: int, arguments: list[str]) -> list[str]:
    return [*launcher(ranks), sys.executable, "-m", "bench.resnet32_cifar100", *arguments]


def environment(**other: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"} | other


def job(ranks: int, arguments: list[str], folder: Path, **other: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(ranks, arguments),
        cwd=folder,
        env=environment(**other),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )


def write_idx(folder: Path, images: int = 64, test_images: int = 21) -> Path:
    """A small data set in Fashion-MNIST's form: classes 0 to 3 are bright in one quarter each."""
    folder.mkdir()
    rng = np.random.default_rng(3)
    for part, count in (("train", images), ("t10k", test_images)):
        labels = (np.arange(count) % 4).astype(np.uint8)
        pixels = rng.integers(0, 80, (count, 28, 28))
        for image, label in zip(pixels, labels, strict=True):
            image[14 * (label // 2) :, 14 * (label % 2) :][:14, :14] += 150
        header = b"\0\0\x08\x03" + np.array([count, 28, 28], ">u4").tobytes()
        (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(header + pixels.astype(np.uint8).tobytes()))
        header = b"\0\0\x08\x01" + np.array([count], ">u4").tobytes()
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return folder


def lines_of(run: Path, method: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"metrics-{method}.jsonl").read_text().splitlines()]


def timeless(value: Any) -> Any:
    """Without the seconds, which no two runs share."""
    if isinstance(value, dict):
        timed = ("_s", "seconds", "groups")
        return {key: timeless(item) for key, item in value.items() if not key.endswith(timed)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def assert_the_same_run(run: Path, expected: Path, methods: tuple[str, ...]) -> None:
    """To the last bit, but for seconds."""
    mine, theirs = (json.loads((path / "summary.json").read_text())["methods"] for path in (run, expected))
    for method in methods:
        assert mine[method]["weights_sha256"] == theirs[method]["weights_sha256"]
        assert timeless(mine[method]) == timeless(theirs[method])
        assert timeless(lines_of(run, method)) == timeless(lines_of(expected, method))
        weights = [(path / f"weights-{method}.pt").read_bytes() for path in (run, expected)]
        assert weights[0] == weights[1]


def stopped(
    ranks: int, arguments: list[str], run: Path, method: str, number: signal.Signals, file: str | None = None
) -> int:
    """Status of a job in the run's parent that got a signal after the method's first iteration, and did what it has to.

    Args:
        file: what the method's files are called, if not like the method.
    """
    name = file or method
    process = subprocess.Popen(
        command(ranks, arguments),
        cwd=run.parent,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + DEADLINE_S
    while count(run / f"metrics-{name}.jsonl") < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    assert "Traceback" not in errors
    options = json.loads((run / "environment.json").read_text())["options"]
    current = json.loads((run / "checkpoint" / "manifest.json").read_text())["current"]
    assert current["method"] == method
    done = current["iteration"]
    said = f"stopped after {done} of {options['iterations']} with {method}; go on with --resume {run.name}"
    assert said in errors
    recorded = [line for line in lines_of(run, name) if line["type"] == "iteration"]
    assert len(recorded) == done < options["iterations"]
    workers = json.loads((run / "environment.json").read_text())["ranks"]
    assert len(list((run / "checkpoint").glob(f"{name}-*-rank?.pt"))) == workers
    return process.returncode


def refused(
    ranks: int, arguments: list[str], folder: Path, message: str, status: tuple[int, ...] = (2,), **other: str
) -> None:
    before = sorted(folder.rglob("*"))
    start = time.monotonic()
    result = job(ranks, arguments, folder, **other)
    assert time.monotonic() - start < 60  # on a machine that does something else as well
    lines = result.stderr.splitlines()
    assert result.returncode in status, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert message in lines[0]
    assert sorted(folder.rglob("*")) == before


Cases = dict[str, tuple[list[str], str]]
Refusals = dict[str, dict[str, Any]]


def said_in_turn(ranks: int, cases: Cases, folder: Path) -> Refusals:
    """What the command said in each case, with what is in the folder before and after, from one launch."""
    before = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
    turns = ["-m", "tests.support.in_turn", "bench.resnet32_cifar100"]
    result = subprocess.run(
        [*launcher(ranks), sys.executable, *turns, json.dumps([arguments for arguments, _ in cases.values()])],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
    )
    assert (result.returncode, result.stderr) == (0, "")
    said = [json.loads(line) | {"before": before} for line in result.stdout.splitlines()]
    return dict(zip(cases, said, strict=True))


def assert_refused(said: dict[str, Any], message: str) -> None:
    """As `refused`, of a case `said_in_turn`: all ranks have the status, and only the first speaks."""
    assert set(said["status"]) == {2}
    lead, *others = said["stderr"]
    assert lead.startswith("error: ")
    assert lead.count("\n") == 1
    assert lead.endswith("\n")
    assert message in lead
    assert not any(others)
    assert said["files"] == said["before"]
