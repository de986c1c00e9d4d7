"""What Sahu et al. 2021 find of logistic regression (Fig. 1, 4, 7, 8, 9) beside what was found here."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from bench.common.statistics import geometric_mean
from bench.experiments.findings import NO_RULE, Finding, select
from bench.papers.hard_threshold.rules import (
    EACH_SEED,
    SAME_BUDGET,
    Record,
    Runs,
    number_list,
    short_source,
)
from bench.papers.hard_threshold.sizes import FINE_PRECISION, LogisticBenchmark

#: The share of the trace, from its end, in which EF-SGD has its final suboptimality.
TAIL = 0.2
#: Suboptimalities within this factor count as the same, as a run's own varies more.
SAME_FACTOR = 2.0
#: "About 600x less data".
FAR_LESS = 100.0
#: "In many iterations".
MANY = 0.1
#: The relative distance within which λ is the paper's.
SAME_THRESHOLD = 0.01


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
    data = short_source(hard[0]["result"]["source"])
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


def _fast(sgd: Sequence[Record], hard: Sequence[Record], data: str) -> Finding:
    quotients = [tail(h) / tail(s) for h, s in zip(hard, sgd, strict=True)]
    typical = geometric_mean(quotients)
    return Finding(
        "Fig. 1a, 7a",
        "EF-SGD with hard-threshold converges as SGD without compression does",
        data,
        f"final f - f* over SGD's: {number_list(quotients)}",
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
        f"{number_list(elements, ',.0f')}x fewer elements ({number_list(quotients('num_bytes'), ',.0f')}x fewer bytes, "
        "positions and empty messages included)",
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
        f"mean log10(f - f*) along the run {number_list(ours)} against {number_list(theirs)}; elements sent per worker "
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
            f"Σ‖e‖² {number_list(totals[0])} against top-k's {number_list(totals[1])}",
            EACH_SEED,
            all(a < b for a, b in zip(*totals, strict=True)),
        ),
        Finding(
            "Fig. 1c, 4c",
            "top-k's error accumulates in the beginning (the first 500 of 3,000 iterations)",
            data,
            f"it is largest after {number_list(early, '.0%')} of the run",
            "within the first third, for every seed",
            max(early) <= 1 / 3,
        ),
        Finding(
            "Fig. 4b, c",
            "top-k's error follows the norm of the error-compensated gradient",
            data,
            f"correlation of the logarithms {number_list(followed)}",
            "above 0.9 for every seed",
            min(followed) > 0.9,
        ),
        Finding(
            "Remark 5",
            "hard-threshold's error is at most dγ²λ²",
            data,
            f"at most {number_list(bounds)} of that",
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
        f"in {number_list(shares, '.0%')} of them",
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
            f"{number_list(ends)} after {epochs:,.0f} epochs (top-k: {number_list(of_top)})",
            "at the end of the run, for every seed",
            max(ends) <= FINE_PRECISION,
        ),
        Finding(
            where,
            f"its error stays below {FINE_PRECISION:g}",
            data,
            f"at most {number_list(errors)}",
            "at every recorded point, for every seed",
            max(errors) <= FINE_PRECISION,
        ),
        Finding(
            where,
            f"it sends {stated:g}x less data than top-k",
            data,
            f"{number_list(quotients)}x fewer elements over the run ({number_list(num_bytes)}x fewer bytes)",
            "fewer elements, for every seed; how many depends on where the run ends",
            min(quotients) > 1,
        ),
    ]
