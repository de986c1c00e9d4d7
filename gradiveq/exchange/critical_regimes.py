"""ACCORDION (Agarwal et al. 2021): compress less while training is in a critical regime, more while it isn't.

Algorithm 1 there, for each layer: at the end of a detection interval, with Δ the sum of the gradients over it,

    | ‖Δ_prev‖ - ‖Δ_curr‖ | / ‖Δ_prev‖ >= η,  or the learning rate decays    ->  critical, the low compression
    otherwise                                                             ->  the high compression

    |  window  |  rest of the interval  |  window  |  rest ...
    <- summed ->                        <- summed ->
               ^ detection                         ^ detection

As in the authors' code (uw-mad-dash/Accordion), of an interval (10 epochs) only its first `window` (1 epoch) is summed,
and the detection follows it; layers are critical until a second window allows a comparison, and where ‖Δ_prev‖ is 0;
when the learning rate decays all layers are critical until the next detection. With a rate that falls in every
iteration, that is always.

Differences: the authors sum one worker's own gradients, which are not compressed, and broadcast what it decides. Here
the mean over the workers is summed, after compression: it has the same bits on every worker, so all decide alike and
nothing is sent. With error feedback its sum over a window is that of the gradients but for what the memories gained.
Before the first detection the authors send everything unless told otherwise; here the low compression is used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from gradiveq.arrays.float32 import Float32


class Stretch(Protocol):
    """A layer: elements start ... stop of the vector. Blocks and parts are."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> int: ...

    @property
    def stop(self) -> int: ...


class CriticalRegimes:
    """Which layers are in a critical regime, from the aggregated gradient and the learning rate alone.

    Args:
        layers: the same on every worker.
        interval: iterations from one detection to the next.
        window: of these, how many at the beginning are summed; None for all.
        eta: η, the least relative change of ‖Δ‖ that is critical.
    Raises:
        ValueError: a value is out of its range.
    Memory: a vector as long as the gradient.

    Attributes:
        critical: by layer; all True at first.
        log: one dict for each detection and each decay of the learning rate: "iteration", "cause" ("first", "norms" or
            "lr"), "critical" (names of layers, from the next iteration on), "changes" (by name, the relative change of
            ‖Δ‖, None where ‖Δ_prev‖ is 0; empty unless the cause is "norms").
    """

    def __init__(
        self, layers: Sequence[Stretch], *, interval: int, window: int | None = None, eta: float = 0.5
    ) -> None:
        check(interval, window, eta)
        self.layers, self.interval, self.eta = tuple(layers), interval, eta
        self.window = interval if window is None else window
        self.critical = [True] * len(self.layers)
        self.log: list[dict[str, Any]] = []
        self._sum = np.zeros(max((layer.stop for layer in self.layers), default=0), np.float32)
        self._norms: list[float] | None = None
        self._done = 0
        self._lr: float | None = None

    def decays(self, lr: float) -> bool:
        """Whether this learning rate is below the last accepted one: then all layers are critical."""
        return self._lr is not None and lr < self._lr

    def critical_at(self, lr: float) -> list[bool]:
        """Whether each layer is critical in an iteration with this learning rate. Changes nothing."""
        return [True] * len(self.layers) if self.decays(lr) else list(self.critical)

    def accept(self, mean: Float32, lr: float) -> None:
        """Take the aggregated gradient of an iteration, and detect if it is time.

        Args:
            mean: finite float32 that covers the layers; the same bits on every worker. Not modified.
            lr: of the same iteration.
        Cost: in a window one pass; at its end another.
        """
        if self.decays(lr):
            self.critical = [True] * len(self.layers)
            self._record("lr", {})
        self._lr = lr
        if self._done % self.interval < self.window:
            with np.errstate(over="ignore", invalid="ignore"):  # no finite norm then: critical
                self._sum += mean[: len(self._sum)]
            if self._done % self.interval == self.window - 1:
                self._detect()
                self._sum.fill(0)
        self._done += 1

    def _detect(self) -> None:
        norms = [_norm(self._sum[layer.start : layer.stop]) for layer in self.layers]
        if self._norms is None:
            self._record("first", {})
        else:
            changes = {
                layer.name: abs(before - now) / before if before else None
                for layer, before, now in zip(self.layers, self._norms, norms, strict=True)
            }
            self.critical = [change is None or not change < self.eta for change in changes.values()]
            self._record("norms", changes)
        self._norms = norms

    def _record(self, cause: str, changes: dict[str, float | None]) -> None:
        critical = [layer.name for layer, is_critical in zip(self.layers, self.critical, strict=True) if is_critical]
        self.log.append({"iteration": self._done, "cause": cause, "critical": critical, "changes": changes})

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs; the same on every rank. Copies."""
        return {
            "critical": list(self.critical),
            "log": copy.deepcopy(self.log),
            "sum": self._sum.copy(),
            "norms": None if self._norms is None else list(self._norms),
            "done": self._done,
            "lr": self._lr,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there.

        Raises:
            ValueError: the state is of other layers; nothing was changed.
        """
        if len(state["critical"]) != len(self.layers) or state["sum"].shape != self._sum.shape:
            raise ValueError(
                f"the state is of {len(state['critical'])} layers and {len(state['sum'])} elements, "
                f"this is of {len(self.layers)} and {len(self._sum)}"
            )
        self.critical, self.log = list(state["critical"]), copy.deepcopy(state["log"])
        self._sum[:] = state["sum"]
        self._norms = None if state["norms"] is None else list(state["norms"])
        self._done, self._lr = state["done"], state["lr"]


def check(interval: int, window: int | None, eta: float) -> None:
    """Refuse values that are out of their range."""
    if not isinstance(interval, int) or interval < 1:
        raise ValueError(f"`interval` must be a whole number of at least 1, got {interval!r}")
    if window is not None and (not isinstance(window, int) or not 1 <= window <= interval):
        raise ValueError(f"`window` must be a whole number from 1 to {interval} (the interval), got {window!r}")
    if not 0 < eta < math.inf:
        raise ValueError(f"`eta` must be a positive number, got {eta}")


def _norm(values: Float32) -> float:
    """The norm in float64, whose squares don't overflow; by pieces, so that no copy of a layer is made."""
    pieces = (values[start : start + 65536].astype(np.float64) for start in range(0, len(values), 65536))
    return math.sqrt(sum(float(np.sum(np.square(piece))) for piece in pieces))
