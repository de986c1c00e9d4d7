"""Layer-wise against entire-model compression: `python -m bench.layerwise` (Dutta et al. 2020, Fig. 2 to 8).

Six methods, each applied to every layer for itself (a layer is one parameter tensor) and to all of the model's gradient
as one vector, without error feedback, at the paper's ratios: test accuracy by epoch, over several seeds, and the
compression error of the same gradients at both granularities.

--out is the folder for all that `bench.experiments.experiment` writes.

Operators are those of the authors' code (github.com/sands-lab/layer-wise-aaai20), but for `layerwise_sizes.UNLIKE`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.common.command_line import Parser, UsageError, description, names, numbers
from bench.common.environment import dataset_digest
from bench.common.texts import commit_text, machine_text, sentences
from bench.data import load
from bench.data.folder import load_folder
from bench.experiments.experiment import Experiment, add_run_options, check_bounds, folder_for
from bench.experiments.findings import Finding, table
from bench.papers.layerwise import figures as layerwise_figures
from bench.papers.layerwise.findings import Runs, accuracy_table, along, judge_all, theory_table
from bench.papers.layerwise.runs import run
from bench.papers.layerwise.sizes import METHODS, PAPER, SMALL, UNLIKE, LayerwiseSize, Where, differences, specs

OUT = Path("results/layerwise")
#: The column of what was found, in whose sign it is to the statement.
OURS = 'ours: advantage of what the statement favours (where it says "the same", of layer-wise)'
#: Downloaded unless it is there.
PAPER_DATA = "cifar-10"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options, and what they come to: `size`, `where`."""
    parser = Parser(prog="python -m bench.layerwise", description=description(__doc__))
    parser.add_argument(
        "--paper",
        action="store_true",
        help="AlexNet and ResNet-9 in full with the paper's schedule, on --data; ResNet-50 on --imagenet if given",
    )
    parser.add_argument("--methods", type=names, default=list(METHODS), metavar="NAME,…")
    parser.add_argument("--networks", type=names, help="of those of the size", metavar="NAME,…")
    parser.add_argument("--ratios", type=numbers, help="of random k and top k", metavar="X,…")
    parser.add_argument("--thresholds", type=numbers, help="of threshold v", metavar="X,…")
    parser.add_argument("--seeds", type=int, help="runs of each setting", metavar="N")
    parser.add_argument("--epochs", type=float, help="of every run", metavar="N")
    parser.add_argument("--batch-size", type=int, help="images per worker and iteration", metavar="N")
    parser.add_argument("--width", type=float, help="factor of the networks' channels", metavar="X")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help=f"as for the training job (default: the shipped sample of Fashion-MNIST; with --paper {PAPER_DATA})",
    )
    parser.add_argument("--imagenet", help="folder of ImageNet, with --paper", metavar="PATH")
    add_run_options(parser, OUT)
    options = parser.parse_args(arguments)
    unknown = [method for method in options.methods if method not in METHODS]
    if unknown:
        raise UsageError(f"--methods must be of {', '.join(METHODS)}, got {unknown[0]!r}")
    options.size = _size(options)
    options.where = Where(options.data or (PAPER_DATA if options.paper else None), options.imagenet, options.device)
    options.out = folder_for(options, OUT)
    return options


def _size(options: argparse.Namespace) -> LayerwiseSize:
    """The preset, with what the options say otherwise."""
    size = PAPER if options.paper else SMALL
    if options.imagenet and not options.paper:
        raise UsageError("--imagenet is for --paper")
    networks = [network for network in size.networks if options.imagenet or not network.imagenet]
    if options.networks is not None:
        known = {network.name: network for network in networks}
        unknown = [name for name in options.networks if name not in known]
        if unknown:
            raise UsageError(f"--networks must be of {', '.join(known)} here, got {unknown[0]!r}")
        networks = [known[name] for name in options.networks]
    check_bounds(options, {"seeds": 1, "batch_size": 1, "epochs": 0, "width": 0, "processes": 1, "threads": 1})
    changes: dict[str, Any] = {}
    if options.epochs is not None:
        changes |= {"epochs": options.epochs, "long_epochs": options.epochs}
    changes |= {name: value for name in ("batch_size", "width") if (value := getattr(options, name)) is not None}
    whole = {name: value for name in ("ratios", "thresholds", "seeds") if (value := getattr(options, name)) is not None}
    return replace(size, networks=tuple(replace(network, **changes) for network in networks), **whole)


