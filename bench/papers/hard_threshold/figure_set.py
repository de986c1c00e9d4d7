"""Which figures the runs of `bench.hard_threshold` have, each with its title and caption."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from matplotlib.figure import Figure

from bench.common.texts import commit_text, machine_text, sentences
from bench.drawing.styles import PURPLE
from bench.papers.hard_threshold import figures as drawing
from bench.papers.hard_threshold.rules import Runs
from bench.papers.hard_threshold.sizes import Benchmark, HardThresholdSize, LogisticBenchmark

SMALL_IS = (
    "The small size: shipped or made data, small networks, few epochs. It asks whether the paper's findings hold there "
    "too, not whether its numbers do."
)
#: Metric -> how it is labelled.
LABELS = {"accuracy": "test accuracy (%)", "perplexity": "test perplexity", "hit_rate": "Hit-Rate@10 (%)"}
INTROSPECTED = {"images": "fig3", "text": "fig5", "ratings": "fig6"}
#: What lines and bands, or points and their bars, are.
RANGE, DEVIATION = "mean, least and most", "mean and standard deviation"


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
    """Every figure that the runs have, with the name of its file."""
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
                "fig11-entire-model.png",
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
            "fig2-volume.png",
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
            yield f"{figure}{suffix}.png", drawing.logistic(runs, wanted, panels, title, text)
        for (workers, _, _), figure in zip(problem.gdstar, ("fig8", "fig9"), strict=False):
            wanted = {"problem": name, "algorithm": "ef-gdstar", "workers": workers}
            title = f"Fig. {figure[3:]}: EF-GDstar, logistic regression on {data}, {workers} workers"
            text = caption(runs, about, wanted, paper=paper)
            yield f"{figure}-{name}.png", drawing.logistic(runs, wanted, ("bits", "epochs", "error"), title, text)


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
    yield f"{figure}-{benchmark.kind}.png", drawing.along_training(runs, pair, benchmark.metric, title, text, label)
    if benchmark.no_feedback:
        ratio, threshold = benchmark.no_feedback
        pair = [
            plain,
            line("topk", "ratio", ratio, f"top-{100 * ratio:g} %", feedback=None),
            line("threshold", "value", threshold, f"hard-threshold, λ = {threshold:g}", feedback=None),
        ]
        title = f"Fig. 12: without error feedback, {benchmark.network}"
        columns = (("density", "density"),)
        yield "fig12-no-feedback.png", drawing.along_training(runs, pair, benchmark.metric, title, text, label, columns)
    if benchmark.update:
        pair = [
            line("topk", "ratio", benchmark.update, "gradient compression (Algorithm 2)"),
            line("topk", "ratio", benchmark.update, "update compression (Algorithm 3)", feedback="update"),
        ]
        pair[1][1].update(color=PURPLE)
        title = f"Fig. 13: top-{100 * benchmark.update:g} %, {benchmark.network}"
        columns = (("error", "error ‖e‖², mean of the workers"),)
        yield "fig13-update.png", drawing.along_training(runs, pair, benchmark.metric, title, text, label, columns)
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
        yield f"accordion-{network}.png", drawing.along_training(runs, lines, benchmark.metric, title, text, label)
