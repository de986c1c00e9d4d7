"""Methods that change their compressor on the way: ACCORDION, and hard-threshold with a threshold from a warm-up.

Both look at whole gradients and at the learning rate, so they are for drivers that have one vector for all layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from gradiveq.exchange.compressed import Compression
from gradiveq.exchange.critical_regimes import CriticalRegimes
from gradiveq.exchange.family import Family, as_arrays, as_tensors
from gradiveq.exchange.lowrank import LowRank
from gradiveq.exchange.parts import Part
from gradiveq.exchange.requests import Call, Exchange, Iteration, Round, Sum
from gradiveq.flatten import Block
from gradiveq.methods import Accordion, AutoThreshold, Plain
from gradiveq.noise import NoiseWindow, auto_threshold, simple_threshold
from gradiveq.powersgd import PowerSGD


class _Wrapping(Family):
    """A family around another, whose memory is the inner one's."""

    inner: Family | None

    def skip(self) -> None:
        if self.inner is not None:
            self.inner.skip()


class Switching(_Wrapping):
    """ACCORDION: each layer by the one setting or the other; nothing more is sent for that.

    Args:
        inner: carries out either setting.
        low, high: the parts of both settings, of compressors.
    """

    inner: LowRank | Compression

    def __init__(
        self,
        method: Accordion,
        inner: LowRank | Compression,
        blocks: Sequence[Block],
        low: Sequence[Part] = (),
        high: Sequence[Part] = (),
    ) -> None:
        super().__init__()
        self.method, self.inner, self._blocks, self._low, self._high = method, inner, blocks, low, high
        layers = low or blocks
        self.regimes = CriticalRegimes(layers, interval=method.interval, window=method.window, eta=method.eta)
        self.log = self.regimes.log

    @property
    def phase(self) -> str:
        return self.inner.phase

    def rounds(self, call: Call, x: Any, latest: Any) -> Exchange:
        critical = self.regimes.critical_at(call.now.lr)
        if isinstance(self.inner, LowRank):
            low, high = self.method.low, self.method.high
            assert isinstance(low, PowerSGD)
            assert isinstance(high, PowerSGD)
            named = zip(self._blocks, critical, strict=True)
            self.inner.ranks = {block.name: low.rank if one else high.rank for block, one in named}
        else:
            chosen = zip(critical, self._low, self._high, strict=True)
            parts = tuple(low if one else high for one, low, high in chosen)
            self.inner.parts_of = lambda call: parts
        return (yield from self.inner.exchange(call, x))

    def accept(self, now: Iteration, mean: Any = None) -> Exchange | None:
        self.inner.accept(now)
        self.regimes.accept(mean, now.lr)
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "regimes": as_tensors(self.regimes.state_dict())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.regimes.load_state_dict(as_arrays(state["regimes"]))
        self.log = self.regimes.log


class AutomaticThreshold(_Wrapping):
    """Uncompressed iterations, whose noise is measured, and then hard-threshold; or that at once.

    The threshold is logged as one dict: "iteration" (the first that uses it), "formula", "threshold" (λ), "num_kept"
    (k) and "estimate" (of `gradiveq.noise.NoiseEstimate`, None with formula "simple").

    Args:
        with_threshold: carries out hard-threshold with λ.
    """

    inner: Compression | None

    def __init__(
        self,
        method: AutoThreshold,
        length: int,
        rank: int,
        size: int,
        with_threshold: Callable[[float], Compression],
    ) -> None:
        super().__init__()
        self.method, self.length, self.rank, self.size = method, length, rank, size
        self._with_threshold = with_threshold
        self._log: list[dict[str, Any]] = []
        self._own: Any = None  # this worker's gradient in the iteration under way
        self.inner = None
        self._window: NoiseWindow | None = None
        self._num_kept = method.num_kept(length)
        with_threshold(0.0)  # whose patterns are looked at now, not after the warm-up
        if method.formula == "auto":
            self._window = NoiseWindow(length, size, method.warmup)
        else:
            self._use(simple_threshold(self._num_kept, length))
            self._record(0, None)

    @property
    def phase(self) -> str:
        return "warm-up" if self.inner is None else self.inner.phase

    @property
    def log(self) -> Sequence[dict[str, Any]]:  # type: ignore[override]
        return self._log

    def rounds(self, call: Call, x: Any, latest: Any) -> Exchange:
        if self.inner is not None:
            return (yield from self.inner.exchange(call, x))
        with call.now.span("fit"):
            self._own = x.copy()
        ((mean,),) = yield Round([Sum([x], Plain(), mean=True)])
        return mean

    def accept(self, now: Iteration, mean: Any = None) -> Exchange | None:
        if self.inner is not None:
            return self.inner.accept(now)
        assert self._window is not None
        with now.span("fit"):
            self._window.add(self._own, mean)
            self._own = None
        return self._decide(now, self._window) if self._window.full else None

    def _decide(self, now: Iteration, window: NoiseWindow) -> Exchange:
        """Every worker's measurements, and the threshold that follows from them."""
        row = window.row()
        rows = np.zeros((self.size, len(row)))
        rows[self.rank] = row
        ((rows,),) = yield Round([Sum([rows], purpose="fit")])
        estimate = window.estimate(rows)
        self._use(auto_threshold(self._num_kept, self.length, estimate))
        self._record(now.number + 1, estimate.as_dict())

    def _use(self, threshold: float) -> None:
        """From now on, hard-threshold."""
        self.threshold = threshold
        self.inner, self._window = self._with_threshold(threshold), None

    def _record(self, iteration: int, estimate: dict[str, Any] | None) -> None:
        self._log.append(
            {
                "iteration": iteration,
                "formula": self.method.formula,
                "threshold": self.threshold,
                "num_kept": self._num_kept,
                "estimate": estimate,
            }
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "window": None if self._window is None else as_tensors(self._window.state_dict()),
            "inner": None if self.inner is None else self.inner.state_dict(),
            "log": copy.deepcopy(self._log),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._log = copy.deepcopy(state["log"])
        if state["inner"] is None:
            self.inner = None
            self._window = NoiseWindow(self.length, self.size, self.method.warmup)
            self._window.load_state_dict(as_arrays(state["window"]))
            return
        self._use(self._log[-1]["threshold"])
        assert self.inner is not None
        self.inner.load_state_dict(state["inner"])
