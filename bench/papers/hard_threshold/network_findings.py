"""What Sahu et al. 2021 find of networks beside what was found here, and tables of all settings.

Runs of the same seed have the same data, initial weights and batches, so they are compared seed by seed: a mean
difference with its 95 % confidence interval (`bench.common.statistics.paired`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np
from tabulate import tabulate

from bench.common.statistics import Difference, holds, mean_and_spread, paired, spread_text
from bench.experiments.findings import Finding, select
from bench.papers.hard_threshold.figures import by_fields, density, final
from bench.papers.hard_threshold.rules import (
    BETTER,
    EACH_SEED,
    MARGIN,
    NOT_WORSE,
    SAME_BUDGET,
    Record,
    Runs,
    number_list,
    short_source,
)
from bench.papers.hard_threshold.sizes import Benchmark


def gain(benchmark: Benchmark) -> Callable[[Record], float]:
    """A run's final metric, the more the better: points of accuracy or hit rate; -100·log of the perplexity."""
    if benchmark.higher:
        return lambda record: 100 * final(record, benchmark.metric)
    return lambda record: -100 * float(np.log(final(record, benchmark.metric)))


def at_density(records: Sequence[Record], value: Callable[[Record], float], wanted: float) -> float | None:
    """Between runs of several densities, linearly in the logarithm of the density; None outside of them.

    A factor `SAME_BUDGET` beyond them counts as the outermost.
    """
    points = sorted((density(record), value(record)) for record in records)
    low, high = points[0][0], points[-1][0]
    if not low / SAME_BUDGET <= wanted <= high * SAME_BUDGET:
        return None
    x, y = [np.log(point[0]) for point in points], [point[1] for point in points]
    return float(np.interp(np.log(wanted), x, y))


def by_seed(records: Sequence[Record]) -> dict[int, list[Record]]:
    groups: dict[int, list[Record]] = {}
    for record in records:
        groups.setdefault(record["spec"]["seed"], []).append(record)
    return groups


def networks(runs: Runs, benchmark: Benchmark) -> list[Finding]:
    """The statements of Fig. 2, 3, 5, 6, 11, 12, 13 and Tables 1 and 7 on one benchmark."""
    base = {"kind": benchmark.kind, "network": benchmark.network, "feedback": "gradient"}
    plain = select(runs, **base, compressor="identity")
    if not plain:
        return []
    data = f"{benchmark.network}, {short_source(plain[0]['result']['source'])}"
    hard = [r for r in select(runs, **base, compressor="threshold") if "value" in r["spec"]["fields"]]
    top = select(runs, **base, compressor="topk", granularity="layer")
    whole = select(runs, **base, compressor="topk", granularity="model")
    value = gain(benchmark)
    figure = {"images": "Fig. 2a", "text": "Fig. 2b", "ratings": "Fig. 2c"}[benchmark.kind]
    found = [_at_equal_volume(figure, "layer-wise top-k", top, hard, value, data)]
    if whole:
        found.append(_at_equal_volume("Fig. 11", "entire-model top-k", whole, hard, value, data))
    if benchmark.kind == "images":
        found.append(_with_less(figure, top, hard, value, data))
    best = max(by_fields(hard).values(), key=lambda group: fmean(value(r) for r in group))
    difference = _difference(best, plain, value)
    found.append(
        Finding(
            figure,
            "hard-threshold almost reaches what no compression does",
            data,
            f"{difference.text()} at {100 * fmean(density(r) for r in best):.3g} % density",
            NOT_WORSE,
            holds("not worse", difference, MARGIN),
        )
    )
    found += _introspection(benchmark, top, hard, data)
    if benchmark.no_feedback:
        found += _without_feedback(runs, benchmark, plain, value, data)
    if benchmark.update:
        sides = [
            select(
                runs,
                **{**base, "feedback": form},
                compressor="topk",
                granularity="layer",
                fields={"ratio": benchmark.update},
            )
            for form in ("gradient", "update")
        ]
        difference = _difference(sides[0], sides[1], value)
        texts = [spread_text([100 * final(r, benchmark.metric) for r in side]) for side in sides]
        found.append(
            Finding(
                "Fig. 13",
                "top-k: gradient compression better than update compression (92.96 against 90.78)",
                data,
                f"{texts[0]} against {texts[1]}; difference {difference.text()}",
                BETTER,
                holds("better", difference, MARGIN),
            )
        )
    for network, most, least in benchmark.accordion:
        found += _accordion(runs, benchmark, network, most, least)
    return found


def _difference(first: Sequence[Record], second: Sequence[Record], value: Callable[[Record], float]) -> Difference:
    """Over the seeds that both have."""
    ours, theirs = by_seed(first), by_seed(second)
    seeds = sorted(ours.keys() & theirs.keys())
    return paired([value(ours[s][0]) for s in seeds], [value(theirs[s][0]) for s in seeds])


