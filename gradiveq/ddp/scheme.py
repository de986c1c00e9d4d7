"""How one method exchanges a bucket: rounds of collectives, the last of which ends in the background.

    hook of bucket 1      compress, begin round 1 --------------------------------------> callback: decompress
    hook of bucket 2      compress, begin round 1, then wait for bucket 1's if it has a round 2 and begin that
    ...
    hook of the last      as before, and begin all rounds that are missing

Most methods have one round, so their hook only begins. PowerSGD (P, then Q) and gathered payloads of unknown size (the
sizes, then the payloads) have two; the second of a bucket is begun when the next bucket is ready. So all collectives
are issued from one thread, in one order, on the one process group that DDP itself uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.futures import Future

from gradiveq.ddp.bucket import COMPRESSIBLE, Plan
from gradiveq.ddp.flaws import Codes
from gradiveq.ddp.group import Group
from gradiveq.ddp.memory import Memories


class Round(NamedTuple):
    """Collectives that have begun.

    Attributes:
        last: what follows is no collective; it runs in a callback.
    """

    futures: list[Future[Any]]
    last: bool


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
class Work:
    """One bucket in one iteration.

    Attributes:
        buffer: the bucket's elements; in the end the mean over the workers.
        code: of this rank (`gradiveq.ddp.flaws`); if it is above 1, the gradient counts as zeros.
        scale: by which the loss was multiplied, or None; memories and bases are in units without it.
        heard: everybody's codes, once the exchange is over.
        kept: tensors that a callback reads. On a GPU it does so on a stream of its own, so their memory may be used
            again only when DDP has waited for that, in the next iteration.
    """

    plan: Plan
    buffer: Tensor
    iteration: int
    index: int
    code: Tensor | int
    scale: Tensor | float | None
    group: Group
    codes: Codes
    traffic: Traffic = field(default_factory=Traffic)
    heard: Tensor | None = None
    kept: list[Tensor] = field(default_factory=list)

    @property
    def half(self) -> bool:
        """Whether floating-point payloads travel in the bucket's own 16 bits."""
        return self.buffer.dtype in (torch.float16, torch.bfloat16)

    @property
    def compressible(self) -> bool:
        return self.buffer.dtype in COMPRESSIBLE and not self.plan.unknown

    def gradient(self) -> Tensor:
        """What this rank has, float32 of shape (length,), not scaled; may be the buffer itself."""
        values = self.buffer.float()
        if self.scale is not None:
            values = values / self.scale
        if isinstance(self.code, int):
            return torch.zeros_like(values) if self.code > 1 else values
        return torch.where(self.code > 1, torch.zeros_like(values), values)

    def write(self, mean: Tensor, target: Tensor | None = None) -> None:
        """The bucket, or this part of it, becomes this mean: float32, not scaled."""
        (self.buffer if target is None else target).copy_(mean if self.scale is None else mean * self.scale)

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

    def hear(self, message: Tensor, length: int) -> None:
        """Take everybody's codes from the end of a reduced message."""
        self.heard = self.codes.read(message[length:])


Rounds = Generator[Round, None, None]


def plain_rounds(work: Work) -> Rounds:
    """One all-reduce of what is in the bucket, in its own type; divided first, as in PyTorch, so that sums fit."""
    length = work.buffer.numel()
    message = work.message(length)
    if isinstance(work.code, int) and work.code > 1:
        message[:length] = 0
    else:
        torch.div(work.buffer, work.group.size, out=message[:length])
        if not isinstance(work.code, int):
            message[:length].masked_fill_(work.code > 1, 0)
    yield Round([work.all_reduce(message)], last=True)
    work.hear(message, length)
    work.buffer.copy_(message[:length])


class Scheme(ABC):
    """One method's exchange. `begin`, `rounds` of each bucket and `end` are called in each iteration."""

    #: Of the next iteration, for `State.phase`.
    phase: str = "compressed"
    #: What this rank says in the next iteration about ending a window.
    vote = False
    #: GradiVeQ's windows.
    log: Sequence[dict[str, Any]] = ()

    def begin(self, iteration: int, traffic: Traffic) -> None:  # noqa: B027
        """Before the first bucket; collective, and what is sent here is waited for."""

    @abstractmethod
    def rounds(self, work: Work) -> Rounds:
        """Exchange one bucket."""

    def end(self, compressed: bool) -> None:  # noqa: B027
        """All buckets are through and the iteration counts. Not collective; maybe on a thread of the backend's.

        Args:
            compressed: whether `rounds` was used, and not `plain_rounds`, as before `start_iteration`.
        """

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs, as tensors, numbers, strings, None, lists and dicts; it may differ by rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from there, with as many workers."""

    def load_others(  # noqa: B027
        self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int
    ) -> None:
        """Go on as this rank of another number of workers, from the states of all the old ones, by rank."""


class Uncompressed(Scheme):
    """`Plain`, in the process group's own all-reduce."""

    phase = "plain"

    def rounds(self, work: Work) -> Rounds:
        return plain_rounds(work)


#: Told of a bucket that is through, and what went wrong in there; says what is to be raised.
Judge = Callable[[Work, Exception | None], Exception | None]


class Flight:
    """An exchange under way, and the future that DDP waits for.

    Args:
        judge: called once, when it is over, maybe on a thread of the backend's.

    Attributes:
        launched: whether the last round has begun.
    """

    def __init__(self, rounds: Rounds, work: Work, judge: Judge) -> None:
        self.work, self.launched = work, False
        self._error: Exception | None = None
        self._rounds, self._judge = rounds, judge
        devices: list[Any] = [work.buffer.device] if work.buffer.is_cuda else []
        self._done: Future[Any] = Future(devices=devices)
        self.future: Future[Tensor] = self._done.then(self._deliver)
        self._round = self._next()

    def _next(self) -> Round | None:
        begun = next(self._rounds, None)
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
        assert self._round is not None
        self._wait(self._round.futures)
        self._round = self._next()

    def _finish(self, futures: Sequence[Future[Any]]) -> None:
        try:
            self._wait(futures)  # they are done: on a GPU the callback's stream waits
            next(self._rounds, None)
        except Exception as error:
            self._land(error)
        else:
            self._land(None)

    def _land(self, error: Exception | None) -> None:
        self.launched = True
        try:
            self._error = self._judge(self.work, error)
        except Exception as failure:  # or DDP would wait for ever
            self._error = failure
        self._done.set_result(self.work.buffer)

    def _deliver(self, done: Future[Any]) -> Tensor:
        if self._error is not None:
            raise self._error
        buffer: Tensor = done.value()
        return buffer

    def _wait(self, futures: Sequence[Future[Any]]) -> None:
        with self.work.group.exchange(f"the exchange of {self.work.plan.title()}", self.work.iteration):
            for future in futures:
                future.wait()
