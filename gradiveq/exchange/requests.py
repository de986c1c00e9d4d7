"""What a method asks of the other workers, and the answer that it is resumed with.

A method is a generator without input or output (`gradiveq.exchange.family`). It yields rounds of requests; a driver
carries them out and resumes it with one result for each request:

    request                        result
    -----------------------------  -----------------------------------------------------------------------------------
    Sum(payloads)                  list of arrays: each payload's sum over the workers (or mean)
    Sum([values], codec)           the mean of a vector that travels as the codec says
    Gather(message)                every worker's message, by rank: a list, or with equal lengths a matrix on a device
    Spread(make)                   what `make()` returns on the master
    Compare(numbers)               None; an error on all workers if they differ

    driver                       where                                what it does
    ---------------------------  -----------------------------------  -------------------------------------------------
    `gradiveq.over_ring.driver`  over MPI, in lockstep, in virtual    hands the codec to the ring's all-reduce, so that
                                 time                                 chunks are encoded while others travel
    `gradiveq.ddp.driver`        in DDP's communication hook          encodes, starts futures, decodes in a callback
    `gradiveq.ddp.blocking`      in a process group, waiting          sums arrays: bases, the probe
    `gradiveq.here`              one process with all workers         adds arrays
    `gradiveq.sizes`             nowhere                              counts bytes

Results may be other workers' as well, and are not to be modified.

In a hook, what follows the last round runs in a callback, which may begin no collective: so a round says if it is the
last. Requests of one round travel together where the driver can.

**Flaws and votes** travel with the first message of an exchange and need none of their own: a worker whose gradient is
of no use says so (`Call.flaw`, see `gradiveq.exchange.flaws`), contributes zeros, and the driver ends the exchange on
all workers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from gradiveq.flatten import Bucket

if TYPE_CHECKING:
    from gradiveq.exchange.error_memory import Measures
    from gradiveq.exchange.kernels import Kernels
    from gradiveq.methods import Plain, QSGDRing
    from gradiveq.pca.coding import Bases

#: The worker that compresses the mean on its way back, in Algorithm 1 of Dutta et al. 2020.
MASTER = 0

#: What bytes are counted as: payload of the gradients, agreement on bases, or measuring that training doesn't need.
Purpose = Literal["gradient", "fit", "measure"]


class Sum(NamedTuple):
    """The sum over the workers of each of several payloads.

    Attributes:
        payloads: arrays of any shape, the same shapes and dtypes on every worker. Not modified, but with a codec.
        codec: how payloads[0] travels, which is the call's whole vector then: as it is, quantised at every hop, or
            projected on bases. Its memory may be overwritten by the result.
        mean: divide by the number of workers.
    """

    payloads: Sequence[Any]
    codec: Plain | QSGDRing | Bases | None = None
    mean: bool = False
    purpose: Purpose = "gradient"


class Gather(NamedTuple):
    """Everybody's message, a one-dimensional array.

    Attributes:
        lengths: "same" on all workers; "vary", which they have to tell each other first; or known to all, by rank.
    """

    message: Any
    lengths: Literal["same", "vary"] | Sequence[int] = "same"
    purpose: Purpose = "gradient"


class Spread(NamedTuple):
    """A message from the master to everybody.

    Attributes:
        make: makes it, uint8; None if there is none to be made, which everybody is told. Called on the master only, or
            where all workers know what the master does, on all.
    """

    make: Callable[[], Any]


class Compare(NamedTuple):
    """A check that all workers hold the same.

    Attributes:
        numbers: int64, a digest for each name.
        names: what they are of.
    """

    numbers: Any
    names: Sequence[str]


class Round(NamedTuple):
    """Requests that may travel together.

    Attributes:
        last: no round follows.
        to_master: only the master needs the results.
    """

    requests: Sequence[Sum | Gather | Spread | Compare]
    last: bool = True
    to_master: bool = False


#: Ends with the mean gradient, or with None where `Call.wanted` is False.
Exchange = Generator[Round, list[Any], Any]


def _no_span(kind: str) -> AbstractContextManager[None]:
    return nullcontext()


@dataclass
class Iteration:
    """The iteration under way on one worker: what it has cost and found so far.

    Attributes:
        number: from 0 on.
        lr: learning rate of the step that follows; 1 where it isn't known.
        span: `with span(kind)` counts the time within, by kind.
        clock: seconds, by which fits are timed.
        ratio: dense bytes / payload bytes of the gradients.
        bytes_sent: by this worker, those of a fit included, those of measuring not.
        fit_s: spent on exchanging for a fit, by `clock`.
        losses: relative losses that were measured.
    """

    number: int
    lr: float = 1.0
    span: Callable[[str], AbstractContextManager[object]] = _no_span
    clock: Callable[[], float] = time.perf_counter
    ratio: float = 1.0
    bytes_sent: int = 0
    fit_bytes: int = 0
    measure_bytes: int = 0
    fit_s: float = 0.0
    losses: dict[str, Any] = field(default_factory=dict)
    measures: Measures | None = None


@dataclass
class Call:
    """One vector's exchange on one worker: all that a method may know of its surroundings.

    Attributes:
        bucket: what the vector holds.
        now: the iteration.
        kernels: array operations, NumPy's or torch's.
        index: number of the vector in its iteration.
        flaw: why this worker's gradient is of no use (`gradiveq.exchange.flaws`), 0 if it is; a method may find a flaw
            before its first round.
        out: where the method may write the mean, float32 of shape (length,); may be the memory of the gradient.
        wanted: whether the mean is needed on this worker.
        measured: whether `Iteration.measures` are.
        per_hop: whether the driver can carry codecs that each hop decodes, adds and encodes again.
        seen: a payload that is summed as the others see it, rounded on the wire.
        kept: tensors of a round that what follows the next round reads. On a GPU that may run on another stream, so
            their memory may be used again only in the next iteration.
        votes: how many workers vote to end a window; once the first round is through.
    """

    bucket: Bucket
    now: Iteration
    kernels: Kernels
    rank: int
    size: int
    index: int = 0
    flaw: Any = 0
    out: Any = None
    wanted: bool = True
    measured: bool = False
    per_hop: bool = False
    seen: Callable[[Any], Any] = lambda payload: payload
    votes: Callable[[], int] = lambda: 0
    kept: list[Any] = field(default_factory=list)
