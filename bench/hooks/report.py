"""table.md and ddp.png of `bench.ddp`, from what ddp.json holds."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common.files import read_object
from bench.common.texts import commit_text, machine_text, sentences
from bench.experiments.experiment import write_table_and_figures
from bench.hooks import figures as ddp_figures
from bench.hooks.equal_bytes import TOLERANCE, Entry
from bench.hooks.findings import Runs, extras_table, group_table, methods_table, reached_accuracy, rows, times_table
from bench.hooks.runs import LR_WARMUP, TRAIN


def caption(options: argparse.Namespace, runs: Runs, about: Mapping[str, Any]) -> str:
    """How the numbers came about."""
    trained = next(run["result"] for run in runs.values() if run["spec"]["kind"] == TRAIN)
    width = "" if options.width is None else f" (width {options.width:g})"
    parts = [
        f"Data: {trained['source']}",
        f"{options.model}{width}, {trained['num_parameters']:,} parameters; {options.nproc} ranks x "
        f"{options.batch_size} images over {options.backend}, {options.iterations} iterations, SGD with Nesterov "
        f"momentum {options.momentum:g}, weight decay {options.weight_decay:g}, learning rate 0 to "
        f"{options.lr:g} in {LR_WARMUP:.0%} of the run, then to 0",
        f"the first {options.start} iterations go uncompressed with all methods; one bucket for all; GradiVeQ's times "
        "are of compressed iterations",
        f"seeds 0 to {options.seeds - 1}" if options.seeds > 1 else "seed 0",
        f"on {machine_text(about, about)}, {options.threads} thread{'s' if options.threads > 1 else ''} a "
        f"rank, torch {about['versions']['torch']}",
        commit_text(about),
        f"command: {about['command']}",
    ]
    return sentences(parts)


def report(
    runs: Runs, found: Sequence[Entry], options: argparse.Namespace, words: str, notes: Sequence[str]
) -> tuple[str, list[dict[str, Any]]]:
    """table.md, and its rows as JSON."""
    each, goal = rows(runs, found, options.nproc), reached_accuracy(runs)
    parts = [
        "# PyTorch's communication hooks beside ours",
        words,
        "## All methods",
        "Bytes are what one rank hands to the process group's collectives, counted there (of DDP without a hook: its "
        "gradient), and what it then sends over the run, uncompressed iterations and bases included: 2(N-1)/N of what "
        "is summed, N-1 times what is gathered. Accuracies are means ± standard deviations over the seeds. Times are "
        "divided by plain DDP's of the same round: median (quartiles) of the rounds, compressed iterations only.",
        methods_table(each, goal),
    ]
    for ratio in options.ratios:
        if sum(row.ratio == ratio for row in each) > 1:
            parts += [
                f"## At equal bytes: 1/{ratio:g} of plain DDP's",
                f"Within {TOLERANCE:.0%}, over the whole run.",
                group_table(each, ratio),
            ]
    parts += ["## Times", times_table(runs)]
    more = extras_table(each)
    if more:
        parts += [
            "Times over those of plain DDP with one bucket, as above. Default buckets are timed where they are "
            "several, of all methods but PyTorch's PowerSGD. The link's device is that of rank 0's host: what it has "
            "sent per iteration, headers and acknowledgements included.",
            more,
        ]
    parts += notes
    if any(run["spec"].get("rate_mbps") for run in runs.values()):
        parts.append(
            "Shaped links let what they carry in a millisecond pass at once after a pause: an iteration there is too "
            "short by at most that."
        )
    return "\n\n".join(parts) + "\n", [row.as_dict() for row in each]


def write(record: Mapping[str, Any], out: Path) -> list[Path]:
    """table.md and ddp.png, of what ddp.json holds."""
    options, about, runs = argparse.Namespace(**record["options"]), record["environment"], record["runs"]
    found = [Entry(**entry) for entry in record["expected"]]
    words = caption(options, runs, about)
    text, _ = report(runs, found, options, words, record["notes"])
    title = "PyTorch's communication hooks beside ours"
    each = rows(runs, found, options.nproc)
    return write_table_and_figures(out, text, lambda: iter([("ddp.png", ddp_figures.draw(each, title, words))]))


def redraw(path: Path) -> list[Path]:
    """Figure and table again, of the ddp.json at `path`.

    Raises:
        LookupError, TypeError, ValueError: the record isn't as it should be.
    """
    return write(read_object(path), path.parent)
