"""What Dutta et al. 2020 find beside what was found here: paired differences over seeds, judged by written rules.

Runs of a setting at both granularities with the same seed have the same initial weights and the same batches, so their
difference is taken seed by seed, and its mean has a 95 % confidence interval by Student's t. A statement about several
settings is confirmed if it is for each of them, and not confirmed if it is refuted for one. About one interval of
twenty misses, so with many of them a verdict may.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from tabulate import tabulate

from bench.common.statistics import CONFIDENCE, LEAST_PAIRS, Difference, Relation, holds, paired, spread_text
from bench.experiments.findings import Finding, select
from bench.papers.layerwise.runs import IMAGENET_TOP
from bench.papers.layerwise.sizes import BASELINE, GRANULARITIES, LAYER, MODEL, Network, Setting

Runs = Mapping[str, Mapping[str, Any]]

#: Percentage points of accuracy within which the paper's "comparable" is taken to lie.
MARGIN = 2.0
#: A setting in which neither of two gets beyond so many times the accuracy of guessing says nothing.
TRAINED = 1.5


_LEARNS = f" Settings in which neither gets beyond {TRAINED:g} times the accuracy of guessing don't count."
_INTERVAL = f"the {CONFIDENCE:.0%} confidence interval of the mean difference, paired by seed,"
RULES: dict[Relation, str] = {
    "better": (
        f"Better: in every setting {_INTERVAL} lies above 0. Not confirmed: in one setting it ends below {MARGIN:g} "
        "points (below 0 for compression errors). Otherwise, and with less than "
        f"{LEAST_PAIRS} seeds, open, which counts as not testable.{_LEARNS}"
    ),
    "same": (
        f"The same: in every setting {_INTERVAL} lies within ±{MARGIN:g} points. Not confirmed: in one setting the "
        f"interval excludes 0 and the mean is beyond ±{MARGIN:g} points. Otherwise open.{_LEARNS}"
    ),
    "not worse": (
        f"Not worse: in every setting {_INTERVAL} lies above -{MARGIN:g} points. Not confirmed: in one setting it lies "
        f"below 0 and the mean below -{MARGIN:g} points. Otherwise open.{_LEARNS}"
    ),
}


# --- what the paper says ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """One finding of the paper: in each setting it is about, `first` is in this relation to `second`.

    Attributes:
        where: figure or section of the paper.
        claim: in words.
        method, optimiser, least, most: which settings; least and most bound the ratio or threshold, both included.
        relation: the relation of `first` to `second`.
        first, second: granularities, or `BASELINE`.
        error: whether it is about the relative compression error, of which less is better, and not about accuracy.
        imagenet: whether it is about ResNet-50 on ImageNet.
    """

    where: str
    claim: str
    method: str
    relation: Relation
    optimiser: str = "sgd"
    least: float = 0.0
    most: float = float("inf")
    first: str = LAYER
    second: str = MODEL
    error: bool = False
    imagenet: bool = False

    def covers(self, setting: Setting) -> bool:
        within = setting.value is None or self.least <= setting.value <= self.most
        return (self.method, self.optimiser) == (setting.method, setting.optimiser) and within


_COARSE = 0.001
_FINER = "per-layer compression reduces the overall compression error"
STATEMENTS = (
    Statement("Fig. 2", "random k: layer-wise better at 0.1 %", "randomk", "better", most=_COARSE),
    Statement("Fig. 2", "random k: the same at all other ratios", "randomk", "same", least=2 * _COARSE),
    Statement("Fig. 3", "TernGrad: layer-wise better", "terngrad", "better"),
    Statement("Fig. 3", "TernGrad, ResNet-50 on ImageNet: layer-wise better", "terngrad", "better", imagenet=True),
    Statement("section 5.3", f"TernGrad: {_FINER}", "terngrad", "better", error=True),
    Statement("Fig. 4", "QSGD: layer-wise better", "qsgd-gather", "better"),
    Statement(
        "Fig. 4", "QSGD, ResNet-50 on ImageNet: layer-wise better (1.52x)", "qsgd-gather", "better", imagenet=True
    ),
    Statement("section 5.3", f"QSGD: {_FINER}", "qsgd-gather", "better", error=True),
    Statement("Fig. 5", "adaptive threshold: layer-wise better", "adaptive", "better"),
    Statement("section 5.3", f"adaptive threshold: {_FINER}", "adaptive", "better", error=True),
    Statement(
        "Fig. 5",
        "adaptive threshold converges slower than without compression, even layer-wise",
        "adaptive",
        "better",
        first=BASELINE,
        second=LAYER,
    ),
    Statement("Fig. 6", "threshold v: the same over three orders of magnitude", "threshold", "same"),
    Statement("Fig. 7a, b", "top k: the same above 10 %", "topk", "same", least=0.11),
    Statement(
        "Fig. 7a, b",
        "top k: entire-model better at 10 % and below",
        "topk",
        "better",
        most=0.1,
        first=MODEL,
        second=LAYER,
    ),
    Statement("Fig. 7c", "top k with Nesterov momentum: layer-wise not worse", "topk", "not worse", "nesterov"),
    Statement(
        "Fig. 8", "top k, ResNet-50 on ImageNet: layer-wise better (1.25 to 1.63x)", "topk", "better", imagenet=True
    ),
)


# --- what was found --------------------------------------------------------------------------------------------------


def settings_of(runs: Runs, network: Network) -> list[Setting]:
    """The settings that a network was run with, in the order of the runs."""
    found = [
        Setting(run["spec"]["method"], run["spec"]["value"], run["spec"]["optimiser"])
        for run in runs.values()
        if run["spec"]["network"] == network.name
    ]
    return list(dict.fromkeys(found))


def runs_of(runs: Runs, network: Network, setting: Setting, granularity: str | None) -> list[Mapping[str, Any]]:
    """The runs of a setting, by seed."""
    return select(
        runs,
        network=network.name,
        method=setting.method,
        value=setting.value,
        optimiser=setting.optimiser,
        granularity=granularity,
    )


def metric_of(network: Network) -> str:
    """The key in evaluations."""
    return f"top{IMAGENET_TOP}_accuracy" if network.imagenet else "accuracy"


def accuracies(these: Sequence[Mapping[str, Any]], network: Network) -> list[float]:
    """Accuracies at the end of each run, in percent."""
    return [100 * run["result"]["evaluations"][-1][metric_of(network)] for run in these]


def along(run: Mapping[str, Any], column: str) -> float | None:
    """The mean over a run's measurements; None where there is none."""
    values = [value for value in run["result"]["steps"].get(column, ()) if value is not None]
    return fmean(values) if values else None


