"""Carries out one bucket's requests (`gradiveq.exchange.requests`) in a process group; the last round ends in the
background.

    hook of bucket 1      compress, begin round 1 --------------------------------------> callback: decompress
    hook of bucket 2      compress, begin round 1, then wait for bucket 1's if it has a round 2 and begin that
    ...
    hook of the last      as before, and begin all rounds that are missing

Most methods have one round, so their hook only begins. PowerSGD (P, then Q) and gathered payloads of unknown size (the
sizes, then the payloads) have two; the second of a bucket is begun when the next bucket is ready. So all collectives
are issued from one thread, in one order, on the one process group that DDP itself uses.

    Sum([values], codec)   | payload, or the bucket as it is | codes |                      one message
    Sum(payloads)          | payloads of one type, one after another | codes |              one message for each type
    Gather(message)        | code | message |                                               one message for each rank
    Spread(make)           nothing: every rank has what the master has, and does what it would do

Codes (`gradiveq.exchange.flaws`) travel with the first round; where sizes are told, with these. On the host a rank that
hears of a flaw ends the exchange; on a GPU that is looked at in the next iteration, and the mean is masked.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.futures import Future

from gradiveq.ddp.bucket import COMPRESSIBLE
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.ddp.wire import Sums
from gradiveq.device.bits import cast, constant
from gradiveq.device.kernels import DeviceKernels
from gradiveq.exchange import flaws
from gradiveq.exchange.family import Family
from gradiveq.exchange.flaws import CODE_BYTES, Codes
from gradiveq.exchange.kernels import HOST, Kernels
from gradiveq.exchange.requests import Call, Exchange, Gather, Iteration, Round, Spread, Sum
from gradiveq.flatten import Bucket
from gradiveq.pca.coding import Bases


class Begun(NamedTuple):
    """Collectives that have begun.

    Attributes:
        last: what follows is no collective; it runs in a callback.
    """

    futures: list[Future[Any]]
    last: bool


#: Carries one bucket's exchange: resumed when the collectives that it yields are done.
Carrying = Generator[Begun, None, None]


@dataclass
class Traffic:
    """Bytes of this rank, since compression may begin (`start_iteration`), whatever a collective makes of them.

    Attributes:
        dense: of the gradients, as they are.
        payload: that were handed to collectives in their place, codes and padding included.
        fit: of these, to agree on GradiVeQ's bases.
    """

    dense: int = 0
    payload: int = 0
    fit: int = 0


@dataclass
class Delivery:
    """One bucket in one iteration.

    Attributes:
        buffer: the bucket's elements; in the end the mean over the workers.
        flaw: of this rank (`gradiveq.exchange.flaws`), a code without a vote; if it isn't 0, the gradient counts as
            zeros.
        vote: of this rank, 0 or 1.
        scale: by which the loss was multiplied, or None; memories and bases are in units without it.
        heard: everybody's codes, once the exchange is over.
        stays: whether it is exchanged on its device, by torch operations.
        kept: tensors that a callback reads. On a GPU it does so on a stream of its own, so their memory may be used
            again only when DDP has waited for that, in the next iteration.
    """

    bucket: Bucket
    buffer: Tensor
    now: Iteration
    index: int
    flaw: Tensor | int
    scale: Tensor | float | None
    group: ProcessGroup
    codes: Codes
    vote: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    heard: Tensor | None = None
    stays: bool = False
    kept: list[Any] = field(default_factory=list)

    @property
    def code(self) -> Tensor | int:
        return self.flaw + self.vote

    @property
    def half(self) -> bool:
        """Whether floating-point payloads travel in the bucket's own 16 bits."""
        return self.buffer.dtype in (torch.float16, torch.bfloat16)

    @property
    def compressible(self) -> bool:
        return self.buffer.dtype in COMPRESSIBLE and not self.bucket.unknown

    def gradient(self) -> Tensor:
        """What this rank has, float32 of shape (length,), not scaled; may be the buffer itself."""
        values = self.unscaled()
        if isinstance(self.flaw, int):
            return torch.zeros_like(values) if self.flaw else values
        return torch.where(self.flaw > 0, torch.zeros_like(values), values)

    def unscaled(self) -> Tensor:
        """The buffer in float32."""
        values = self.buffer.float()
        return values if self.scale is None else values / self.scale

    def write(self, mean: Tensor) -> None:
        """The bucket becomes this mean: float32, not scaled."""
        self.buffer.copy_(mean if self.scale is None else mean * self.scale)

    def to_wire(self, payload: Tensor) -> Tensor:
        """A float32 payload in the bucket's own 16 bits, in units of the scaled loss as the bucket was, and divided by
        the number of workers so that the sum fits, as in PyTorch's own hooks."""
        scaled = payload if self.scale is None else payload * self.scale
        return (scaled / self.group.size).to(self.buffer.dtype)

    def from_wire(self, total: Tensor) -> Tensor:
        """The sum of float32 payloads from that of `to_wire`'s, or one payload as the others see it."""
        payload = total.float() * self.group.size
        return payload if self.scale is None else payload / self.scale

    def message(self, length: int, dtype: torch.dtype | None = None) -> Tensor:
        """A vector to be summed, on the bucket's device: `length` elements, then the codes, which are filled in."""
        out = torch.empty(length + self.codes.length, dtype=dtype or self.buffer.dtype, device=self.buffer.device)
        self.codes.write(out[length:], self.group.rank, self.code)
        self.kept.append(out)
        return out

    def all_reduce(self, message: Tensor) -> Future[Any]:
        self.traffic.payload += message.nbytes
        return self.group.all_reduce(message)

    def all_gather(self, message: Tensor) -> tuple[Tensor, Future[Any]]:
        self.traffic.payload += message.nbytes
        return self.group.all_gather(message)

    def hear(self, message: Tensor) -> None:
        """Take everybody's codes from the end of a reduced message."""
        self.heard = self.codes.read(message[len(message) - self.codes.length :])


