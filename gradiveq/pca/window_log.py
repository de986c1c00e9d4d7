"""The log of GradiVeQ's windows: which one training is in, in which phase, and what is known of each.

`gradiveq.exchange.windows` exchanges what is counted here: when a window goes on to its next phase, and the fields of
its record.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from gradiveq.methods import GradiVeQ
from gradiveq.pca.basis import LayerBasis
from gradiveq.pca.config import Float64
from gradiveq.pca.loss import Loss
from gradiveq.pca.sampling import PCASampler, is_stable
from gradiveq.pca.schedule import LossWatch, Schedule
from gradiveq.report import FitError, listed


class WindowLog:
    """One worker's count of windows. What it is told is the same on all workers, but for bytes, seconds and votes.

        sampling     open(...) with the first sample; then sampled(), and if that says so, checked(dims); fitted(...)
        compressing  held_out(...) if it was measured; compressed(...)

    Args:
        warmup: iterations of warm-up; None for the method's.

    Attributes:
        schedule: the phase of the next iteration. It is advanced here; by the caller only in the warm-up.
        entries: a dict for each window that has begun; `gradiveq.Aggregator.window_log` says what is in there.
        vote: whether this worker wants to end the window.
    """

    def __init__(self, method: GradiVeQ, warmup: int | None = None) -> None:
        self._method = method
        self.schedule = Schedule(
            method.warmup if warmup is None else warmup,
            method.most_samples,
            method.compress,
            until_stable=method.sample == "auto",
        )
        self.entries: list[dict[str, Any]] = []
        self.vote = False
        self._watch = LossWatch(method.stop_multiple)

    def open(self, iteration: int) -> None:
        """A window begins with this iteration's sample."""
        self.entries.append(
            {
                "window": self.schedule.window,
                "iteration": iteration,
                "sample": 0,
                "compress": 0,
                "ended_by": None,
                "stable": None,
                "checks": [],
                "ratio": None,
                "fit_bytes": 0,
                "fit_s": 0.0,
                "held_out": [],
                "after": None,
                "layers": {},
            }
        )

    @contextmanager
    def fitting(self, clock: Callable[[], float] = time.perf_counter) -> Iterator[None]:
        """What is done within belongs to the window's fit."""
        window, start = self.entries[-1], clock()
        yield
        window["fit_s"] += clock() - start

    def exchanged_for_fit(self, num_bytes: int, seconds: float) -> None:
        """Count what this worker has sent to agree on bases, and how long that took."""
        self.entries[-1]["fit_bytes"] += num_bytes
        self.entries[-1]["fit_s"] += seconds

    def sampled(self) -> bool:
        """Count a sample.

        Returns:
            Whether bases are to be fitted after it; the iteration is over with `checked` then, else it is over now.
        """
        self.entries[-1]["sample"] += 1
        due = self.schedule.fit_due
        if not due:
            self.schedule.advance()
        return due

    def checked(self, dims: Float64) -> bool:
        """Take what a fit has found.

        Args:
            dims: d of all groups.
        Returns:
            Whether sampling is over: there are enough samples, or with sample="auto" d is stable.
        """
        window = self.entries[-1]
        if self.schedule.check_due:
            window["checks"].append([window["sample"], int(dims.sum())])
            window["stable"] = is_stable([d for _, d in window["checks"]])
        return self.schedule.advance(stable=bool(window["stable"]))

    def fitted(self, bases: Sequence[LayerBasis], compressed: Container[str]) -> None:
        """Everybody has the window's bases.

        Args:
            compressed: the layers that are; one that isn't made shorter goes as it is.
        """
        self._watch, self.vote = LossWatch(self._method.stop_multiple), False
        self.entries[-1]["layers"] = {basis.name: _layer_entry(basis, basis.name in compressed) for basis in bases}

    def held_out(self, iteration: int, losses: Mapping[str, Loss]) -> dict[str, Any]:
        """Take the losses of all layers in a compressed iteration, against the exact mean of the same gradients.

        Returns:
            The record of it.
        """
        window, record = self.entries[-1], _record(iteration, losses)
        window["held_out"].append(record)
        for name, layer in window["layers"].items():
            layer["held_out_loss"] = fmean(one["layers"][name] for one in window["held_out"])
        return record

    def compressed(self, ratio: float, stop: bool, local_loss: float | None) -> None:
        """Count a compressed iteration.

        Args:
            ratio: bytes of the gradients / bytes of all that has travelled in their place.
            stop: most workers have voted to end the window.
            local_loss: of this worker (Eq. 7 over ‖g_n‖²), where it was measured; with compress="auto" always.
        """
        window, by_vote = self.entries[-1], self._method.compress == "auto"
        window["compress"] += 1
        window["ratio"] = ratio
        self.vote = False
        if by_vote:
            assert local_loss is not None
            self.vote = self._watch.votes_to_stop(local_loss)
        if self.schedule.advance(stop=stop):
            window["ended_by"] = "vote" if by_vote else "count"
            self.vote = False

    def replaced(self, iteration: int, losses: Mapping[str, Loss]) -> dict[str, Any]:
        """Take the losses of the last window's bases on this window's first sample.

        Returns:
            The record of it.
        """
        record = self.entries[-2]["after"] = _record(iteration, losses)
        return record

    def restart_sampling(self) -> None:
        """If a window is being sampled, its samples are lost: it begins anew."""
        if self.schedule.phase == "sample":
            self.schedule.load_state_dict({**self.schedule.state_dict(), "done": 0})
            if self.entries and self.entries[-1]["window"] == self.schedule.window:
                self.entries.pop()

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; `vote`, bytes and seconds differ by rank. Copies."""
        return {
            "schedule": self.schedule.state_dict(),
            "first_loss": self._watch.first,
            "vote": self.vote,
            "entries": copy.deepcopy(self.entries),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self.schedule.load_state_dict(state["schedule"])
        self._watch = LossWatch(self._method.stop_multiple)
        self._watch.first = state["first_loss"]
        self.vote = state["vote"]
        self.entries = copy.deepcopy(state["entries"])


def _record(iteration: int, losses: Mapping[str, Loss]) -> dict[str, Any]:
    return {
        "iteration": iteration,
        "held_out": sum(losses.values(), Loss()).relative,
        "layers": {name: loss.relative for name, loss in losses.items()},
    }


def _layer_entry(basis: LayerBasis, compressed: bool) -> dict[str, Any]:
    return {
        "d": [len(one.components_) for one in basis.bases],
        "slice_size": basis.slice_size,
        "ratio": basis.ratio if compressed else 1.0,
        "in_sample_loss": basis.in_sample_loss if compressed else 0.0,
        "held_out_loss": None,
    }


def raise_failures(sampler: PCASampler, dims: Float64, when: str) -> None:
    """What `dims`, d of all groups, says of fits that failed.

    Args:
        when: as in "in iteration 12".
    Raises:
        FitError: on all ranks alike, with layers, ranks and reason.
    """
    failures = sampler.failures(dims)
    if failures:
        where = "; ".join(f"{listed(names)} on rank {rank} ({why})" for (rank, why), names in failures.items())
        raise FitError(f"PCA failed {when}: {where}")
