"""When to warm up, sample and compress (section 3 and Fig. 6 of Yu et al. 2018); no tensors here.

    | warm-up | sample Lt | compress Lc | sample Lt | compress Lc | ...
                <---- one window ----->

Lt and Lc are numbers, or open: then the caller says after each iteration whether d is stable, or whether most workers
have voted to stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Phase = Literal["warm-up", "sample", "compress"]

#: Samples after which d is looked at, again and again, with sample="auto".
CHECK_EVERY = 10
#: Relative losses below this are rounding errors of float32 sums.
ROUNDING = 1e-6


class Schedule:
    """Which phase the next iteration belongs to.

    Args:
        warmup: iterations of warm-up, from 0 on.
        samples: Lt, the most if `until_stable`.
        compress: Lc, or "auto".
        until_stable: sampling ends as soon as d is stable.

    Attributes:
        phase: of the next iteration.
        done: iterations of this phase that are over.
        window: number of the current window, from 0 on; during warm-up it is the one to come.
    """

    def __init__(
        self, warmup: int, samples: int, compress: int | Literal["auto"], *, until_stable: bool = False
    ) -> None:
        self.warmup, self.samples, self.compress, self.until_stable = warmup, samples, compress, until_stable
        self.phase: Phase = "warm-up" if warmup else "sample"
        self.done = 0
        self.window = 0

    @property
    def check_due(self) -> bool:
        """Whether to find out if d is stable, after the sample of this iteration and before `advance`."""
        return self.phase == "sample" and self.until_stable and (self.done + 1) % CHECK_EVERY == 0

    @property
    def fit_due(self) -> bool:
        """Whether bases are needed after the sample of this iteration, before `advance`: to check, or to compress."""
        return self.check_due or (self.phase == "sample" and self.done + 1 >= self.samples)

    def advance(self, *, stable: bool = False, stop: bool = False) -> bool:
        """Count an iteration.

        Args:
            stable: d is stable; ends the sampling if it is to last until then.
            stop: most workers want to stop; ends the compressed iterations if their number is "auto".
        Returns:
            Whether this was the last iteration of its phase.
        """
        self.done += 1
        if self.phase == "warm-up":
            ended, following = self.done >= self.warmup, "sample"
        elif self.phase == "sample":
            ended, following = self.done >= self.samples or (stable and self.until_stable), "compress"
        else:
            ended, following = stop if self.compress == "auto" else self.done >= self.compress, "sample"
        if ended:
            self.window += self.phase == "compress"
            self._enter(following, 0)
        return ended

    def _enter(self, phase: str, done: int) -> None:
        if phase not in ("warm-up", "sample", "compress"):
            raise ValueError(f"`phase` must be 'warm-up', 'sample' or 'compress', got {phase!r}")
        self.phase, self.done = phase, done  # type: ignore[assignment]

    def state_dict(self) -> dict[str, Any]:
        return {"phase": self.phase, "done": self.done, "window": self.window}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._enter(state["phase"], state["done"])
        self.window = state["window"]


class LossWatch:
    """One worker's opinion whether the window's basis has become too old.

    Attributes:
        multiple: of the window's first loss that is too much.
        first: the window's first loss, once it is known.
    """

    def __init__(self, multiple: float) -> None:
        self.multiple = multiple
        self.first: float | None = None

    def votes_to_stop(self, loss: float) -> bool:
        """Take the relative local loss (Eq. 7 over ‖g_n‖²) of a compressed iteration."""
        if self.first is None:
            self.first = max(loss, ROUNDING)
        return loss > self.multiple * self.first


def majority(votes: int, size: int) -> bool:
    """Whether more than half of the workers voted."""
    return 2 * votes > size