def _at_equal_volume(
    where: str, against: str, top: Sequence[Record], hard: Sequence[Record], value: Callable[[Record], float], data: str
) -> Finding:
    tops = by_seed(top)
    pairs: list[tuple[float, float]] = []
    texts: dict[str, list[float]] = {}
    for seed, records in by_seed(hard).items():
        each = []
        for record in records:
            theirs = at_density(tops[seed], value, density(record))
            if theirs is not None:
                each.append((value(record), theirs))
                texts.setdefault(_fields(record), []).append(value(record) - theirs)
        if each:
            pairs.append((fmean(ours for ours, _ in each), fmean(theirs for _, theirs in each)))
    rule = (
        f"averaged over the λ whose density lies among top-k's (factor {SAME_BUDGET:g}), top-k interpolated at the "
        f"same density: {BETTER}"
    )
    claim = f"better than {against} at the same average density"
    if not pairs:
        return Finding(where, claim, data, "no λ within top-k's densities", rule, None)
    difference = paired([ours for ours, _ in pairs], [theirs for _, theirs in pairs])
    listed = ", ".join(f"{name}: {fmean(values):+.2f}" for name, values in texts.items())
    return Finding(where, claim, data, f"{difference.text()} ({listed})", rule, holds("better", difference, MARGIN))


def _fields(record: Record) -> str:
    names = {"value": "λ", "ratio": "k", "count": "k"}
    return ", ".join(f"{names.get(key, key)} {value:g}" for key, value in record["spec"]["fields"].items())


def _with_less(
    where: str, top: Sequence[Record], hard: Sequence[Record], value: Callable[[Record], float], data: str
) -> Finding:
    """ "At 0.12 % better than top-k at 0.75 %": the pair of settings with the largest advantage among those."""
    rule = f"for the best pair of settings with at least 4x the volume for top-k: {NOT_WORSE}"
    claim = "not worse than top-k that sends 6x as much"
    pairs = [
        (ours, theirs)
        for ours in by_fields(hard).values()
        for theirs in by_fields(top).values()
        if 4 * fmean(density(r) for r in ours) <= fmean(density(r) for r in theirs)
    ]
    if not pairs:
        return Finding(where, claim, data, "no such pair", rule, None)
    ours, theirs = max(pairs, key=lambda pair: _difference(pair[0], pair[1], value).mean)
    difference = _difference(ours, theirs, value)
    densities = [100 * fmean(density(r) for r in side) for side in (ours, theirs)]
    text = f"{difference.text()}, {densities[0]:.3g} % against {densities[1]:.3g} %"
    return Finding(where, claim, data, text, rule, holds("not worse", difference, MARGIN))


def _introspection(benchmark: Benchmark, top: Sequence[Record], hard: Sequence[Record], data: str) -> list[Finding]:
    """Fig. 3, 5 and 6: the errors of a pair of runs."""
    where = {"images": "Fig. 3b", "text": "Fig. 5b", "ratings": "Fig. 6b"}[benchmark.kind]
    index = benchmark.introspected
    ours = [r for r in hard if r["spec"]["fields"]["value"] == benchmark.thresholds[index]]
    theirs = [r for r in top if r["spec"]["fields"]["ratio"] == benchmark.ratios[index]]
    totals = [[r["result"]["steps"]["total_error"][-1] for r in side] for side in (ours, theirs)]
    densities = [fmean(density(r) for r in side) for side in (ours, theirs)]
    same = 1 / SAME_BUDGET <= densities[0] / densities[1] <= SAME_BUDGET
    smaller = all(a < b for a, b in zip(*totals, strict=True))
    peaks = [int(np.argmax(r["result"]["steps"]["error"])) / len(r["result"]["steps"]["error"]) for r in theirs]
    return [
        Finding(
            where,
            "smaller total error than top-k",
            data,
            f"Σ‖e‖² {number_list(totals[0])} against {number_list(totals[1])}, at {100 * densities[0]:.3g} % against "
            f"{100 * densities[1]:.3g} % density",
            f"for every seed, at densities within a factor of {SAME_BUDGET:g}; open if it holds only with more sent",
            smaller if same or not smaller or densities[0] < densities[1] else None,
        ),
        Finding(
            where,
            "large accumulation of top-k's error in the beginning",
            data,
            f"top-k's error is largest after {number_list(peaks, '.0%')} of the run",
            "within the first third, for every seed",
            max(peaks) <= 1 / 3,
        ),
    ]