def compare(statement: Statement, runs: Runs, network: Network, setting: Setting) -> tuple[Difference, bool] | None:
    """The difference, first's advantage positive, and whether training took off; None where runs are missing."""
    if statement.error:  # both granularities are measured on the same gradients, here those of layer-wise runs
        these = runs_of(runs, network, setting, LAYER)
        sides = [[along(run, f"{side}_error") for run in these] for side in (statement.second, statement.first)]
        first, second = ([value for value in side if value is not None] for side in sides)
        took_off = True
    else:
        first, second = (
            accuracies(
                runs_of(runs, network, Setting(BASELINE, optimiser=setting.optimiser), None)
                if side == BASELINE
                else runs_of(runs, network, setting, side),
                network,
            )
            for side in (statement.first, statement.second)
        )
        took_off = bool(first and second) and max(fmean(first), fmean(second)) > TRAINED * _guessing(runs, network)
    if not first or len(first) != len(second):
        return None
    return paired(first, second), took_off


def _guessing(runs: Runs, network: Network) -> float:
    """The accuracy of guessing, in percent."""
    one = next(run for run in runs.values() if run["spec"]["network"] == network.name)
    return 100 * float(one["result"]["guessing"])


def judge(statement: Statement, runs: Runs, network: Network | None) -> Finding:
    """The statement on one network.

    Args:
        network: None if none that was run fits.
    """
    rule = RULES[statement.relation]
    if network is None:
        why = "needs ImageNet, which is not here" if statement.imagenet else "not run"
        return Finding(statement.where, statement.claim, "-", why, rule, None)
    texts, verdicts = [], []
    for setting in settings_of(runs, network):
        if not statement.covers(setting):
            continue
        compared = compare(statement, runs, network, setting)
        if compared is None:
            continue
        difference, took_off = compared
        margin, unit = (0.0, " in relative error") if statement.error else (MARGIN, " points")
        if took_off:
            verdicts.append(holds(statement.relation, difference, margin))
        label = f"{setting.label}: " if setting.label else ""
        texts.append(f"{label}{difference.text()}{unit}{'' if took_off else ' (neither learns)'}")
    if not texts:
        return Finding(statement.where, statement.claim, "-", "not run", rule, None)
    met = False if False in verdicts else None if None in verdicts or not verdicts else True
    if None in verdicts and met is None:
        texts.append("open")
    return Finding(statement.where, statement.claim, network.label, "; ".join(texts), rule, met)


