"""Hard-threshold against top-k with error feedback: `python -m bench.hard_threshold` (Sahu et al. 2021).

    --part logistic     l2-regularised logistic regression on 20 and 100 workers: EF-SGD (Fig. 1, 4, 7) and EF-GDstar
                        (Fig. 8, 9); `bench.simulated.logistic`
    --part networks     images, a text and ratings on 8 workers: test metric against data volume (Fig. 2, 11), error and
                        density along training (Fig. 3, 5, 6), without error feedback (Fig. 12), gradient against update
                        compression (Fig. 13), ACCORDION (Tables 1 and 7); `bench.simulated.training`
    --data KIND=PATH    madelon, gisette: LIBSVM files; images: as for the training job; text: WikiText-2; ratings:
                        MovieLens. What isn't given is replaced by what is shipped or made, and named in every result

--out is the folder for all that `bench.experiments.experiment` writes.

The small size takes networks and data that end within minutes on 2 cores; `--paper` those of Tables 2 to 6. Error
feedback is Algorithm 1 (γ inside) for the logistic regression and Algorithm 2 for networks, but for Fig. 13's Algorithm
3; compression is layer by layer, as in the paper, but for Fig. 11.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.common.command_line import Parser, UsageError, description, names
from bench.common.texts import machine_text, sentences, short_commit
from bench.experiments.experiment import Experiment, add_run_options, check_bounds, folder_for
from bench.experiments.findings import Finding, table
from bench.papers.hard_threshold.figure_set import INTROSPECTED, SMALL_IS, draw
from bench.papers.hard_threshold.findings import judge_all
from bench.papers.hard_threshold.network_findings import accordion_table, metric_table
from bench.papers.hard_threshold.rules import Runs
from bench.papers.hard_threshold.runs import run
from bench.papers.hard_threshold.sizes import (
    CIFAR100_MOST,
    PAPER,
    SMALL,
    Given,
    HardThresholdSize,
    Part,
    differences,
    specs,
)

OUT = Path("results/hard-threshold")
PARTS: tuple[Part, ...] = ("logistic", "networks")
DATA_KINDS = ("madelon", "gisette", "images", "text", "ratings")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and what they come to: `size`, `parts`, `given`."""
    parser = Parser(prog="python -m bench.hard_threshold", description=description(__doc__), allow_abbrev=False)
    parser.add_argument("--part", choices=(*PARTS, "all"), default="all", help="(default: all)")
    parser.add_argument("--paper", action="store_true", help="the paper's networks, epochs and grids")
    parser.add_argument(
        "--seeds", type=int, help="runs of each setting (default: 3; the paper's ACCORDION: 6)", metavar="N"
    )
    parser.add_argument("--epochs", type=float, help="of every network's run", metavar="N")
    parser.add_argument("--gdstar-epochs", type=int, help="of every run of EF-GDstar", metavar="N")
    parser.add_argument("--kinds", type=names, help="of networks: images,text,ratings", metavar="KIND,…")
    parser.add_argument("--data", action="append", default=[], help="of " + ", ".join(DATA_KINDS), metavar="KIND=PATH")
    add_run_options(parser, OUT)
    options = parser.parse_args(arguments)
    check_bounds(options, {"seeds": 1, "epochs": 0, "gdstar_epochs": 1, "processes": 1, "threads": 1})
    options.parts = PARTS if options.part == "all" else (options.part,)
    options.given = _given(options.data)
    options.size = _size(options)
    options.out = folder_for(options, OUT)
    return options


def _given(texts: Sequence[str]) -> dict[str, Given]:
    given = {}
    for text in texts:
        kind, equals, path = text.partition("=")
        if not equals or not path or kind not in DATA_KINDS:
            raise UsageError(f"--data must be KIND=PATH with a kind of {', '.join(DATA_KINDS)}, got {text!r}")
        given[kind] = Given(path, _digest(Path(path)))
    return given


