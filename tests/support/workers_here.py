"""Workers with compressors, all in this process, of one vector without layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gradiveq.compressors import Compressor
from gradiveq.exchange.compressed import Compression
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.kernels import HOST
from gradiveq.exchange.parts import Part, check_parts
from gradiveq.exchange.requests import Call, Exchange, Iteration, Round
from gradiveq.flatten import Block, Bucket
from gradiveq.here import Here

Vector = npt.NDArray[np.float32]


class WorkersHere(Here):
    """Workers whose vector is cut into parts.

    Args:
        parts: each is keyed by its place.
        master: the master's compressor, or None.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        size: int,
        *,
        seed: int = 0,
        feedback: ErrorFeedback | None = None,
        master: Compressor | None = None,
    ) -> None:
        length = parts[-1].stop if parts else 0
        check_parts(parts, length)
        self.parts = [part._replace(key=place) for place, part in enumerate(parts)]

        def family(rank: int) -> Compression:
            return Compression(
                lambda call: self.parts, seed=seed, feedback=feedback, master=master, num_parts=len(parts)
            )

        super().__init__(family, Bucket((Block("vector", 0, length, (length,), False),), length), size)

    def memory(self, rank: int) -> Vector:
        """What a rank remembers."""
        kept = self.families[rank].memory.errors.by_name().get("vector")
        return np.zeros(self.bucket.length, np.float32) if kept is None else kept.numpy().copy()

    def begun(self, rank: int, gradient: Vector, number: int, lr: float = 1.0) -> tuple[Exchange, Round, Call]:
        """A rank's exchange up to its first round, and what it asks for there."""
        out = np.empty(self.bucket.length, np.float32)
        size = len(self.families)
        call = Call(self.bucket, Iteration(number, lr), HOST, rank, size, out=out, measured=True)
        exchange = self.families[rank].exchange(call, gradient)
        return exchange, next(exchange), call

    def message(self, rank: int, gradient: Vector, number: int, lr: float = 1.0) -> Any:
        """What a rank would have gathered; nothing is left of it."""
        _, asked, _ = self.begun(rank, gradient, number, lr)
        self.families[rank].skip()
        return asked.requests[1].message  # type: ignore[union-attr]