def judge_all(runs: Runs, networks: Sequence[Network]) -> list[Finding]:
    """Each statement on each network that it can be about, or once if there is none."""
    found = []
    for statement in STATEMENTS:
        fitting: list[Network | None] = [network for network in networks if network.imagenet == statement.imagenet]
        found += [judge(statement, runs, network) for network in fitting or [None]]
    return found


# --- tables ----------------------------------------------------------------------------------------------------------


def accuracy_table(runs: Runs, network: Network) -> str:
    """A row per setting: final accuracy at both granularities, and what was sent."""
    rows = []
    for setting in settings_of(runs, network):
        name = [setting.method, setting.label, setting.optimiser]
        if setting.method == BASELINE:
            these = runs_of(runs, network, setting, None)
            accuracy = spread_text(accuracies(these, network))
            rows.append([*name, accuracy, accuracy, "", len(these), "", "", "1", "1"])
            continue
        both = [runs_of(runs, network, setting, granularity) for granularity in GRANULARITIES]
        if not all(both):
            continue
        values = [accuracies(these, network) for these in both]
        difference = paired(*values) if len(values[0]) == len(values[1]) else None
        diverged = [sum(run["result"]["diverged"] is not None for run in these) for these in both]
        rows.append(
            [
                *name,
                *(
                    spread_text(accuracy) + (f" ({count} diverged)" if count else "")
                    for accuracy, count in zip(values, diverged, strict=True)
                ),
                difference.text() if difference else "",
                min(len(these) for these in both),
                *(_mean(both[0], f"{granularity}_error") for granularity in GRANULARITIES),
                *(f"{_density(these):.2g}" for these in both),
            ]
        )
    heads = [
        "method",
        "setting",
        "optimiser",
        "layer-wise %",
        "entire-model %",
        "difference",
        "seeds",
        "error layer-wise",
        "error entire-model",
        "density layer-wise",
        "density entire-model",
    ]
    return str(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


def theory_table(runs: Runs, network: Network) -> str:
    """A row per setting: the paper's noise terms, and what they bound beside what was measured."""
    rows = []
    for setting in settings_of(runs, network):
        these = runs_of(runs, network, setting, LAYER) if setting.method != BASELINE else []
        if not these or "noise" not in these[0]["result"]:
            continue
        noise = these[0]["result"]["noise"]
        row = [setting.method, setting.label, setting.optimiser]
        row += [f"{noise['layer_wise']:.3g}", f"{noise['entire_model']:.3g}"]
        for granularity in GRANULARITIES:
            row += [_mean(these, f"{granularity}_bound"), _mean(these, f"{granularity}_moment")]
        rows.append(row)
    heads = [
        "method",
        "setting",
        "optimiser",
        "Σ(1+Ω_j)",
        "L·max(1+Ω_j)",
        "bound layer-wise",
        "measured",
        "bound entire-model",
        "measured",
    ]
    return str(tabulate(rows, heads, tablefmt="github", disable_numparse=True))


def _mean(these: Sequence[Mapping[str, Any]], column: str) -> str:
    values = [value for run in these if (value := along(run, column)) is not None]
    return f"{fmean(values):.3g}" if values else "-"


def _density(these: Sequence[Mapping[str, Any]]) -> float:
    values = [value for run in these if (value := along(run, "density")) is not None]
    return fmean(values) if values else float("nan")
