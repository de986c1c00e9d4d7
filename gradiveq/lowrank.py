"""PowerSGD as an aggregator's strategy: `gradiveq.powersgd` over a ring, in two all-reduces.

    | vectors and small layers, as they are | all layers' P | flag |        | all layers' Q |
      first all-reduce                                                        second

`flag` counts the workers with a non-finite gradient; if there are any, all stop after the first.
"""

from __future__ import annotations

import numpy as np

from gradiveq.compressors.base import Float32
from gradiveq.flatten import Layout, Vector
from gradiveq.powersgd import PowerSGD, PowerSGDWorker
from gradiveq.report import Ongoing
from gradiveq.strategy import FLOAT32, WorkerStrategy
from ring.handle import Ring


class PowerSGDStrategy(WorkerStrategy):
    """Two all-reduces an iteration, each 2(N - 1) steps of the ring."""

    worker: PowerSGDWorker

    def __init__(self, method: PowerSGD, ring: Ring, layout: Layout, seed: int, chunk_bytes: int) -> None:
        self.ring, self.length, self.chunk_bytes = ring, layout.length, chunk_bytes
        self.worker = PowerSGDWorker(layout.blocks, method, seed=seed, num_extra=1)

    def exchange(self, vector: Vector, flawed: bool, now: Ongoing) -> bool:
        gradient = vector[: self.length]
        rounds = self.worker.rounds(gradient, gradient, now.iteration)
        with now.timeline.span("encode"):
            message = next(rounds)
        now.overflowed = self.worker.overflowed
        message[-1] = flawed or now.overflowed
        self._all_reduce(message, now)
        if message[-1] > 0:
            return True
        with now.timeline.span("encode"):
            second = next(rounds, None)
        if second is not None:
            self._all_reduce(second, now)
            with now.timeline.span("decode"):
                next(rounds, None)
        payload_bytes = self.worker.payload_bytes
        now.ratio = FLOAT32.itemsize * self.length / payload_bytes if payload_bytes else 1.0
        return False

    def _all_reduce(self, message: Float32, now: Ongoing) -> None:
        with np.errstate(over="ignore", invalid="ignore"):  # looked for by the aggregator, on all ranks alike
            stats = self.ring.all_reduce(message, op="mean", chunk_bytes=self.chunk_bytes, timeline=now.timeline)
        now.bytes_sent += stats.bytes_sent
