"""What Sahu et al. 2021 find beside what was found here, judged by written rules from the records alone.

Runs of the same seed have the same data, initial weights and batches, so they are compared seed by seed: a mean
difference with its 95 % confidence interval (`bench.common.statistics.paired`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
from tabulate import tabulate

from bench.common.statistics import Difference, geometric_mean, holds, mean_and_spread, paired, spread_text
from bench.experiments.findings import NO_RULE, Finding, select
from bench.papers.hard_threshold.figures import by_fields, density, final
from bench.papers.hard_threshold.sizes import FINE_PRECISION, Benchmark, HardThresholdSize, LogisticBenchmark

Runs = Mapping[str, Mapping[str, Any]]
Record = Mapping[str, Any]

#: Of the trace, from its end: where EF-SGD has its final suboptimality.
TAIL = 0.2
#: Suboptimalities within this factor count as the same, as a run's own varies more.
SAME_FACTOR = 2.0
#: "About 600x less data".
FAR_LESS = 100.0
#: "In many iterations".
MANY = 0.1
#: Densities within this factor count as the same budget.
SAME_BUDGET = 1.5
#: λ within this of the paper's.
SAME_THRESHOLD = 0.01
#: Percentage points (perplexity: percent) within which two test metrics are the same.
MARGIN = 1.0

INTERVAL = "the 95 % confidence interval of the mean difference over the seeds"
BETTER = (
    f"{INTERVAL} lies above 0 (not confirmed: below {MARGIN:g} points, of perplexity percent; else open, which counts "
    "as not testable)"
)
NOT_WORSE = (
    f"{INTERVAL} lies above -{MARGIN:g} points, of perplexity percent (not confirmed: below 0, its mean -{MARGIN:g})"
)
EACH_SEED = "it is so for every seed"


# --- logistic regression ---------------------------------------------------------------------------------------------


def tail(record: Record) -> float:
    """Mean suboptimality over the end of the run."""
    values = record["result"]["trace"]["suboptimality"]
    return fmean(values[-max(1, round(TAIL * len(values))) :])


def along(record: Record) -> float:
    """Mean of log10 of the suboptimality over the run: the less, the faster."""
    return float(np.mean(np.log10(np.maximum(record["result"]["trace"]["suboptimality"], 1e-300))))


def logistic(runs: Runs, problem: LogisticBenchmark) -> list[Finding]:
    """The statements of Fig. 1, 4, 7, 8 and 9 on one data set."""
    of_problem = {
        name: run for name, run in runs.items() if run["spec"].get("problem") in (problem.name, _stand_in(problem))
    }
    if not of_problem:
        return []
    sgd, top, hard = (
        select(of_problem, algorithm="ef-sgd", compressor=name) for name in ("identity", "topk", "threshold")
    )
    data = _short(hard[0]["result"]["source"])
    found = [_fast(sgd, hard, data), _less_data(sgd, hard, data), _faster(top, hard, data), *_errors(top, hard, data)]
    if problem.name == "madelon":
        found += [_threshold(hard, 14881.0, data, "Fig. 7"), _silent(hard, data)]
        for where, (workers, _, _), stated in zip(("Fig. 8", "Fig. 9"), problem.gdstar, (1.7, 8.0), strict=True):
            star = {
                name: select(of_problem, algorithm="ef-gdstar", workers=workers, compressor=name)
                for name in ("topk", "threshold")
            }
            if star["threshold"]:
                found += _gdstar(star["topk"], star["threshold"], f"{data}, {workers} workers", where, stated)
                if where == "Fig. 8":
                    found.append(_threshold(star["threshold"], 2.98, data, where))
    return found


def _stand_in(problem: LogisticBenchmark) -> str:
    return "generated" if problem.name == "madelon" else problem.name


def _short(source: str) -> str:
    return source.split(" (")[0] if "(" in source else source


def _texts(values: Sequence[float], form: str = ".2g") -> str:
    return ", ".join(f"{value:{form}}" for value in values)


def _fast(sgd: Sequence[Record], hard: Sequence[Record], data: str) -> Finding:
    quotients = [tail(h) / tail(s) for h, s in zip(hard, sgd, strict=True)]
    typical = geometric_mean(quotients)
    return Finding(
        "Fig. 1a, 7a",
        "EF-SGD with hard-threshold converges as SGD without compression does",
        data,
        f"final f - f* over SGD's: {_texts(quotients)}",
        "the geometric mean over the seeds of the quotient of the final suboptimalities (mean of the run's last "
        f"{TAIL:.0%}) is at most {SAME_FACTOR:g}",
        typical <= SAME_FACTOR,
    )


def _less_data(sgd: Sequence[Record], hard: Sequence[Record], data: str) -> Finding:
    def quotients(key: str) -> list[float]:
        ends = [(s["result"]["trace"][key][-1], h["result"]["trace"][key][-1]) for s, h in zip(sgd, hard, strict=True)]
        return [theirs / max(ours, 1e-9) for theirs, ours in ends]

    elements = quotients("elements")
    return Finding(
        "Fig. 1b",
        "at about 600x less data",
        data,
        f"{_texts(elements, ',.0f')}x fewer elements ({_texts(quotients('num_bytes'), ',.0f')}x fewer bytes, positions "
        "and empty messages included)",
        f"at least {FAR_LESS:g}x fewer elements than SGD, for every seed",
        min(elements) >= FAR_LESS,
    )


def _faster(top: Sequence[Record], hard: Sequence[Record], data: str) -> Finding:
    sent = [fmean(r["result"]["trace"]["elements"][-1] for r in side) for side in (hard, top)]
    ours, theirs = [along(r) for r in hard], [along(r) for r in top]
    return Finding(
        "Fig. 1a, 7a",
        "faster than top-k at the same data volume",
        data,
        f"mean log10(f - f*) along the run {_texts(ours)} against {_texts(theirs)}; elements sent per worker "
        f"{sent[0]:,.0f} against {sent[1]:,.0f}",
        f"less for every seed, with no more than {SAME_BUDGET:g}x the elements",
        all(a < b for a, b in zip(ours, theirs, strict=True)) and sent[0] <= SAME_BUDGET * sent[1],
    )


def _errors(top: Sequence[Record], hard: Sequence[Record], data: str) -> list[Finding]:
    totals = [[r["result"]["trace"]["total_error"] for r in side] for side in (hard, top)]
    followed, early, bounds = [], [], []
    for record in top:
        trace = record["result"]["trace"]
        error, corrected = np.array(trace["error"][1:]), np.array(trace["corrected"][1:])
        followed.append(float(np.corrcoef(np.log(error), np.log(corrected))[0, 1]))
        early.append((int(np.argmax(error)) + 1) / len(error))
    for record in hard:
        result = record["result"]
        bound = result["length"] * (result["step"] * result["fields"]["value"]) ** 2
        bounds.append(max(result["trace"]["error"]) / bound)
    return [
        Finding(
            "Fig. 1c, 7c",
            "because its total error is smaller",
            data,
            f"Σ‖e‖² {_texts(totals[0])} against top-k's {_texts(totals[1])}",
            EACH_SEED,
            all(a < b for a, b in zip(*totals, strict=True)),
        ),
        Finding(
            "Fig. 1c, 4c",
            "top-k's error accumulates in the beginning (the first 500 of 3,000 iterations)",
            data,
            f"it is largest after {_texts(early, '.0%')} of the run",
            "within the first third, for every seed",
            max(early) <= 1 / 3,
        ),
        Finding(
            "Fig. 4b, c",
            "top-k's error follows the norm of the error-compensated gradient",
            data,
            f"correlation of the logarithms {_texts(followed)}",
            "above 0.9 for every seed",
            min(followed) > 0.9,
        ),
        Finding(
            "Remark 5",
            "hard-threshold's error is at most dγ²λ²",
            data,
            f"at most {_texts(bounds)} of that",
            "at most 1 (and float32's rounding, 1e-5) at every recorded point",
            max(bounds) <= 1 + 1e-5,
        ),
    ]


def _threshold(records: Sequence[Record], stated: float, data: str, where: str) -> Finding:
    result = records[0]["result"]
    ours = result["fields"]["value"]
    comparable = "published" in result["source"] or result["source"].startswith("madelon")
    return Finding(
        where,
        f"dγ²λ² = {records[0]['spec']['fields']['precision']:g} gives λ = {stated:g}",
        data,
        f"λ = {ours:.6g} (γ = {result['step']:.4g}, d = {result['length']})",
        f"within {SAME_THRESHOLD:.0%} of it" if comparable else NO_RULE,  # γ is the data's
        abs(ours / stated - 1) <= SAME_THRESHOLD if comparable else None,
    )


def _silent(hard: Sequence[Record], data: str) -> Finding:
    shares = [r["result"]["trace"]["silent"][-1] / r["result"]["trace"]["iteration"][-1] for r in hard]
    return Finding(
        "Fig. 7b",
        "hard-threshold sends no element at all in many iterations",
        data,
        f"in {_texts(shares, '.0%')} of them",
        f"in at least {MANY:.0%}, for every seed",
        min(shares) >= MANY,
    )


def _gdstar(top: Sequence[Record], hard: Sequence[Record], data: str, where: str, stated: float) -> list[Finding]:
    ends = [r["result"]["trace"]["suboptimality"][-1] for r in hard]
    of_top = [r["result"]["trace"]["suboptimality"][-1] for r in top]
    errors = [max(r["result"]["trace"]["error"]) for r in hard]
    epochs = hard[0]["result"]["trace"]["epoch"][-1]
    pairs = list(zip(top, hard, strict=True))
    quotients = [t["result"]["trace"]["elements"][-1] / h["result"]["trace"]["elements"][-1] for t, h in pairs]
    num_bytes = [t["result"]["trace"]["num_bytes"][-1] / h["result"]["trace"]["num_bytes"][-1] for t, h in pairs]
    return [
        Finding(
            where,
            f"EF-GDstar with hard-threshold reaches f - f* <= {FINE_PRECISION:g}",
            data,
            f"{_texts(ends)} after {epochs:,.0f} epochs (top-k: {_texts(of_top)})",
            "at the end of the run, for every seed",
            max(ends) <= FINE_PRECISION,
        ),
        Finding(
            where,
            f"its error stays below {FINE_PRECISION:g}",
            data,
            f"at most {_texts(errors)}",
            "at every recorded point, for every seed",
            max(errors) <= FINE_PRECISION,
        ),
        Finding(
            where,
            f"it sends {stated:g}x less data than top-k",
            data,
            f"{_texts(quotients)}x fewer elements over the run ({_texts(num_bytes)}x fewer bytes)",
            "fewer elements, for every seed; how many depends on where the run ends",
            min(quotients) > 1,
        ),
    ]


# --- networks --------------------------------------------------------------------------------------------------------


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
    data = f"{benchmark.network}, {_short(plain[0]['result']['source'])}"
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
            f"Σ‖e‖² {_texts(totals[0])} against {_texts(totals[1])}, at {100 * densities[0]:.3g} % against "
            f"{100 * densities[1]:.3g} % density",
            f"for every seed, at densities within a factor of {SAME_BUDGET:g}; open if it holds only with more sent",
            smaller if same or not smaller or densities[0] < densities[1] else None,
        ),
        Finding(
            where,
            "large accumulation of top-k's error in the beginning",
            data,
            f"top-k's error is largest after {_texts(peaks, '.0%')} of the run",
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
    data = f"{network}, {_short(hard[0]['result']['source'])}"
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
            f"{_texts(quotients)}x less",
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


def missing(data: Container[str], runs: Runs) -> list[Finding]:
    """What the paper reports on data that weren't given."""
    found = []
    if "gisette" not in data and any(run["spec"]["part"] == "logistic" for run in runs.values()):
        found.append(
            Finding(
                "Fig. 1, 4",
                "all of these on gisette, k = 0.17 %, λ = 4.2",
                "gisette",
                "needs gisette; the same statements are judged on what stands in for it",
                NO_RULE,
                None,
            )
        )
    trained = {run["result"]["source"] for run in runs.values() if run["spec"].get("kind") == "images"}
    if trained and not any("CIFAR-100" in source for source in trained):
        found.append(
            Finding(
                "Table 7",
                "hard-threshold against ACCORDION on CIFAR-100",
                "CIFAR-100",
                "needs CIFAR-100: --data images=cifar-100",
                NO_RULE,
                None,
            )
        )
    return found


def judge_all(runs: Runs, size: HardThresholdSize, data: Container[str]) -> list[Finding]:
    """Every statement that the runs speak of, in the order of the paper's parts."""
    found = [finding for problem in size.problems for finding in logistic(runs, problem)]
    found += [finding for benchmark in size.benchmarks for finding in networks(runs, benchmark)]
    found = [replace(f, ours=f"{f.ours}; open") if f.holds is None and f.rule != NO_RULE else f for f in found]
    return found + missing(data, runs)
