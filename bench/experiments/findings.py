"""What a paper finds beside what was found here: rows of a table, each with the rule by which it was judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tabulate import tabulate

CONFIRMED, NOT_CONFIRMED, NOT_TESTABLE = "confirmed", "not confirmed", "not testable here"
#: The rule of what couldn't be tried at all.
NO_RULE = "-"


@dataclass(frozen=True)
class Finding:
    """One statement of a paper.

    Attributes:
        where: figure or table of the paper.
        claim: what it finds.
        data: what it was tested on here.
        ours: what was found, in numbers; or why it can't be.
        rule: when it counts as confirmed; or `NO_RULE`.
        holds: whether the rule is met; None where it can't be tested.
    """

    where: str
    claim: str
    data: str
    ours: str
    rule: str
    holds: bool | None

    @property
    def verdict(self) -> str:
        if self.holds is None:
            return NOT_TESTABLE
        return CONFIRMED if self.holds else NOT_CONFIRMED

    def as_dict(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "claim": self.claim,
            "data": self.data,
            "ours": self.ours,
            "rule": self.rule,
            "verdict": self.verdict,
        }


def table(findings: Sequence[Finding], form: str = "github", ours: str = "ours") -> str:
    """The findings as a table; rules are numbered and listed below it, each once.

    Args:
        ours: heads the column of what was found here.
    """
    rules = list(dict.fromkeys(finding.rule for finding in findings if finding.rule != NO_RULE))
    numbers = {rule: number for number, rule in enumerate(rules, 1)}
    rows = [[f.where, f.claim, f.data, f.ours, f.verdict, numbers.get(f.rule, "")] for f in findings]
    heads = ["in the paper", "finds", "tested on", ours, "verdict", "rule"]
    listed = "\n".join(f"{number}. {rule}" for rule, number in numbers.items())
    return f"{tabulate(rows, heads, tablefmt=form, disable_numparse=True)}\n\nConfirmed means:\n\n{listed}\n"


def select(runs: Mapping[str, Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The runs whose specs have these values, in the order of their seeds."""
    found = [run for run in runs.values() if all(run["spec"].get(key) == value for key, value in wanted.items())]
    return sorted(found, key=lambda run: run["spec"]["seed"])