# --- results ---------------------------------------------------------------------------------------------------------


def caption(runs: Runs, size: LayerwiseSize, about: Mapping[str, Any]) -> str:
    """How the figures came about."""
    sources = dict.fromkeys(run["result"]["source"] for run in runs.values())
    each = "; ".join(
        f"{network.label}: {network.workers} workers x {network.batch_size} images in one process, "
        f"epochs: {network.epochs:g}, learning rate 0 to {size.lr:g} in {size.warmup:.0%} of the run, then to 0"
        for network in size.networks
    )
    parts = [
        f"Data: {'; '.join(sources)}",
        each,
        f"seeds 0 to {size.seeds - 1}: mean, least and most" if size.seeds > 1 else "seed 0",
        f"on {machine_text(about, about)}",
        commit_text(about),
        f"command: {about['command']}",
    ]
    unlike = differences(size)
    return sentences(parts) + (f"\n{unlike}." if unlike else "")


def report(runs: Runs, found: Sequence[Finding], options: argparse.Namespace, about: Mapping[str, Any]) -> str:
    """table.md."""
    size: LayerwiseSize = options.size
    parts = [
        "# Layer-wise against entire-model compression (Dutta et al. 2020)",
        caption(runs, size, about),
        table(found, ours=OURS),
        "## Differences from the paper",
        "\n".join(f"* {line}" for line in (*filter(None, [differences(size)]), *UNLIKE)),
    ]
    for network in size.networks:
        if any(run["spec"]["network"] == network.name for run in runs.values()):
            parts += [
                f"## {network.label}: accuracy at the end",
                "Mean ± standard deviation over the seeds; difference: layer-wise less entire-model, in points, with "
                "its 95 % confidence interval. Errors are ‖g - Q(g)‖² / ‖g‖² of the same gradients, those of the "
                "layer-wise runs, as means along the run.",
                accuracy_table(runs, network),
                f"## {network.label}: the theory's terms",
                "Noise terms of section 4 for one-way compression; then, relative to ‖g‖² and as means along the "
                "layer-wise runs, what Assumption 5 and Lemma 1 allow for E‖Q(g)‖² and what was measured.",
                theory_table(runs, network),
            ]
    return "\n\n".join(parts) + "\n"


#: Columns of a run's steps that are drawn or in tables.
SHOWN = (
    "iteration",
    "density",
    "layer_error",
    "layer_moment",
    "layer_bound",
    "model_error",
    "model_moment",
    "model_bound",
)


def condense(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    whole = ("source", "guessing", "evaluations", "diverged", "noise")
    steps = {name: result["steps"][name] for name in SHOWN if name in result["steps"]}
    return {"steps": steps, **{name: result[name] for name in whole if name in result}}


def draw(runs: Runs, options: argparse.Namespace, about: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """A figure for each method that was run."""
    words = caption(runs, options.size, about)
    for method in options.methods:
        figure = layerwise_figures.draw(runs, options.size.networks, method, words)
        if figure is not None:
            yield layerwise_figures.name_of(method), figure


def data_digest(options: argparse.Namespace) -> dict[str, Any]:
    """The digest of the data; what is wrong with them is said once, before any run."""
    digest = None
    for imagenet in {network.imagenet for network in options.size.networks}:
        if imagenet:
            load_folder(options.imagenet)
        else:
            digest = dataset_digest(load(options.where.data))
    return {"data_sha256": digest}


def condensed(runs: Runs) -> dict[str, Any]:
    """What each run was, its evaluations, and means along it."""
    return {
        name: {
            "spec": run["spec"],
            "seconds": run["seconds"],
            "evaluations": run["result"]["evaluations"],
            "diverged": run["result"]["diverged"],
            "noise": run["result"].get("noise"),
            "means": {column: along(run, column) for column in run["result"]["steps"] if column != "iteration"},
        }
        for name, run in runs.items()
    }


EXPERIMENT = Experiment(
    name="layerwise",
    record="layerwise.json",
    parse=parse,
    about=data_digest,
    specs=lambda options: specs(options.size, options.methods, options.where),
    run=run,
    condense=condense,
    judge=lambda runs, options: judge_all(runs, options.size.networks),
    report=report,
    draw=draw,
    summary=lambda runs, options: {"size": asdict(options.size), "runs": condensed(runs)},
)
main, redraw = EXPERIMENT.main, EXPERIMENT.redraw
