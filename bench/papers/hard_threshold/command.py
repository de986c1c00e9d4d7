"""Hard-threshold against top-k with error feedback: `python -m bench.hard_threshold` (Sahu et al. 2021).

    --part logistic     l2-regularised logistic regression on 20 and 100 workers: EF-SGD (Fig. 1, 4, 7) and EF-GDstar
                        (Fig. 8, 9); `bench.simulated.logistic`
    --part networks     images, a text and ratings on 8 workers: test metric against data volume (Fig. 2, 11), error and
                        density along training (Fig. 3, 5, 6), without error feedback (Fig. 12), gradient against update
                        compression (Fig. 13), ACCORDION (Tables 1 and 7); `bench.simulated.training`
    --data KIND=PATH    madelon, gisette: LIBSVM files; images: as for the training job; text: WikiText-2; ratings:
                        MovieLens. What isn't given is replaced by what is shipped or made, and named in every result

    --out folder (results/hard-threshold)
        runs/<name>.json        each run (`bench.experiments.grid`); what `--resume` goes on with
        hard-threshold.json     findings and how they came about
        runs.json.gz            what figures and tables need of the runs (`bench.experiments.condensed_runs`)
        table.md                the paper's findings beside ours, judged by written rules; how the runs differ from the
                                paper's; tables of all settings
        fig<n>….png

The small size takes networks and data that end within minutes on 2 cores; `--paper` those of Tables 2 to 6. Error
feedback is Algorithm 1 (γ inside) for the logistic regression and Algorithm 2 for networks, but for Fig. 13's Algorithm
3; compression is layer by layer, as in the paper, but for Fig. 11.
"""

from __future__ import annotations

import argparse
import hashlib
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from bench.common.command_line import Parser, UsageError, description, names, refused
from bench.common.environment import environment
from bench.common.files import CannotWrite, write_atomically, write_json, writing
from bench.common.texts import commit_text, machine_text, sentences, short_commit
from bench.data import DataError
from bench.drawing import page
from bench.drawing.styles import PURPLE
from bench.experiments import condensed_runs as kept
from bench.experiments.findings import Finding, table
from bench.experiments.grid import GridError, run_grid
from bench.papers.hard_threshold import figures as drawing
from bench.papers.hard_threshold.findings import Runs, accordion_table, judge_all, metric_table
from bench.papers.hard_threshold.runs import run
from bench.papers.hard_threshold.sizes import (
    CIFAR100_MOST,
    PAPER,
    SMALL,
    Benchmark,
    Given,
    HardThresholdSize,
    LogisticBenchmark,
    Part,
    differences,
    specs,
)
from ring.machine import usable_cores

OUT = Path("results/hard-threshold")
PARTS: tuple[Part, ...] = ("logistic", "networks")
DATA_KINDS = ("madelon", "gisette", "images", "text", "ratings")
SMALL_IS = (
    "The small size: shipped or made data, small networks, few epochs. It asks whether the paper's findings hold there "
    "too, not whether its numbers do."
)
#: Metric -> how it is labelled.
LABELS = {"accuracy": "test accuracy (%)", "perplexity": "test perplexity", "hit_rate": "Hit-Rate@10 (%)"}
INTROSPECTED = {"images": "fig3", "text": "fig5", "ratings": "fig6"}


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--processes",
        type=int,
        default=min(2, usable_cores()),
        help="runs at a time (default: %(default)s)",
        metavar="N",
    )
    parser.add_argument("--threads", type=int, default=1, help="of each run (default: 1)", metavar="N")
    parser.add_argument("--out", type=Path, help=f"folder for the results (default: {OUT})", metavar="DIR")
    parser.add_argument("--resume", action="store_true", help="go on with the runs in --out")
    options = parser.parse_args(arguments)
    for name in ("seeds", "epochs", "gdstar_epochs", "processes", "threads"):
        value = getattr(options, name)
        if value is not None and not (value > 0 if name == "epochs" else value >= 1):
            raise UsageError(f"--{name.replace('_', '-')} must be at least 1, got {value:g}")
    options.parts = PARTS if options.part == "all" else (options.part,)
    options.given = _given(options.data)
    options.size = _size(options)
    options.out = options.out or (Path(f"{OUT}-paper") if options.paper else OUT)
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


#: Of a network's run, the columns of its steps that are drawn.
DRAWN = ("iteration", "error", "density")
#: What lines and bands, or points and their bars, are.
RANGE, DEVIATION = "mean, least and most", "mean and standard deviation"


