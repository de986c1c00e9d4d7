"""The ring all-reduce, written once and free of input and output.

Each of the N workers holds a vector; all want the sum. The vector is cut into N segments, and every worker talks to
its successor only (rank + 1, modulo N). Reduce-scatter: in each step a worker receives one segment, adds its own and
passes the sum on; after N - 1 steps every worker holds one finished segment. All-gather: the finished segments go
around once more. Which segment leaves which worker in which step, for N = 3 (s0 is segment 0, capital letters are
finished sums):

              reduce-scatter          all-gather
    step      0     1     2           2     3     4
    rank 0    s0    s2    S1          S1    S0    S2
    rank 1    s1    s0    S2          S2    S1    S0
    rank 2    s2    s1    S0          S0    S2    S1
              own   add   add, done   (send on)   last: kept, not sent

So in step i rank r works on segment (r - i) mod N throughout, and one loop over steps 0 … 2N - 2 is the whole
algorithm. Segments are cut into chunks, one message each, and a chunk is passed on as soon as it is ready: while one
is added, the next is on its way.

With a *linear* codec this is Algorithm 1 of Yu et al. (2018): payloads are added as they are, a worker encodes its own
chunk while the other one's arrives, and decodes a finished chunk while the next arrives; the last step only decodes.
With a *per-hop* codec it is their Fig. 2a: nothing can be encoded before the other's chunk is there, because what is
encoded is the sum. With the identity it is plain ring all-reduce. A worker decodes its own finished payload like
everybody else does, so that all end with the same bits.

Cost per rank: 2(N - 1) steps; where N divides it, 2(N - 1)/N of the payload's bytes are sent, the least any algorithm
that reduces on the way can send (Patarasu and Yuan, 2009); (N - 1)/N of the vector is added.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from ring.codec import Array, Codec, Hop, Payload
from ring.segments import Chunk


class Request(Protocol):
    """A message on its way. The method has mpi4py's name, so that mpi4py's requests serve as they are."""

    def Test(self) -> bool:
        """Whether the message is complete."""


class ChunkWork(NamedTuple):
    """One chunk in one step of one rank."""

    step: int
    segment: int
    chunk: Chunk
    hop: Hop


class Port(Protocol):
    """The algorithm's side of a driver: one link in, one link out, and a clock for what is computed.

    None of these blocks. Messages arrive in the order in which they were sent. A sent buffer must not be changed, and
    a posted one not be read, before its request is complete.
    """

    def receive(self, buffer: Payload, work: ChunkWork) -> Request:
        """Start receiving the predecessor's next message, which `work` needs, into `buffer`."""

    def send(self, buffer: Payload, work: ChunkWork) -> Request:
        """Start sending `buffer`, the result of `work`, to the successor."""

    def fetch(self, buffer: Payload, work: ChunkWork) -> Payload:
        """The memory with the message whose receive into `buffer` is complete: `buffer`, or the sender's own."""

    def compute(self, kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
        """Call `function(*args)`, a part of `work`, and account for it as `kind`."""


class Wait(NamedTuple):
    """A wait that the algorithm yields: it goes on when `request`, for `work`, is complete.

    `sending` says whether a message has to leave; otherwise one has to arrive.
    """

    request: Request
    work: ChunkWork
    sending: bool


def steps(operation: str, size: int) -> tuple[int, int]:
    """The first and the last step of the loop that an operation runs."""
    return {
        "all_reduce": (0, 2 * size - 2),
        "reduce_scatter": (0, size - 1),
        "all_gather": (size - 1, 2 * size - 2),
    }[operation]


def owned_segment(rank: int, size: int) -> int:
    """The segment that `rank` finishes in a reduce-scatter and contributes to an all-gather."""
    return (rank + 1) % size


def schedule(operation: str, segments: Sequence[Sequence[Chunk]], rank: int, size: int) -> list[ChunkWork]:
    """Work of `rank`, in order: in step i, the chunks of segment (rank - i) mod size."""
    first, last = steps(operation, size)
    return [
        ChunkWork(step, (rank - step) % size, chunk, Hop(rank, size, step))
        for step in range(first, last + 1)
        for chunk in segments[(rank - step) % size]
    ]


def ring(
    port: Port,
    codec: Codec,
    vector: Array,
    payload: Payload,
    inbox: Sequence[Payload],
    work: Sequence[ChunkWork],
    *,
    first: int,
    last: int,
    mean: bool,
    size: int,
) -> Generator[Wait, None, None]:
    """Run steps `first` to `last` on `vector`, in place, yielding whenever a message has to be waited for.

    Nothing is checked here: `ring.plan` does, and makes all of this.

    Args:
        port: the links to both neighbours, and what runs the codec's parts.
        codec: encodes, adds and decodes the chunks.
        vector: shape (length,), of any dtype that the codec takes. In the end it holds the sum or mean; after a
            reduce-scatter in this rank's own segment only.
        payload: the whole vector's payload, uint8, or with an in-place codec the vector's own memory.
        inbox: memory in which chunks of the reduce-scatter arrive: uint8, each row as long as the longest chunk. As
            many receives are posted ahead as it has rows.
        work: this rank's `schedule`.
        first, last: the operation's `steps`.
        mean: divide the finished segment by `size`.
        size: number of workers, N.
    Yields:
        The next wait. The driver resumes the algorithm when its request is complete.
    """
    next_receive = next((index for index, item in enumerate(work) if item.step > first), len(work))
    posted: deque[tuple[Payload, Request]] = deque()
    sent: dict[Chunk, tuple[Request, ChunkWork]] = {}

    coded = codec.staged or not codec.in_place
    for item in work:
        # Keep as many receives posted as there are rows in the inbox.
        while next_receive < len(work) and len(posted) < len(inbox):
            arriving = work[next_receive]
            if arriving.step < size:
                buffer = inbox[next_receive % len(inbox)][: arriving.chunk.num_bytes]
            else:
                # A finished payload goes where it stays. What the reduce-scatter sent from there has to have left.
                if first == 0:
                    if arriving.chunk not in sent:
                        break
                    request, sending = sent[arriving.chunk]
                    if not request.Test():
                        if posted:
                            break
                        yield Wait(request, sending, True)
                    del sent[arriving.chunk]
                buffer = payload[arriving.chunk.first_byte : arriving.chunk.last_byte]
            posted.append((buffer, port.receive(buffer, arriving)))
            next_receive += 1

        step, _, chunk, hop = item
        values = vector[chunk.start : chunk.stop]
        wire = payload[chunk.first_byte : chunk.last_byte]

        if coded and (step == first or (step < size and codec.linear)):
            port.compute("encode", item, codec.encode, values, chunk.start, wire, hop)
        if step > first:
            buffer, request = posted.popleft()
            if not request.Test():
                yield Wait(request, item, False)
            incoming = port.fetch(buffer, item)
            if step < size:
                kind = "add" if codec.linear else "recode"
                port.compute(kind, item, codec.reduce, incoming, values, chunk.start, wire, hop)
            elif incoming is not buffer:
                port.compute("add", item, np.copyto, buffer, incoming)
        if mean and codec.in_place and step == size - 1 and first == 0:
            port.compute("add", item, np.divide, values, size, values)
        if step < last:
            sent[chunk] = port.send(wire, item), item
        if coded and step >= size - 1:
            port.compute("decode", item, codec.decode, wire, chunk.start, values, size if first == 0 else 1)
            if mean and not codec.in_place:
                port.compute("decode", item, np.divide, values, size, values)

    for request, sending in sent.values():
        if not request.Test():
            yield Wait(request, sending, True)
