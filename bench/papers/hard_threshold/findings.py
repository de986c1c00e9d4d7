"""What Sahu et al. 2021 find beside what was found here, judged by written rules from the records alone."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace

from bench.experiments.findings import NO_RULE, Finding
from bench.papers.hard_threshold.logistic_findings import logistic
from bench.papers.hard_threshold.network_findings import networks
from bench.papers.hard_threshold.rules import (
    Runs,
)
from bench.papers.hard_threshold.sizes import HardThresholdSize


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