def uncompressed(delivery: Delivery) -> Carrying:
    """One all-reduce of what is in the bucket, in its own type; divided first, as in PyTorch, so that sums fit."""
    message, length = _as_it_is(delivery), delivery.buffer.numel()
    yield Begun([delivery.all_reduce(message)], last=True)
    delivery.hear(message)
    delivery.buffer.copy_(message[:length])


def _as_it_is(delivery: Delivery) -> Tensor:
    length, flaw = delivery.buffer.numel(), delivery.flaw
    message = delivery.message(length)
    if isinstance(flaw, int) and flaw:
        message[:length] = 0
    else:
        torch.div(delivery.buffer, delivery.group.size, out=message[:length])
        if not isinstance(flaw, int):
            message[:length].masked_fill_(flaw > 0, 0)
    return message


def on_device(buffer: Tensor) -> bool:
    """Whether a gradient should stay where it is, if the method can."""
    return buffer.is_cuda


@cache
def device_kernels(device: torch.device) -> DeviceKernels:
    return DeviceKernels(device)


#: Gives a request's result, once its collectives are done.
Finish = Callable[[], Any]


def _seen(delivery: Delivery, kernels: Kernels, payload: Any) -> Any:
    """What the others will see of a payload that is summed, so that error feedback knows of the rounding too."""
    own = kernels.tensor(payload)
    if not delivery.half or own.dtype != torch.float32:
        return payload
    return kernels.array(delivery.from_wire(delivery.to_wire(own)))


def carried(family: Family, delivery: Delivery) -> Carrying:
    """Exchange one bucket by a family."""
    return _Carrier(family, delivery).run()


