"""Carries out one worker's requests (`gradiveq.exchange.requests`) over a ring.

    Sum([values], codec)    one all-reduce of the vector, as the codec encodes it, with two elements behind it
    Sum(payloads)           an all-reduce for each dtype
    Gather(message)         an all-gather; if lengths vary, before it another one of 4 bytes a worker
    to the master           a reduce-scatter of which all is the master's segment; the all-gather as above, as the ring
                            has no cheaper way to one worker
    Spread(make)            4 bytes a worker, the length of the master's message; then an all-gather of which all is the
                            master's segment, N - 1 steps
    Compare(numbers)        nothing: the next all-reduce compares its codec's description, which has the bases' digests

**Flaws and votes.** In the elements behind the vector the numbers of flawed workers and of votes are summed; payloads
that are summed have one more element, for the former (as many fit in its type as payloads may be added); messages of
equal length one more byte; and where lengths are told, a worker in trouble tells none. So all workers know after the
first message, and end the exchange.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from gradiveq.arrays.float32 import Array
from gradiveq.exchange.direct import Direct
from gradiveq.exchange.family import Family
from gradiveq.exchange.kernels import overflows_allowed
from gradiveq.exchange.requests import MASTER, Call, Compare, Exchange, Gather, Iteration, Purpose, Round, Spread, Sum
from gradiveq.exchange.windows import Windows
from gradiveq.flatten import Bucket, Vector
from gradiveq.methods import QSGDRing
from gradiveq.over_ring.pca_codec import PCACodec, gradient_codec
from gradiveq.over_ring.qsgd import QSGD
from gradiveq.over_ring.staging import Mirror, OnDevice, StagedLayers, staged_plain
from gradiveq.pca.coding import Bases
from ring.algorithm import owned_segment
from ring.codec import Codec, Composite, IdentityCodec
from ring.handle import Ring
from ring.plan import Stats
from ring.timeline import Timeline

if TYPE_CHECKING:  # it needs Triton
    from gradiveq.over_ring.staged_qsgd import StagedQSGD

#: Elements behind the gradient in the vector: how many workers have a flawed gradient, and how many vote to end a
#: window. Both are means over the workers.
FLAG, VOTE, CONTROLS = 0, 1, 2
FLOAT32 = np.dtype(np.float32)
#: A worker's word in place of a length: it has nothing to send, as a number is not finite.
NOT_FINITE = 2**32 - 1


@dataclass
class _Sent:
    """What the first message of an exchange still has to say, and what has travelled since.

    Attributes:
        call: of which the flaw is to be told; None once it was.
        num_bytes: of payloads, those of a message that everybody gets in the mean over the workers.
        both_ways: whether a master has sent the mean back.
    """

    call: Call | None
    vote: bool = False
    num_bytes: float = 0.0
    both_ways: bool = False

    @property
    def flawed(self) -> bool:
        return self.call is not None and bool(self.call.flaw)


class RingDriver:
    """One worker's.

    Args:
        bucket: the whole model's gradient.
        seed: of QSGD's random numbers.
        mirror: where gradients are on a device; None where they are on the host.

    Attributes:
        gradient: float32 of shape (length,), on the host; what families are best given.
        timeline: of the exchange under way.
    """

    def __init__(
        self, ring: Ring, bucket: Bucket, chunk_bytes: int, seed: int = 0, mirror: Mirror | None = None
    ) -> None:
        self.ring, self.bucket, self.chunk_bytes, self.seed, self.mirror = ring, bucket, chunk_bytes, seed, mirror
        self.vector: Vector = ring.empty(bucket.length + CONTROLS) if mirror is None else mirror.host
        self.gradient = self.vector[: bucket.length]
        self.timeline = Timeline()
        self._plain = IdentityCodec() if mirror is None else staged_plain(mirror, bucket.length, chunk_bytes)
        # Forms of a method or of bases that take a while to make, by what they are of.
        self._coded: tuple[Bases, Composite, Mapping[str, PCACodec], StagedLayers | None] | None = None
        self._quantised: tuple[QSGDRing, StagedQSGD | None] | None = None

    def on_device(self, family: Family) -> bool:
        """Whether the family's next exchange can be of the gradient in the mirror; else it has to be copied."""
        if self.mirror is None or not isinstance(family, Direct | Windows) or not family.stays_on_device():
            return False
        quantised = isinstance(family, Direct) and isinstance(family.method, QSGDRing)
        return not quantised or self._staged_qsgd(family.method) is not None  # type: ignore[arg-type]

    def carry(self, exchange: Exchange, now: Iteration, call: Call | None = None, vote: bool = False) -> Any:
        """Run an exchange to its end; collective.

        Args:
            call: of a gradient's exchange, whose flaw is told; None for what follows an iteration.
            vote: of this worker.
        Returns:
            The mean, or None if the gradient of some worker is of no use, on all workers alike.
        """
        sent, results = _Sent(call, vote), None
        while True:
            try:
                asked = next(exchange) if results is None else exchange.send(results)
            except StopIteration as end:
                if call is not None and sent.num_bytes:
                    dense = FLOAT32.itemsize * self.bucket.length * (2 if sent.both_ways else 1)
                    now.ratio = dense / sent.num_bytes
                return end.value
            results = self._round(asked, now, sent)
            if results is None:
                exchange.close()
                return None

    def _round(self, asked: Round, now: Iteration, sent: _Sent) -> list[Any] | None:
        """The results, or None if some worker is in trouble."""
        lengths: Sequence[int] | None = None
        for gather in (one for one in asked.requests if isinstance(one, Gather)):
            if gather.lengths == "vary" or asked.to_master:
                lengths = self._numbers(NOT_FINITE if sent.flawed else len(gather.message), now)
                sent.call = None
                if NOT_FINITE in lengths:
                    return None
            elif gather.lengths != "same":
                lengths = gather.lengths
        results: list[Any] = []
        for request in asked.requests:
            match request:
                case Sum(codec=None):
                    found: Any = self._sum(request, now, sent, asked.to_master)
                case Sum():
                    found = self._encoded(request, now, sent)
                case Gather():
                    found = self._gathered(request, lengths, now, sent)
                case Spread():
                    results.append(self._spread(request, now, sent))
                    continue
                case Compare():
                    results.append(None)
                    continue
            if found is None:
                return None
            results.append(found)
        return results

    def _encoded(self, request: Sum, now: Iteration, sent: _Sent) -> list[Any] | None:
        """The mean of the vector, in its place."""
        (values,), call = request.payloads, sent.call
        codec, chunk_bytes = self._codec(request.codec, now.number)
        said = [float(sent.flawed), float(sent.vote)]
        mean: Any = self.gradient
        if isinstance(codec, OnDevice):
            assert self.mirror is not None
            mean = self.mirror.values[: self.bucket.length]
            if values.data_ptr() != mean.data_ptr():
                mean.copy_(values)
            stats, said = codec.mean_over(self.ring, said, chunk_bytes, self.timeline)
            num_bytes = codec.num_bytes + FLOAT32.itemsize * CONTROLS
        else:
            if values is not self.gradient:
                self.gradient[:] = values
            self.vector[self.bucket.length :] = said
            with overflows_allowed():
                stats = self.ring.all_reduce(
                    self.vector, codec, op="mean", chunk_bytes=chunk_bytes, timeline=self.timeline
                )
            said = self.vector[self.bucket.length :].tolist()
            num_bytes = sum(region.num_bytes for region in codec.regions(len(self.vector), FLOAT32))
        self._count(stats, now, request.purpose)
        now.ratio = FLOAT32.itemsize * len(self.vector) / num_bytes
        if isinstance(request.codec, Bases):
            self._take_losses(request.codec)
        if call is not None:
            sent.call = None
            votes = round(said[VOTE] * self.ring.size)
            call.votes = lambda: votes
        return None if said[FLAG] > 0 else [mean]

    def _sum(self, request: Sum, now: Iteration, sent: _Sent, to_master: bool) -> list[Any] | None:
        arrays = [payload.cpu().numpy() if isinstance(payload, Tensor) else payload for payload in request.payloads]
        by_dtype: dict[str, list[int]] = {}
        for i, array in enumerate(arrays):
            by_dtype.setdefault(array.dtype.name, []).append(i)
        totals: list[Any] = list(arrays)
        for chosen in by_dtype.values():
            parts = [arrays[i].reshape(-1) for i in chosen]
            if sent.call is not None:
                parts.append(np.array([sent.flawed], parts[0].dtype))
            message = np.concatenate(parts)
            if request.purpose == "gradient":
                sent.num_bytes += message.nbytes - (parts[-1].nbytes if sent.call is not None else 0)
            if len(message):
                options: dict[str, Any] = {"op": "mean"} if request.mean else {}
                collective = self.ring.all_reduce
                if to_master:
                    collective, options = self.ring.reduce_scatter, {"bounds": self._only_masters(len(message))}
                self._carry_out(collective, message, now, request.purpose, **options)
            if sent.call is not None:
                sent.call = None
                if message[-1] != 0:
                    return None
            start = 0
            for i in chosen:
                total = message[start : start + arrays[i].size].reshape(arrays[i].shape)
                payload = request.payloads[i]
                totals[i] = payload.new_tensor(total) if isinstance(payload, Tensor) else total
                start += arrays[i].size
        return totals

    def _gathered(
        self, request: Gather, lengths: Sequence[int] | None, now: Iteration, sent: _Sent
    ) -> list[Array] | None:
        message = request.message
        told = sent.call is not None and len(message) > 0
        if told:
            message = np.append(message, np.array([sent.flawed], message.dtype))
            sent.call = None
        if lengths is None:
            lengths = [len(message)] * self.ring.size
        messages = self._gather(message, lengths, now, request.purpose)
        if request.purpose == "gradient":
            sent.num_bytes += sum(lengths) / self.ring.size - told
        if told:
            if any(message[-1] for message in messages):
                return None
            messages = [message[:-1] for message in messages]
        return messages

    def _spread(self, request: Spread, now: Iteration, sent: _Sent) -> Array | None:
        message = request.make() if self.ring.rank == MASTER else None
        said = NOT_FINITE if message is None else len(message)
        num_bytes = self._numbers(said, now)[MASTER]
        if num_bytes == NOT_FINITE:
            return None
        if message is None:
            message = np.empty(num_bytes, np.uint8)
        if num_bytes:
            self._carry_out(self.ring.all_gather, message, now, "gradient", bounds=self._only_masters(num_bytes))
        sent.num_bytes += num_bytes
        sent.both_ways = True
        return message

    def _numbers(self, number: int, now: Iteration) -> list[int]:
        """Every worker's, by rank."""
        own = np.array([number], np.uint32).view(np.uint8)
        said = self._gather(own, [own.nbytes] * self.ring.size, now, "gradient")
        return [int(np.frombuffer(one.tobytes(), np.uint32)[0]) for one in said]

    def _gather(self, message: Array, lengths: Sequence[int], now: Iteration, purpose: Purpose) -> list[Array]:
        """Every worker's message, by rank."""
        with self._traced(now, purpose) as timeline:
            messages, stats = gather_messages(
                self.ring, message, lengths, chunk_bytes=self.chunk_bytes, timeline=timeline
            )
        self._count(stats, now, purpose)
        return messages

    def _only_masters(self, length: int) -> list[int]:
        """Bounds with which the whole vector is the master's segment."""
        place = owned_segment(MASTER, self.ring.size)
        return [0] * (place + 1) + [length] * (self.ring.size - place)

    def _carry_out(
        self, collective: Callable[..., Stats], vector: Array, now: Iteration, purpose: Purpose, **options: Any
    ) -> None:
        with self._traced(now, purpose) as timeline, overflows_allowed():
            stats = collective(vector, chunk_bytes=self.chunk_bytes, timeline=timeline, **options)
        self._count(stats, now, purpose)

    @contextmanager
    def _traced(self, now: Iteration, purpose: Purpose) -> Iterator[Timeline | None]:
        """What a collective writes its times to; all of a measurement's are one span, a fit's are added up besides."""
        begin = now.clock()
        if purpose == "measure":
            with now.span("measure"):
                yield None
        else:
            yield self.timeline
        if purpose == "fit":
            now.fit_s += now.clock() - begin

    @staticmethod
    def _count(stats: Stats, now: Iteration, purpose: Purpose) -> None:
        if purpose == "measure":
            now.measure_bytes += stats.bytes_sent
        else:
            now.bytes_sent += stats.bytes_sent
            now.fit_bytes += stats.bytes_sent if purpose == "fit" else 0

    def _codec(self, asked: Any, iteration: int) -> tuple[Codec, int]:
        """What encodes the vector, and its chunk size."""
        if isinstance(asked, Bases):
            _, codec, _, staged = self._coded_with(asked)
            return (codec if staged is None else staged.staged), self.chunk_bytes
        if not isinstance(asked, QSGDRing):
            return self._plain, self.chunk_bytes
        quantised = QSGD.of(asked, self.seed, iteration)
        staged_qsgd = self._staged_qsgd(asked)
        if staged_qsgd is not None:
            return replace(staged_qsgd, codec=quantised), self._message_bytes(asked)
        return Composite([(self.bucket.length, quantised), (CONTROLS, IdentityCodec())]), self._message_bytes(asked)

    def _message_bytes(self, method: QSGDRing) -> int:
        return self.chunk_bytes if method.pipelined else sys.maxsize

    def _coded_with(self, bases: Bases) -> tuple[Bases, Composite, Mapping[str, PCACodec], StagedLayers | None]:
        if self._coded is None or self._coded[0] is not bases:
            codec, codecs = gradient_codec(self.bucket.blocks, bases.by_name, CONTROLS)
            staged = None
            if self.mirror is not None:
                description = codec.describe(FLOAT32)
                staged = StagedLayers(self.mirror, self.bucket.blocks, bases, CONTROLS, self.chunk_bytes, description)
            self._coded = bases, codec, codecs, staged
        for one in self._coded[2].values():
            one.monitor = bases.monitor
        return self._coded

    def _take_losses(self, bases: Bases) -> None:
        if bases.monitor and self._coded is not None and self._coded[3] is None:
            bases.local.update({name: codec.take_local_loss() for name, codec in self._coded[2].items()})

    def _staged_qsgd(self, method: QSGDRing) -> StagedQSGD | None:
        """What quantises on the device; None where the host is the better place, or the only one."""
        if self.mirror is None or find_spec("triton") is None:
            return None
        if self._quantised is None or self._quantised[0] != method:
            from gradiveq.over_ring.staged_qsgd import StagedQSGD, pays

            codec = QSGD.of(method)
            most = self._message_bytes(method) // codec.num_bytes(codec.bucket) * codec.bucket
            elements = min(most, self.bucket.length // self.ring.size)
            use = pays(codec, elements, self.mirror.device)
            self._quantised = method, StagedQSGD.of(codec, self.mirror, self.bucket.length) if use else None
        return self._quantised[1]


def gather_messages(
    ring: Ring,
    message: Array,
    lengths: Sequence[int],
    *,
    chunk_bytes: int | None = None,
    timeline: Timeline | None = None,
) -> tuple[list[Array], Stats]:
    """Every worker's message, by rank, and what was sent; collective.

    Args:
        lengths: of the messages, by rank; the same everywhere.
    """
    places = [owned_segment(rank, ring.size) for rank in range(ring.size)]
    by_segment = [0] * ring.size
    for place, length in zip(places, lengths, strict=True):
        by_segment[place] = length
    bounds = [0, *accumulate(by_segment)]
    everything = np.empty(bounds[-1], message.dtype)
    messages = [everything[bounds[place] : bounds[place + 1]] for place in places]
    messages[ring.rank][:] = message
    if not len(everything):
        return messages, Stats(0, 0)
    return messages, ring.all_gather(everything, bounds=bounds, chunk_bytes=chunk_bytes, timeline=timeline)
