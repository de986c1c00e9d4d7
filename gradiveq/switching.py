"""Strategies that change their compressor on the way: ACCORDION, and hard-threshold with a threshold from a warm-up."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np

from gradiveq.accordion import CriticalRegimes, Span
from gradiveq.compressed import CompressedStrategy
from gradiveq.exchange import check_size
from gradiveq.flatten import Layout, Vector
from gradiveq.lowrank import PowerSGDStrategy
from gradiveq.methods import Accordion, AutoThreshold, Compressed, Plain
from gradiveq.noise import NoiseWindow, auto_threshold, simple_threshold
from gradiveq.powersgd import PowerSGD
from gradiveq.report import Ongoing
from gradiveq.strategy import CodecStrategy, Strategy
from ring.codec import Codec
from ring.handle import Ring


class AccordionStrategy(Strategy):
    """Each part by the one setting or the other, as `gradiveq.accordion` decides; nothing more is sent for that."""

    def __init__(self, method: Accordion, ring: Ring, layout: Layout, seed: int, chunk_bytes: int) -> None:
        self._inner: PowerSGDStrategy | CompressedStrategy
        if isinstance(method.low, PowerSGD):
            self._inner = PowerSGDStrategy(method.low, ring, layout, seed, chunk_bytes)
            spans = [Span(block.name, block.offset, block.stop) for block in layout.blocks]
        else:
            assert isinstance(method.high, Compressed)
            self._inner = CompressedStrategy(method.low, ring, layout, seed, chunk_bytes)
            self._low, self._high = self._inner.worker.parts, tuple(method.high.parts(layout.blocks))
            check_size((part.compressor for part in self._high), ring.size)
            spans = [Span(part.name, part.start, part.stop) for part in self._low]
        self.method = method
        self.regimes = CriticalRegimes(spans, interval=method.interval, window=method.window, eta=method.eta)

    @property
    def phase(self) -> str:
        return self._inner.phase

    @property
    def log(self) -> list[dict[str, Any]]:
        return self.regimes.log

    def exchange(self, vector: Vector, flawed: bool, now: Ongoing) -> bool:
        critical = self.regimes.critical_at(now.lr)
        if isinstance(self._inner, PowerSGDStrategy):
            low, high = self.method.low, self.method.high
            assert isinstance(low, PowerSGD)
            assert isinstance(high, PowerSGD)
            self._inner.worker.use_ranks([low.rank if one else high.rank for one in critical])
        else:
            chosen = zip(critical, self._low, self._high, strict=True)
            self._inner.worker.parts = tuple(low if one else high for one, low, high in chosen)
        return self._inner.exchange(vector, flawed, now)

    def accept(self, mean: Vector, now: Ongoing) -> None:
        self._inner.accept(mean, now)
        self.regimes.accept(mean, now.lr)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self._inner.state_dict(), "regimes": self.regimes.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._inner.load_state_dict(state["inner"])
        self.regimes.load_state_dict(state["regimes"])


class AutoThresholdStrategy(CodecStrategy):
    """Uncompressed iterations, whose noise is measured, and then hard-threshold; or that at once.

    The threshold is logged as one dict: "iteration" (the first that uses it), "formula", "threshold" (λ), "num_kept"
    (k) and "estimate" (of `gradiveq.noise.NoiseEstimate`, None with formula "simple").
    """

    def __init__(self, method: AutoThreshold, ring: Ring, layout: Layout, seed: int, chunk_bytes: int) -> None:
        super().__init__(ring, layout.length, seed, chunk_bytes)
        self.method, self._layout = method, layout
        self._log: list[dict[str, Any]] = []
        self._own: Vector | None = None  # this worker's gradient in the iteration under way
        self._inner: CompressedStrategy | None = None
        self._window: NoiseWindow | None = None
        self._num_kept = method.num_kept(layout.length)
        parts = method.compressed(0.0).parts(layout.blocks)  # whose patterns are looked at now, not after the warm-up
        check_size((part.compressor for part in parts), ring.size)
        if method.formula == "auto":
            self._window = NoiseWindow(layout.length, ring.size, method.warmup)
        else:
            self._use(simple_threshold(self._num_kept, layout.length))
            self._record(0, None)

    @property
    def phase(self) -> str:
        return "warm-up" if self._inner is None else self._inner.phase

    @property
    def log(self) -> list[dict[str, Any]]:
        return self._log

    def codec(self, iteration: int) -> tuple[Codec, int]:
        return self.codec_of(Plain(), iteration)

    def exchange(self, vector: Vector, flawed: bool, now: Ongoing) -> bool:
        if self._inner is not None:
            return self._inner.exchange(vector, flawed, now)
        with now.timeline.span("fit"):
            self._own = vector[: self.length].copy()
        return super().exchange(vector, flawed, now)

    def accept(self, mean: Vector, now: Ongoing) -> None:
        if self._inner is not None:
            self._inner.accept(mean, now)
            return
        assert self._window is not None
        assert self._own is not None
        with now.timeline.span("fit"):
            self._window.add(self._own, mean)
            self._own = None
        if not self._window.full:
            return
        row = self._window.row()
        rows = np.zeros((self.ring.size, len(row)))
        rows[self.ring.rank] = row
        sent = self.ring.all_reduce(rows.reshape(-1), timeline=now.timeline).bytes_sent
        now.bytes_sent += sent
        now.fit_bytes += sent
        estimate = self._window.estimate(rows)
        self._use(auto_threshold(self._num_kept, self.length, estimate))
        self._record(now.iteration + 1, estimate.as_dict())

    def _use(self, threshold: float) -> None:
        """From now on, hard-threshold."""
        self.threshold = threshold
        method = self.method.compressed(threshold)
        self._inner = CompressedStrategy(method, self.ring, self._layout, self.seed, self.chunk_bytes)
        self._window = None

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
            "window": None if self._window is None else self._window.state_dict(),
            "inner": None if self._inner is None else self._inner.state_dict(),
            "log": copy.deepcopy(self._log),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._log = copy.deepcopy(state["log"])
        if state["inner"] is None:
            self._inner = None
            self._window = NoiseWindow(self.length, self.ring.size, self.method.warmup)
            self._window.load_state_dict(state["window"])
            return
        self._use(self._log[-1]["threshold"])
        assert self._inner is not None
        self._inner.load_state_dict(state["inner"])