def part(result: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a run."""
    if "trace" in result:
        return dict(result)
    steps = {name: result["steps"][name] for name in DRAWN if name in result["steps"]}
    steps["total_error"] = result["steps"].get("total_error", [0.0])[-1:]
    names = ("source", "evaluations", "num_parameters", "average_density", "diverged")
    return {"steps": steps, **{name: result[name] for name in names}}


def caption(
    runs: Runs, about: Mapping[str, Any], wanted: Mapping[str, Any], *, paper: bool, spread: str = RANGE
) -> str:
    """How the runs of a figure came about, and what it shows of the seeds."""
    these = [one for one in runs.values() if all(one["spec"].get(key) == value for key, value in wanted.items())]
    sources = dict.fromkeys(one["result"]["source"] for one in these)
    seeds = sorted({one["spec"]["seed"] for one in these})
    spec = these[0]["spec"]
    parts = [f"Data: {'; '.join(sources)}"]
    if spec["part"] == "networks":
        parts.append(
            f"{spec['network']}, {these[0]['result']['num_parameters']:,} parameters, {spec['workers']} workers x "
            f"{spec['batch_size']} in one process, {spec['epochs']:g} epochs"
        )
    parts += [
        f"seeds {', '.join(map(str, seeds))}: {spread}",
        f"on {machine_text(about, about)}",
        commit_text(about),
        f"command: {about['command']}",
    ]
    return sentences(parts) + ("" if paper or spec["part"] == "logistic" else f"\n{SMALL_IS}")


def draw(runs: Runs, size: HardThresholdSize, about: Mapping[str, Any], *, paper: bool) -> Iterator[tuple[str, Figure]]:
    """(name, figure) of every figure that the runs have."""
    for problem in size.problems:
        yield from _draw_logistic(runs, problem, about, paper=paper)
    panels = []
    for benchmark in size.benchmarks:
        wanted = {"kind": benchmark.kind, "network": benchmark.network}
        if not any(one["spec"].get("kind") == benchmark.kind for one in runs.values()):
            continue
        text = caption(runs, about, wanted, paper=paper)
        panel = {
            **wanted,
            "feedback": "gradient",
            "granularity": "layer",
            "metric": benchmark.metric,
            "label": LABELS[benchmark.metric],
            "title": f"{benchmark.network}, {benchmark.kind}",
        }
        panels.append(panel)
        if benchmark.kind == "images":
            title = f"Fig. 11: test metric against data volume, entire-model top-k: {benchmark.network}"
            about_points = caption(runs, about, wanted, paper=paper, spread=DEVIATION)
            yield (
                "fig11-entire-model",
                drawing.metric_against_volume(runs, [panel | {"granularity": "model"}], title, about_points),
            )
        yield from _draw_training(runs, benchmark, text)
    if panels:
        kinds = [
            caption(runs, about, {key: panel[key] for key in ("kind", "network")}, paper=True, spread=DEVIATION)
            for panel in panels
        ]
        text = "\n".join(kinds) + ("" if paper else f"\n{SMALL_IS}")
        yield (
            "fig2-volume",
            drawing.metric_against_volume(runs, panels, "Fig. 2: test metric against data volume", text),
        )


def _draw_logistic(
    runs: Runs, problem: LogisticBenchmark, about: Mapping[str, Any], *, paper: bool
) -> Iterator[tuple[str, Figure]]:
    for name in dict.fromkeys((problem.name, "generated" if problem.name == "madelon" else problem.name)):
        if not any(one["spec"].get("problem") == name for one in runs.values()):
            continue
        wanted = {"problem": name, "algorithm": "ef-sgd", "workers": problem.workers}
        text = caption(runs, about, wanted, paper=paper)
        data = "points like madelon's" if name == "generated" else name
        what = f"EF-SGD, logistic regression on {data}, {problem.workers} workers"
        suffix = "" if name == "gisette" else f"-{name}"
        for figure, panels in (
            ("fig1", ("epochs", "bits", "error")),
            ("fig4", ("bits", "corrected", "error-iterations")),
            ("fig7", ("bits", "elements", "error-iterations")),
        ):
            if figure == "fig7" and problem.name != "madelon":
                continue
            title = f"Fig. {figure[3:]}: {what}" + (
                " (the paper's is on gisette)" if suffix and figure != "fig7" else ""
            )
            yield f"{figure}{suffix}", drawing.logistic(runs, wanted, panels, title, text)
        for (workers, _, _), figure in zip(problem.gdstar, ("fig8", "fig9"), strict=False):
            wanted = {"problem": name, "algorithm": "ef-gdstar", "workers": workers}
            title = f"Fig. {figure[3:]}: EF-GDstar, logistic regression on {data}, {workers} workers"
            text = caption(runs, about, wanted, paper=paper)
            yield f"{figure}-{name}", drawing.logistic(runs, wanted, ("bits", "epochs", "error"), title, text)


def _draw_training(runs: Runs, benchmark: Benchmark, text: str) -> Iterator[tuple[str, Figure]]:
    base = {"kind": benchmark.kind, "network": benchmark.network, "feedback": "gradient"}
    ratio, threshold = benchmark.ratios[benchmark.introspected], benchmark.thresholds[benchmark.introspected]
    styles, label = drawing.STYLES, LABELS[benchmark.metric]
    plain = ({**base, "compressor": "identity"}, styles["identity"])

    def line(compressor: str, field: str, value: float, words: str, **more: Any) -> tuple[Any, Any]:
        conditions = {**base, "compressor": compressor, "granularity": "layer", "fields": {field: value}, **more}
        return conditions, {**styles[compressor], "label": words}

    figure = INTROSPECTED[benchmark.kind]
    pair = [
        plain,
        line("topk", "ratio", ratio, f"top-{100 * ratio:g} %"),
        line("threshold", "value", threshold, f"hard-threshold, λ = {threshold:g}"),
    ]
    title = f"Fig. {figure[3:]}: top-k and hard-threshold, {benchmark.network}"
    yield f"{figure}-{benchmark.kind}", drawing.along_training(runs, pair, benchmark.metric, title, text, label)
    if benchmark.no_feedback:
        ratio, threshold = benchmark.no_feedback
        pair = [
            plain,
            line("topk", "ratio", ratio, f"top-{100 * ratio:g} %", feedback=None),
            line("threshold", "value", threshold, f"hard-threshold, λ = {threshold:g}", feedback=None),
        ]
        title = f"Fig. 12: without error feedback, {benchmark.network}"
        columns = (("density", "density"),)
        yield "fig12-no-feedback", drawing.along_training(runs, pair, benchmark.metric, title, text, label, columns)
    if benchmark.update:
        pair = [
            line("topk", "ratio", benchmark.update, "gradient compression (Algorithm 2)"),
            line("topk", "ratio", benchmark.update, "update compression (Algorithm 3)", feedback="update"),
        ]
        pair[1][1].update(color=PURPLE)
        title = f"Fig. 13: top-{100 * benchmark.update:g} %, {benchmark.network}"
        columns = (("error", "error ‖e‖², mean of the workers"),)
        yield "fig13-update", drawing.along_training(runs, pair, benchmark.metric, title, text, label, columns)
    for network, most, least in benchmark.accordion:
        lines = [
            ({**plain[0], "network": network}, plain[1]),
            line("topk", "ratio", most, f"top-{100 * most:g} %", network=network),
            line("topk", "ratio", least, f"top-{100 * least:g} %", network=network),
            line("accordion", "most", most, "ACCORDION", network=network, fields={"most": most, "least": least}),
            line("threshold", "least", least, "hard-threshold, 1/(2√k_min)", network=network),
        ]
        lines[1][1].update(linestyle=":")
        title = f"Tables 1 and 7: ACCORDION and hard-threshold, {network}"
        yield f"accordion-{network}", drawing.along_training(runs, lines, benchmark.metric, title, text, label)


def report(
    runs: Runs,
    size: HardThresholdSize,
    given: Mapping[str, Given],
    about: Mapping[str, Any],
    found: Sequence[Finding],
    *,
    paper: bool,
) -> str:
    """table.md."""
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
        *([] if paper else [SMALL_IS]),
        "Differences and intervals are over the seeds, in percentage points (of perplexity in percent).",
        table(found),
        "## Differences from the paper",
        "\n".join(f"* {line}" for line in differences(size, given, parts_of(runs))),
    ]
    for benchmark in size.benchmarks:
        if any(one["spec"].get("kind") == benchmark.kind for one in runs.values()):
            parts += [f"## {benchmark.network}, {benchmark.kind}: all settings", metric_table(runs, benchmark)]
            rows = accordion_table(runs, benchmark)
            if rows:
                parts += ["## ACCORDION (Tables 1 and 7)", rows]
    return "\n\n".join(parts) + "\n"


def parts_of(runs: Runs) -> list[Part]:
    """Those that were run."""
    found = {one["spec"]["part"] for one in runs.values()}
    return [part for part in PARTS if part in found]


def write(
    runs: Runs, found: Sequence[Finding], options: argparse.Namespace, about: Mapping[str, Any], folder: Path
) -> list[Path]:
    """table.md and all figures."""
    text = report(runs, options.size, options.given, about, found, paper=options.paper)
    written = [folder / "table.md"]
    write_atomically(written[0], text.encode())
    with page.figure_style():
        for name, figure in draw(runs, options.size, about, paper=options.paper):
            written.append(page.write_figure(figure, folder / f"{name}.png"))
    return written


def redraw(path: Path) -> list[Path]:
    """Figures and tables again, of the hard-threshold.json at `path` and the runs beside it.

    Raises: as `kept.recorded`.
    """
    about, words, runs = kept.recorded(path)
    options = parse(words)  # the size is what the options made of it
    return write(runs, judge_all(runs, options.size, options.given), options, about, path.parent)


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        options = parse(words)
        about = environment(("numpy", "scipy", "torch", "numba", "scikit-learn")) | {
            "command": shlex.join(["python", "-m", "bench.hard_threshold", *words]),
            "cores": usable_cores(),
            "processes": options.processes,
            "parts": list(options.parts),
        }
        grid = specs(options.size, options.given, options.parts, options.device)
        records = run_grid(
            run, grid, options.out / "runs", processes=options.processes, threads=options.threads, resume=options.resume
        )
        with writing(options.out):
            runs = kept.keep(options.out, records, part)
            found = judge_all(runs, options.size, options.given)
            record = {
                "environment": about,
                "findings": [finding.as_dict() for finding in found],
                "seconds": {name: one["seconds"] for name, one in runs.items()},
            }
            write_json(options.out / "hard-threshold.json", record)
            write(runs, found, options, about, options.out)
            print((options.out / "table.md").read_text())
    except (UsageError, DataError, GridError, CannotWrite) as error:
        return refused(error)
    return 0
