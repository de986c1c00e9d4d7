"""Carries requests out in a process group and waits for them: what follows an iteration, and the probe.

Several exchanges may be carried at once, as one for each layer: their requests of one round share a collective.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from gradiveq.arrays.float32 import Array
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.exchange.requests import Call, Compare, Exchange, Gather, Iteration, Round, Spread, Sum
from gradiveq.pca.coding import Bases
from gradiveq.report import FitError, listed


class Carried:
    """What came of several exchanges.

    Attributes:
        means: what each ended with.
        before_s, after_s: what each computed before and after its last round.
        sent: bytes that each has handed over.
    """

    def __init__(self, number: int) -> None:
        self.means: list[Any] = [None] * number
        self.before_s, self.after_s, self.sent = [0.0] * number, [0.0] * number, [0] * number


#: A function that is told of a round that is through, and of the seconds that it took.
AfterRound = Callable[[Round, float], None]


def carry(
    exchanges: Sequence[Exchange],
    group: ProcessGroup | None,
    what: str,
    *,
    calls: Sequence[Call] = (),
    number: int = 0,
    asked: Round | None = None,
    after_round: AfterRound | None = None,
) -> Carried:
    """Run exchanges side by side to their end; collective, with a group.

    Args:
        exchanges: of one method, so that their rounds are alike.
        group: None for this process alone.
        what: is exchanged, for errors.
        calls: of gradients' exchanges; none for what follows an iteration.
        number: of the iteration, for errors.
        asked: the first round of the only exchange, if it was asked for before.
    """
    found = Carried(len(exchanges))
    rounds = {} if asked is None else {0: asked}
    answers: dict[int, list[Any]] = {}
    left = list(range(len(exchanges)))
    while left:
        for i in left if asked is None else ():
            begin = time.perf_counter()
            try:
                rounds[i] = exchanges[i].send(answers[i]) if i in answers else next(exchanges[i])
                found.before_s[i] += time.perf_counter() - begin
            except StopIteration as end:
                found.means[i] = end.value
                found.after_s[i] += time.perf_counter() - begin
        begin, asked, left = time.perf_counter(), None, list(rounds)
        answers = {i: [] for i in left}
        for requests in zip(*(rounds[i].requests for i in left), strict=True):
            for i, answer in zip(left, _answers(requests, left, group, what, number, calls, found), strict=True):
                answers[i].append(answer)
        if after_round is not None and left:
            after_round(rounds[left[0]], time.perf_counter() - begin)
        rounds = {}
    return found


def _answers(
    requests: Sequence[Any],
    numbers: Sequence[int],
    group: ProcessGroup | None,
    what: str,
    number: int,
    calls: Sequence[Call],
    found: Carried,
) -> list[Any]:
    """The result of each exchange's request.

    Args:
        numbers: of the exchanges.
    """
    match requests[0]:
        case Sum(codec=None):
            sums = iter(_sums([payload for one in requests for payload in one.payloads], group, what, number))
            answers = []
            for i, one in zip(numbers, requests, strict=True):
                found.sent[i] += sum(payload.nbytes for payload in one.payloads)
                answers.append([_mean(next(sums), group) if one.mean else next(sums) for _ in one.payloads])
            return answers
        case Sum():
            return [
                _encoded(one, calls[i], group, what, number, i, found) for i, one in zip(numbers, requests, strict=True)
            ]
        case Gather():
            for i, one in zip(numbers, requests, strict=True):
                found.sent[i] += one.message.nbytes
            return _gathered(requests, group, what, number)
        case Spread():
            return [one.make() for one in requests]
        case Compare():
            for one in requests:
                _compare(one, group, what, number)
    return [None] * len(requests)


def _mean(total: Array, group: ProcessGroup | None) -> Array:
    return total / total.dtype.type(1 if group is None else group.size)  # type: ignore[no-any-return]


def _sums(payloads: Sequence[Array], group: ProcessGroup | None, what: str, number: int) -> list[Array]:
    """The sum over the ranks of each, in one collective for each dtype."""
    totals = list(payloads)
    if group is None:
        return totals
    by_dtype: dict[str, list[int]] = {}
    for i, payload in enumerate(payloads):
        by_dtype.setdefault(payload.dtype.name, []).append(i)
    for chosen in by_dtype.values():
        vector = np.concatenate([payloads[i].reshape(-1) for i in chosen])
        wide = vector.astype(np.int32) if vector.dtype == np.int16 else vector  # no backend adds int16
        with group.exchange(what, number):
            total = group.sum_of(wide).astype(vector.dtype, copy=False)
        start = 0
        for i in chosen:
            totals[i] = total[start : start + payloads[i].size].reshape(payloads[i].shape)
            start += payloads[i].size
    return totals


def _gathered(requests: Sequence[Gather], group: ProcessGroup | None, what: str, number: int) -> list[list[Array]]:
    """Everybody's message of each request, by rank."""
    if group is None:
        return [[one.message] for one in requests]
    if isinstance(requests[0].lengths, str):
        with group.exchange(what, number):
            lengths = group.rows_of(np.array([len(one.message) for one in requests], np.int64))
    else:
        lengths = np.array([one.lengths for one in requests], np.int64).T
    dtype = requests[0].message.dtype
    parts = [np.zeros(int(total), dtype) for total in lengths.sum(axis=1)]
    parts[group.rank][:] = np.concatenate([one.message for one in requests])
    with group.exchange(what, number):
        group.broadcast(parts)
    cuts = [np.cumsum(row)[:-1] for row in lengths]
    by_rank = [np.split(part, cut) for part, cut in zip(parts, cuts, strict=True)]
    return [[messages[i] for messages in by_rank] for i in range(len(requests))]


