"""Compressors of layers, groups of layers or the whole vector: payloads that are added, or gathered.

    gradient -> corrected by the memory -> each part compressed -> summed, or gathered from everybody
             -> each part decompressed, added, finished -> the same mean on every worker

A *part* is what a compressor is applied to at once: a layer (layer-wise), the whole vector (entire-model; Dutta et al.
2020) or a group of layers. All parts of a vector travel together: payloads that can be added in one message for each
dtype, the others behind one another in one message for each worker.

What is gathered is sent N - 1 times, once by each worker that it passes, so a payload of p bytes a worker costs each
(N - 1)p on average, where an all-reduce costs 2(N - 1)/N times the vector: with many workers a moderate compression
sends more than none at all. `gradiveq.compressors.sparse` says when a sparse sum in the ring would send less.

**Both ways.** In Algorithm 1 of Dutta et al. 2020 a master takes the mean of what the workers' compressor Q_W has left,
and sends it back through a compressor Q_M of its own. With the identity as Q_M it is the scheme above.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gradiveq.arrays.counter_random import Draw
from gradiveq.compressors.base import Compressor
from gradiveq.exchange.error_memory import ErrorFeedback
from gradiveq.exchange.family import Family
from gradiveq.exchange.kernels import overflows_allowed
from gradiveq.exchange.message import LENGTH_BYTES
from gradiveq.exchange.parts import Part
from gradiveq.exchange.requests import MASTER, Call, Exchange, Gather, Round, Spread, Sum

#: The parts of a call's vector, in order and without gaps.
PartsOf = Callable[[Call], Sequence[Part]]


class Compression(Family):
    """One worker's side of an exchange of payloads.

    Args:
        parts_of: the same on every worker; may change between calls, but for its boundaries.
        seed: of random numbers; the same on every worker.
        feedback: error feedback, or None.
        master: Q_M, or None.
        num_parts: of all vectors; the master's random numbers are keyed by what follows theirs.
        on_device: whether all compressors have a torch form.
    """

    def __init__(
        self,
        parts_of: PartsOf,
        *,
        seed: int = 0,
        feedback: ErrorFeedback | None = None,
        master: Compressor | None = None,
        num_parts: int = 0,
        on_device: bool = False,
    ) -> None:
        super().__init__(feedback)
        self._on_device = on_device
        self.parts_of, self.seed, self.master, self._num_parts = parts_of, seed, master, num_parts

    def stays_on_device(self) -> bool:
        return self._on_device

    def rounds(self, call: Call, x: Any, latest: Any) -> Exchange:
        with call.now.span("encode"):
            parts = self.parts_of(call)
            payloads = self._compress(call, parts, x, latest)
            summed = [payload for part, payload in zip(parts, payloads, strict=True) if part.summed]
            gathering = [part for part in parts if not part.summed]
            message = call.kernels.pack(
                [payload for part, payload in zip(parts, payloads, strict=True) if not part.summed], gathering
            )
            same = all(part.compressor.fixed_size for part in gathering)
        totals, messages = yield Round(
            [Sum(summed), Gather(message, "same" if same else "vary")],
            last=self.master is None,
            to_master=self.master is not None,
        )
        if self.master is not None:
            return (yield from self._by_way_of_the_master(call, parts, totals, messages))
        if call.wanted:
            with call.now.span("decode"):
                self._decompress(call, parts, totals, messages)
        return call.out

    def _compress(self, call: Call, parts: Sequence[Part], x: Any, latest: Any) -> list[Any]:
        """The payloads; what they leave out goes to the memory."""
        kernels = call.kernels
        own = kernels.empty(call.bucket.length) if self.memory.wants(call) else None
        payloads, num_sent, num_bytes = [], 0, 0
        for part in parts:
            draw, where = self._draw(call, part, call.rank), part.where
            payload = kernels.compress(part.compressor, x[where], draw, latest[where])
            if own is not None:
                seen = call.seen(payload) if part.summed else payload
                kernels.decompress(part.compressor, seen, own[where], draw)
            if call.measured:
                num_sent += part.compressor.num_sent(payload, part.length)
                num_bytes += payload.nbytes
            payloads.append(payload)
        if own is not None:
            if kernels.on_host:
                np.subtract(x, own, out=own)
            else:
                own = x - own
            self.memory.keep(call, x, own, num_sent, num_bytes + _headers(parts))
        return payloads

    def _decompress(self, call: Call, parts: Sequence[Part], totals: Sequence[Any], messages: Any) -> None:
        """The mean into `call.out`."""
        kernels, out, sums = call.kernels, call.out, iter(totals)
        with overflows_allowed():
            out[:] = 0
            for part in parts:
                if part.summed:
                    draw = self._draw(call, part, call.rank)
                    kernels.decompress(part.compressor, next(sums), out[part.where], draw, call.size)
            gathering = [part for part in parts if not part.summed]
            if gathering:
                kernels.add_gathered(gathering, messages, out, lambda part, rank: self._draw(call, part, rank))
            for part in parts:
                kernels.finish(part.compressor, out[part.where], call.size)

    def _by_way_of_the_master(
        self, call: Call, parts: Sequence[Part], totals: Sequence[Any], messages: Any
    ) -> Exchange:
        kernels, out, now = call.kernels, call.out, call.now
        assert self.master is not None
        back = [part._replace(compressor=self.master, key=self._num_parts + part.key) for part in parts]
        like = kernels.compress(self.master, kernels.zeros(1), Draw(0, 0, 0, 0), kernels.zeros(1))
        finite: Any = None

        def make() -> Any:
            nonlocal finite
            with now.span("decode"):
                self._decompress(call, parts, totals, messages)
                finite = kernels.all_finite(out)
            if finite is False:
                return None
            with now.span("encode"):
                mean = kernels.choose(finite, out, 0.0)
                payloads = []
                for part in back:
                    values = mean[part.where]
                    payload = kernels.compress(part.compressor, values, self._draw(call, part, MASTER), values)
                    payloads.append(kernels.as_bytes(payload))
                return kernels.pack(payloads, back)

        (message,) = yield Round([Spread(make)])
        if not call.wanted:
            return None
        if message is None:  # the mean is not finite
            if finite is None:
                out.fill(np.nan)
            return out
        with now.span("decode"):
            estimate = kernels.empty(call.bucket.length)
            for part, payload in zip(back, kernels.unpack(message, back, MASTER), strict=True):
                typed = kernels.from_bytes(payload, like)
                kernels.decompress(part.compressor, typed, estimate[part.where], self._draw(call, part, MASTER))
            out[:] = estimate if finite is None else kernels.choose(finite, estimate, out)
        return out

    def _draw(self, call: Call, part: Part, rank: int) -> Draw:
        return Draw(self.seed, call.now.number, rank, part.key)


def _headers(parts: Sequence[Part]) -> int:
    """Bytes of the lengths of payloads that vary."""
    return LENGTH_BYTES * sum(not part.summed and not part.compressor.fixed_size for part in parts)


def check_size(compressors: Iterable[Compressor], size: int) -> None:
    """Refuse what can't be added, before anything is sent.

    Raises:
        ValueError: a sum of `size` payloads doesn't fit a compressor's dtype.
    """
    zero, draw = np.zeros(1, np.float32), Draw(0, 0, 0, 0)
    for compressor in {one for one in compressors if one.collective == "all_reduce"}:
        compressor.decompress(compressor.compress(zero, draw, zero), zero.copy(), draw, size)