def _digest(path: Path) -> str | None:
    """SHA-256 of a file, or of the files in a folder with their names; None of what is to be downloaded."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    if not all(file.is_file() for file in files):
        return None
    digest = hashlib.sha256()
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _size(options: argparse.Namespace) -> HardThresholdSize:
    """The preset, with what the options say otherwise."""
    size = PAPER if options.paper else SMALL
    benchmarks = list(size.benchmarks)
    if options.kinds is not None:
        unknown = [kind for kind in options.kinds if kind not in INTROSPECTED]
        if unknown:
            raise UsageError(f"--kinds must be of {', '.join(INTROSPECTED)}, got {unknown[0]!r}")
        benchmarks = [benchmark for benchmark in benchmarks if benchmark.kind in options.kinds]
    changed = []
    for benchmark in benchmarks:
        if options.epochs is not None:
            share = options.epochs / benchmark.epochs
            benchmark = replace(
                benchmark,
                epochs=options.epochs,
                warmup_epochs=benchmark.warmup_epochs * share,
                milestones=tuple(share * milestone for milestone in benchmark.milestones),
            )
        if (
            options.paper
            and "images" in options.given
            and benchmark.kind == "images"
            and "100" in options.given["images"].path
        ):
            benchmark = replace(
                benchmark, accordion=tuple((name, CIFAR100_MOST, least) for name, _, least in benchmark.accordion)
            )
        changed.append(benchmark)
    problems = size.problems
    if options.gdstar_epochs is not None:
        problems = tuple(
            replace(p, gdstar=tuple((workers, count, options.gdstar_epochs) for workers, count, _ in p.gdstar))
            for p in problems
        )
    size = replace(size, problems=problems, benchmarks=tuple(changed))
    if options.seeds is not None:
        size = replace(size, seeds=options.seeds, accordion_seeds=options.seeds)
    return size


# --- results ---------------------------------------------------------------------------------------------------------


#: Columns of the steps of a network's run that are drawn.
DRAWN = ("iteration", "error", "density")


def condense(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    if "trace" in result:
        return dict(result)
    steps = {name: result["steps"][name] for name in DRAWN if name in result["steps"]}
    steps["total_error"] = result["steps"].get("total_error", [0.0])[-1:]
    names = ("source", "evaluations", "num_parameters", "average_density", "diverged")
    return {"steps": steps, **{name: result[name] for name in names}}


def report(runs: Runs, found: Sequence[Finding], options: argparse.Namespace, about: Mapping[str, Any]) -> str:
    """table.md."""
    size: HardThresholdSize = options.size
    command = [f"Command: {about['command']}", f"on {machine_text(about, about)}"]
    if about["commit"]:
        command.append(f"commit {short_commit(about['commit'])}")
    seconds = sum(one["seconds"] for one in runs.values())
    command.append(f"{len(runs)} runs, {seconds:,.0f} s in all, {about['processes']} at a time")
    sources = dict.fromkeys(one["result"]["source"] for one in runs.values())
    parts = [
        "# Hard-threshold against top-k with error feedback (Sahu et al. 2021)",
        sentences(command),
        "Data:\n\n" + "\n".join(f"* {source}" for source in sources),
        *([] if options.paper else [SMALL_IS]),
        "Differences and intervals are over the seeds, in percentage points (of perplexity in percent).",
        table(found),
        "## Differences from the paper",
        "\n".join(f"* {line}" for line in differences(size, options.given, parts_of(runs))),
    ]
    for benchmark in size.benchmarks:
        if any(one["spec"].get("kind") == benchmark.kind for one in runs.values()):
            parts += [f"## {benchmark.network}, {benchmark.kind}: all settings", metric_table(runs, benchmark)]
            rows = accordion_table(runs, benchmark)
            if rows:
                parts += ["## ACCORDION (Tables 1 and 7)", rows]
    return "\n\n".join(parts) + "\n"


def parts_of(runs: Runs) -> list[Part]:
    """The parts that were run."""
    found = {one["spec"]["part"] for one in runs.values()}
    return [part for part in PARTS if part in found]


EXPERIMENT = Experiment(
    name="hard_threshold",
    record="hard-threshold.json",
    parse=parse,
    about=lambda options: {"processes": options.processes, "parts": list(options.parts)},
    specs=lambda options: specs(options.size, options.given, options.parts, options.device),
    run=run,
    condense=condense,
    judge=lambda runs, options: judge_all(runs, options.size, options.given),
    report=report,
    draw=lambda runs, options, about: draw(runs, options.size, about, paper=options.paper),
    summary=lambda runs, _: {"seconds": {name: one["seconds"] for name, one in runs.items()}},
    packages=("numpy", "scipy", "torch", "numba", "scikit-learn"),
)
main, redraw = EXPERIMENT.main, EXPERIMENT.redraw