def _encoded(
    request: Sum, call: Call, group: ProcessGroup | None, what: str, number: int, index: int, found: Carried
) -> list[Any]:
    """The mean of a vector, by a codec; what encoding takes is the exchange's."""
    values, bases = request.payloads[0], request.codec
    if not isinstance(bases, Bases):
        found.sent[index] += values.nbytes
        return [_mean(_sums([values], group, what, number)[0], group)]
    begin = time.perf_counter()
    coding = bases.coding(call.bucket, torch.device("cpu"))
    payload = coding.encode(torch.from_numpy(values)).numpy()
    found.before_s[index] += time.perf_counter() - begin
    found.sent[index] += payload.nbytes
    mean = _mean(_sums([payload], group, what, number)[0], group)
    begin = time.perf_counter()
    coding.decode(torch.from_numpy(mean), torch.from_numpy(call.out))
    found.after_s[index] += time.perf_counter() - begin
    return [call.out]


def _compare(request: Compare, group: ProcessGroup | None, what: str, number: int) -> None:
    if group is None:
        return
    with group.exchange(what, number):
        table = group.rows_of(request.numbers)
    for index, name in enumerate(request.names):
        others = np.flatnonzero(table[:, index] != table[0, index]).tolist()
        if others:
            raise RuntimeError(
                f"the bases of {name} are not the same bits on rank 0 and on ranks {others}: with fit_slices='first' "
                "each rank multiplies for itself, which takes the same samples, library and kind of processor "
                "everywhere; fit_slices='all' shares the bases themselves"
            )


class Following:
    """What follows an iteration: its work runs on a thread, up to the first round, beside training; the rest, which is
    collective, when the next iteration begins. That is when it is needed, so the result is the same as without the
    thread."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "gradiveq-fit")
        self._job: Future[Round | None] | None = None
        self._exchange: Exchange | None = None

    def start(self, exchange: Exchange | None) -> None:
        """Begin; not collective."""
        self._exchange = exchange
        self._job = None if exchange is None else self._thread.submit(next, exchange, None)

    def wait(self) -> None:
        """Until the thread is through."""
        if self._job is not None:
            self._job.exception()

    def finish(self, group: ProcessGroup, now: Iteration, names: Sequence[str], count: Callable[[int], None]) -> None:
        """Collective, and waited for.

        Args:
            now: of the iteration that this follows.
            names: of layers, for errors.
            count: told the bytes that are handed over.
        Raises:
            FitError: some rank's fit failed; on all ranks.
            RuntimeError: the ranks did not arrive at the same bits; on all ranks.
        """
        job, exchange, self._job, self._exchange = self._job, self._exchange, None, None
        if job is None or exchange is None:
            return
        asked = job.result()
        if asked is None:
            return

        def count_round(round: Round, seconds: float) -> None:
            handed = sum(map(_handed, round.requests))
            now.fit_bytes += handed
            now.fit_s += seconds
            count(handed)

        what = f"the exchange of bases of {listed(list(names))}, once each rank had fitted its share,"
        number = now.number + 1
        try:
            carry([exchange], group, what, number=number, asked=asked, after_round=count_round)
        except FitError as error:
            raise FitError(f"before iteration {number}: {error}") from error


def _handed(request: Sum | Gather | Spread | Compare) -> int:
    """Bytes that a rank hands to collectives; what is gathered is everybody's share, broadcast."""
    if isinstance(request, Sum):
        return sum(payload.nbytes for payload in request.payloads)
    if isinstance(request, Gather) and not isinstance(request.lengths, str):
        return sum(request.lengths) * int(request.message.itemsize)
    return 0
