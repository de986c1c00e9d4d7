"""What the GradiVeQ paper (Yu et al. 2018, section 4) states of its running times, and what follows from that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

#: Iterations of one window, which the paper's breakdown is for.
WINDOW, SAMPLE, COMPRESS = 500, 100, 400
#: Windows until it has converged, and how many of them the warm-up lasts: 45,000 and 2,500 iterations.
WINDOWS, WARMUP_WINDOWS = 90, 5


@dataclass(frozen=True)
class Paper:
    """What the paper's text says of one cluster, in seconds per window unless the name says otherwise.

    Attributes:
        computation_s: forward, backward and update.
        rar_s, gradiveq_s: stated seconds of aggregation, if any.
        totals_s: to converge, by method.
        share: stated share of RAR's aggregation in the whole time.
        end_to_end: stated ratios of whole times, (of which method, to GradiVeQ's).
        aggregation: stated ratio of RAR's aggregation to GradiVeQ's.
    """

    computation_s: float
    totals_s: Mapping[str, float]
    share: float
    end_to_end: tuple[tuple[str, float], ...]
    rar_s: float | None = None
    gradiveq_s: float | None = None
    aggregation: float | None = None

    def stated_s(self, method: str) -> float | None:
        return {"rar": self.rar_s, "gradiveq": self.gradiveq_s}.get(method)

    def derived_s(self, method: str) -> float:
        """A method's aggregation as it follows from the totals: windows of warm-up are RAR's."""
        rar = self.totals_s["rar"] / WINDOWS
        if method == "rar":
            return rar - self.computation_s
        return (self.totals_s[method] - WARMUP_WINDOWS * rar) / (WINDOWS - WARMUP_WINDOWS) - self.computation_s

    def aggregation_s(self, method: str) -> float:
        """What ours is held against: as stated, else as derived."""
        stated = self.stated_s(method)
        return self.derived_s(method) if stated is None else stated

    def spread_s(self, method: str) -> tuple[float, float]:
        """The least and the most that the paper's statements give for a method's aggregation."""
        values = [self.aggregation_s(method), self.derived_s(method)]
        if method == "rar":
            values.append(self.computation_s * self.share / (1 - self.share))
        if method == "gradiveq":
            values += [
                (self.computation_s + self.aggregation_s(m)) / r - self.computation_s for m, r in self.end_to_end
            ]
            if self.aggregation is not None:
                values.append(self.aggregation_s("rar") / self.aggregation)
        if method == "qsgd" and self.gradiveq_s is not None:
            values.append(2 * self.gradiveq_s)  # "almost double that of GradiVeQ"
        return min(values), max(values)

    def compressed_s(self) -> float:
        """A compressed iteration's aggregation: GradiVeQ's window without its sampling iterations, which are QSGD's."""
        return (self.aggregation_s("gradiveq") - SAMPLE / WINDOW * self.aggregation_s("qsgd")) / COMPRESS


PAPER = {
    "gradiveq-cpu": Paper(
        computation_s=650,
        rar_s=850,
        gradiveq_s=162,
        aggregation=5.25,
        totals_s={"rar": 135_000, "qsgd": 90_000, "gradiveq": 76_000},
        share=0.60,
        end_to_end=(("rar", 1 / (1 - 0.46)),),  # "slash the end-to-end training time by 46%"
    ),
    "gradiveq-k80": Paper(
        computation_s=650 / 6,  # "GPUs can boost the computation speed by 6 times"
        totals_s={"rar": 75_000, "qsgd": 30_000, "gradiveq": 24_000},
        share=0.88,
        end_to_end=(("rar", 4.0), ("qsgd", 1.40)),
    ),
}