class _Carrier:
    """One bucket's exchange. Nothing that lives longer refers to it, nor does it to itself: its memory is that of
    several gradients, which must not wait for the garbage collector."""

    def __init__(self, family: Family, delivery: Delivery) -> None:
        self.delivery = delivery
        delivery.stays = stays = family.stays_on_device() and on_device(delivery.buffer)
        self.kernels: Kernels = device_kernels(delivery.buffer.device) if stays else HOST
        if not stays:
            delivery.flaw = int(delivery.flaw)
        self.gradient = self.kernels.array(delivery.gradient())
        self.call = Call(
            delivery.bucket,
            delivery.now,
            self.kernels,
            delivery.group.rank,
            delivery.group.size,
            delivery.index,
            flaw=delivery.flaw,
            seen=partial(_seen, delivery, self.kernels),
            kept=delivery.kept,
        )
        self.exchange: Exchange = family.exchange(self.call, self.gradient)
        self._as_it_is: Any = None  # the mean that is in the buffer already, in its own type

    def run(self) -> Carrying:
        delivery, call = self.delivery, self.call
        call.out = self.kernels.empty(delivery.bucket.length)
        delivery.kept.append(call.out)
        asked, mean = self._resume(None)
        delivery.flaw = call.flaw
        first = True
        while asked is not None:
            if all(isinstance(one, Spread) for one in asked.requests):
                results = [one.make() for one in asked.requests]  # type: ignore[union-attr]
            else:
                results = yield from self._round(asked, first)
                if self.kernels.on_host and first:
                    assert delivery.heard is not None
                    if flaws.any_flaw(delivery.heard):
                        self.exchange.close()
                        return
                first = False
            asked, mean = self._resume(results)
        if mean is not self._as_it_is:
            delivery.write(self.kernels.tensor(mean).to(delivery.buffer.device))

    def _resume(self, results: list[Any] | None) -> tuple[Round | None, Any]:
        """The next round, or None and the mean."""
        try:
            return next(self.exchange) if results is None else self.exchange.send(results), None
        except StopIteration as end:
            return None, end.value

    def _round(self, asked: Round, first: bool) -> Generator[Begun, None, list[Any]]:
        delivery, last = self.delivery, asked.last or asked.to_master
        futures: list[Future[Any]] = []
        finishes: list[Finish] = []
        for request in asked.requests:
            match request:
                case Sum(codec=None):
                    finishes.append(self._sum(request, first, futures))
                case Sum():
                    finishes.append(self._encoded(request, futures))
                case Gather(message=message) if len(message) or (first and not futures):  # or no codes would travel
                    if request.lengths == "vary":
                        begun, lengths = yield from self._tell_lengths(message)
                        if flaws.any_flaw(begun):
                            yield Begun(futures, last=True)
                            return []
                        message = np.pad(message, (0, max(lengths) - len(message)))
                        finishes.append(self._gather(message, lengths, False, futures))
                    else:
                        finishes.append(self._gather(message, None, first, futures))
                case _:
                    finishes.append(list)
        yield Begun(futures, last)
        results = [finish() for finish in finishes]
        delivery.kept.append(results)
        if first:
            codes = delivery.heard
            self.call.votes = lambda: 0 if codes is None else flaws.votes(codes.cpu())
        return results

    def _tell_lengths(self, message: Any) -> Generator[Begun, None, tuple[Tensor, list[int]]]:
        """Everybody's codes, and the lengths of their messages, by rank."""
        delivery = self.delivery
        said = torch.tensor([delivery.code, len(message)], device=delivery.group.device)
        everybody, future = delivery.all_gather(said)
        yield Begun([future], last=False)
        delivery.heard = everybody[:, 0].cpu()
        return delivery.heard, everybody[:, 1].tolist()

    def _sum(self, request: Sum, first: bool, futures: list[Future[Any]]) -> Finish:
        delivery, kernels = self.delivery, self.kernels
        payloads = [kernels.tensor(payload) for payload in request.payloads]
        counted = request.purpose != "measure"
        sums = Sums(delivery, payloads, codes=first and counted, half=delivery.half and counted)
        futures.extend(delivery.all_reduce(one) if counted else delivery.group.all_reduce(one) for one in sums.messages)

        def finish() -> list[Any]:
            if first and counted and sums.messages:
                delivery.hear(sums.messages[0])
            totals = sums.totals(kernels.device)
            if request.mean and totals:
                size = constant(delivery.group.size, totals[0])
                totals = [total / size for total in totals]
            return [kernels.array(total) for total in totals]

        return finish

    def _encoded(self, request: Sum, futures: list[Future[Any]]) -> Finish:
        """The mean of the bucket, by a codec."""
        (values,), delivery, kernels = request.payloads, self.delivery, self.kernels
        if not isinstance(request.codec, Bases):
            return self._plain(values, futures)
        coding = request.codec.coding(delivery.bucket, kernels.device)
        payload = coding.encode(kernels.tensor(values))
        message = delivery.message(len(payload))
        message[: len(payload)] = delivery.to_wire(payload) if delivery.half else payload
        futures.append(delivery.all_reduce(message))

        def finish() -> list[Any]:
            delivery.hear(message)
            total = message[: len(payload)].to(kernels.device)
            if delivery.half:
                total = delivery.from_wire(total)
            coding.decode(total / delivery.group.size, kernels.tensor(self.call.out))
            return [self.call.out]

        return finish

    def _plain(self, values: Any, futures: list[Future[Any]]) -> Finish:
        """The mean of the bucket as it is: in its own type, if it is the gradient and nothing else."""
        delivery, kernels = self.delivery, self.kernels
        if values is not self.gradient:
            return self._sum(Sum([values], mean=True), True, futures)
        message = _as_it_is(delivery)
        futures.append(delivery.all_reduce(message))

        def finish() -> list[Any]:
            delivery.hear(message)
            delivery.buffer.copy_(message[: delivery.buffer.numel()])
            self._as_it_is = kernels.array(delivery.unscaled())
            return [self._as_it_is]

        return finish

    def _gather(
        self, message: Any, lengths: Sequence[int] | None, with_code: bool, futures: list[Future[Any]]
    ) -> Finish:
        """Everybody's message.

        Args:
            lengths: of the messages, by rank, to which they were padded; None if they are the same.
        """
        delivery, kernels = self.delivery, self.kernels
        wire = kernels.tensor(message)
        if with_code:
            code = torch.as_tensor(delivery.code, dtype=torch.int64, device=wire.device)
            wire = torch.cat([code.view(1).view(torch.uint8), wire])
        if kernels.on_host:
            wire = wire.to(delivery.group.device)
        everybody, future = delivery.all_gather(wire)
        delivery.kept += [wire, everybody]
        futures.append(future)

        def finish() -> Any:
            rows = everybody
            if with_code:
                delivery.heard = cast(rows[:, :CODE_BYTES], torch.int64).view(-1)
                rows = rows[:, CODE_BYTES:]
            if not kernels.on_host:
                return rows
            arrays = rows.cpu().numpy()
            return list(arrays) if lengths is None else [row[:n] for row, n in zip(arrays, lengths, strict=True)]

        return finish