def _without_feedback(
    runs: Runs, benchmark: Benchmark, plain: Sequence[Record], value: Callable[[Record], float], data: str
) -> list[Finding]:
    assert benchmark.no_feedback is not None
    base = {"kind": benchmark.kind, "network": benchmark.network, "feedback": None}
    top, hard = (select(runs, **base, compressor=name) for name in ("topk", "threshold"))
    densities = [100 * fmean(density(r) for r in side) for side in (hard, top)]
    difference, to_plain = _difference(hard, top, value), _difference(plain, hard, value)
    held = holds("better", difference, MARGIN)
    dense = densities[0] > SAME_BUDGET * densities[1]
    return [
        Finding(
            "Fig. 12",
            "without error feedback, hard-threshold better than top-k",
            data,
            f"{difference.text()}, at {densities[0]:.3g} % against {densities[1]:.3g} % density",
            f"with at most {SAME_BUDGET:g}x the elements (else open): {BETTER}",
            None if held and dense else held,
        ),
        Finding(
            "Fig. 12",
            "without error feedback, hard-threshold at 4.7 % doesn't reach what no compression does",
            data,
            f"no compression is {to_plain.text()} better",
            f"no compression is better: {BETTER}",
            holds("better", to_plain, MARGIN),
        ),
    ]


def _accordion(runs: Runs, benchmark: Benchmark, network: str, most: float, least: float) -> list[Finding]:
    accordion, hard = accordion_rows(runs, network, most, least)[2:]
    if not accordion or not hard:
        return []
    data = f"{network}, {short_source(hard[0]['result']['source'])}"
    where = "Table 7" if "CIFAR-100" in data else "Table 1"
    value = gain(benchmark)
    difference = _difference(hard, accordion, value)
    quotients = [density(a) / density(h) for a, h in zip(accordion, hard, strict=True)]
    return [
        Finding(
            where,
            "hard-threshold more accurate than ACCORDION (by 0.5 to 0.8 points)",
            data,
            difference.text(),
            BETTER,
            holds("better", difference, MARGIN),
        ),
        Finding(
            where,
            "hard-threshold sends less than ACCORDION (about 3.5x)",
            data,
            f"{number_list(quotients)}x less",
            EACH_SEED,
            min(quotients) > 1,
        ),
    ]


def accordion_rows(runs: Runs, network: str, most: float, least: float) -> list[list[Record]]:
    """Top-k_max, top-k_min, ACCORDION, hard-threshold: the rows of Tables 1 and 7."""
    base = {"kind": "images", "network": network, "feedback": "gradient", "granularity": "layer"}
    return [
        select(runs, **base, compressor="topk", fields={"ratio": most}),
        select(runs, **base, compressor="topk", fields={"ratio": least}),
        select(runs, **base, compressor="accordion", fields={"most": most, "least": least}),
        select(runs, **base, compressor="threshold", fields={"least": least}),
    ]


def accordion_table(runs: Runs, benchmark: Benchmark) -> str:
    """Tables 1 and 7; the density's factor is how much less than top-k_max."""
    rows = []
    for network, most, least in benchmark.accordion:
        groups = accordion_rows(runs, network, most, least)
        if not all(groups):
            continue
        names = (f"top-{most:.3g}", f"top-{least:.3g}", "ACCORDION", "hard-threshold")
        reference = fmean(density(r) for r in groups[0])
        for name, group in zip(names, groups, strict=True):
            share = fmean(density(r) for r in group)
            accuracy = spread_text([100 * final(r, benchmark.metric) for r in group])
            rows.append([network, name, accuracy, f"{100 * share:.3g} ({reference / share:.1f}x)", len(group)])
    heads = ["network", "method", "accuracy (%)", "average density (%)", "seeds"]
    return str(tabulate(rows, heads, tablefmt="github", disable_numparse=True)) if rows else ""


def metric_table(runs: Runs, benchmark: Benchmark) -> str:
    """A row for each setting: its final metric, density and total error, over the seeds."""
    wanted = {"kind": benchmark.kind, "network": benchmark.network}
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in select(runs, **wanted):
        spec = record["spec"]
        key = (spec["compressor"], _fields(record), spec["granularity"], spec["feedback"] or "none")
        groups.setdefault(key, []).append(record)
    rows = []
    for key, group in groups.items():
        metric = [final(r, benchmark.metric) * (100 if benchmark.higher else 1) for r in group]
        errors = [r["result"]["steps"].get("total_error", [0.0])[-1] for r in group]
        diverged = sum(r["result"]["diverged"] is not None for r in group)
        text = spread_text(metric) + (f" ({diverged} diverged)" if diverged else "")
        rows.append([*key, text, f"{100 * fmean(density(r) for r in group):.3g}", f"{mean_and_spread(errors)[0]:.3g}"])
    name = benchmark.metric.replace("_", " ") + (" (%)" if benchmark.higher else "")
    heads = ["compressor", "setting", "granularity", "error feedback", name, "average density (%)", "total error"]
    return str(tabulate(rows, heads, tablefmt="github", disable_numparse=True))