#: A function that is told of a bucket that is through, and of what went wrong; it says what is to be raised.
Judge = Callable[[Delivery, Exception | None], Exception | None]


class Flight:
    """An exchange under way, and the future that DDP waits for.

    Args:
        judge: called once, when it is over, maybe on a thread of the backend's.

    Attributes:
        launched: whether the last round has begun.
    """

    def __init__(self, carrying: Carrying, delivery: Delivery, judge: Judge) -> None:
        self.delivery, self.launched = delivery, False
        self._error: Exception | None = None
        self._carrying, self._judge = carrying, judge
        devices: list[Any] = [delivery.buffer.device] if delivery.buffer.is_cuda else []
        self._done: Future[Any] = Future(devices=devices)
        self.future: Future[Tensor] = self._done.then(self._deliver)
        self._begun = self._next()

    def _next(self) -> Begun | None:
        begun = next(self._carrying, None)
        if begun is None:
            self._land(None)
        elif begun.last:
            self.launched = True
            self._follow(begun.futures, 0)
        return begun

    def _follow(self, futures: Sequence[Future[Any]], index: int) -> None:
        """Finish after the last of the futures; no thread waits for one, which might be the one that completes it."""
        if index < len(futures):
            futures[index].then(lambda _: self._follow(futures, index + 1))
        else:
            self._finish(futures)

    def advance(self) -> None:
        """Wait for the round under way and begin the next, unless the last one has begun already."""
        if self.launched:
            return
        assert self._begun is not None
        self._wait(self._begun.futures)
        self._begun = self._next()

    def wait(self) -> None:
        """Until the exchange is over, if its last round has begun; else until the round under way is.

        Raises: what the exchange has failed with.
        """
        if self.launched:
            self.future.wait()
        elif self._begun is not None:
            self._wait(self._begun.futures)

    def _finish(self, futures: Sequence[Future[Any]]) -> None:
        try:
            self._wait(futures)  # they are done: on a GPU the callback's stream waits
            next(self._carrying, None)
        except Exception as error:
            self._land(error)
        else:
            self._land(None)

    def _land(self, error: Exception | None) -> None:
        self.launched = True
        try:
            self._error = self._judge(self.delivery, error)
        except Exception as failure:  # or DDP would wait for ever
            self._error = failure
        self._done.set_result(self.delivery.buffer)

    def _deliver(self, done: Future[Any]) -> Tensor:
        if self._error is not None:
            raise self._error
        buffer: Tensor = done.value()
        return buffer

    def _wait(self, futures: Sequence[Future[Any]]) -> None:
        delivery = self.delivery
        with delivery.group.exchange(f"the exchange of {delivery.bucket.title()}", delivery.now.number):
            for future in futures:
                future.wait()
