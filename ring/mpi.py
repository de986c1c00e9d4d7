"""The ring over MPI: non-blocking messages between neighbours, polled, with a deadline on every wait.

How a call starts. The first message of every call is a greeting: a header of fixed size that says what the sender
is about to do, and behind it, if it is small, the first chunk. No receive is posted for anything else before the
predecessor's greeting was compared with this rank's own, because a message longer than its buffer is an error that
MPI implementations handle badly. A rank that finds a disagreement knows who said what without an extra collective.

How bytes move. Between hosts, and for vectors of the caller's own, as MPI messages. A vector from `MPIRing.empty`
lies in memory that neighbours on the same host can read: then a message only says that a chunk is ready, and the
successor adds it from where it is. Nothing has to protect a chunk that was sent from being overwritten within the
call, because what overwrites it is the finished sum, which contains it; at the end of the call each rank tells its
predecessor that it will read no more.

How a rank waits. MPI moves large messages only inside MPI calls, and its own blocking waits spin, which is fatal with
more ranks than cores. So a wait tests, yields the core, tests again; after some milliseconds it sleeps in between. If a
neighbour is on another host it sleeps at once: a message takes longer than that, and a core that is left alone does the
kernel's part of sending. Sleeps are short against what was waited already, so that no link idles for long.

How a call fails. Whoever fails tells all others on a communicator of its own, which every waiting rank looks at; so
all raise `RingError` with the same story. An exception that nobody catches ends the whole job: `ring.abort`.
"""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from typing import Any, NoReturn, cast

import numpy as np
import numpy.typing as npt

from ring.abort import LAST_WORDS_S, check_launcher
from ring.algorithm import ChunkWork, Request, Wait
from ring.codec import Array, Codec, Payload
from ring.errors import RingError, RingMismatch, RingTimeout
from ring.handle import Ring
from ring.machine import usable_cores
from ring.plan import CHUNK_BYTES, CollectivePlan, Stats
from ring.timeline import Timeline, compute_unmeasured
from ring.world import MPI

#: Layout of the greeting. First comes its key: the call's number and a digest of what it does. Then come the shared
#: window in which the vector lies (-1 for none) and the place in it, 8 bytes each. From byte WORDS on it says in words
#: what the call does.
KEY_BYTES = 16
WORDS = 32
HEADER_BYTES = 512
#: Largest first chunk, or between two ranks largest vector, that travels in the greeting.
GREETING_BYTES = 64 * 1024
#: Smallest vector in shared memory that is read in place.
SHARED_BYTES = 128 * 1024
TAG, DONE_READING = 7, 8
NOTHING = np.empty(0, np.uint8)
#: Tests with which a wait begins: if each rank of the host has a core to itself, if not, and between hosts.
QUICK_POLLS, QUICK_POLLS_SHARING, QUICK_POLLS_BETWEEN_HOSTS = 300, 10, 30
#: Then, on one host, it yields the core between tests for so many seconds.
SPIN_S = 0.005
#: Afterwards it sleeps between tests: for a share of what it has waited already, within bounds in seconds.
SLEEP_SHARE, SHORTEST_SLEEP_S, LONGEST_SLEEP_S = 0.005, 20e-6, 0.001
#: Most greetings that are kept: plans come and go with the codecs.
MOST_GREETINGS = 16

yield_core: Callable[[], None] = getattr(os, "sched_yield", lambda: time.sleep(0))


class _Deferred:
    """A receive that is posted when the predecessor's greeting has been checked."""

    def __init__(self, buffer: Payload) -> None:
        self.buffer = buffer
        self.request: Request | None = None

    def Test(self) -> bool:
        return self.request is not None and self.request.Test()


class _Done:
    """A message that needs no waiting."""

    def Test(self) -> bool:
        return True


DONE = _Done()


class _Greeting:
    """This rank's first message in every call of one plan: its memory, and persistent requests that send it."""

    def __init__(
        self, comm: MPI.Intracomm, successor: int, plan: CollectivePlan, dtype: np.dtype[Any], heard: Payload
    ) -> None:
        first_sent = plan.sent[0].num_bytes if plan.sent else 0
        self.leaves_with_chunk = 0 < first_sent <= GREETING_BYTES
        self.arrives_with_chunk = bool(plan.arriving) and 0 < plan.arriving[0].num_bytes <= GREETING_BYTES
        self.carries_vector = (
            comm.size == 2
            and plan.operation == "all_reduce"
            and plan.payload is None
            and not plan.staged
            and plan.num_bytes <= GREETING_BYTES
        )
        inline = plan.num_bytes if self.carries_vector else first_sent if self.leaves_with_chunk else 0
        self.memory = np.zeros(HEADER_BYTES + inline, np.uint8)
        self.numbers = self.memory[:WORDS].view(np.int64)
        self.numbers[1:2].view(np.uint8)[:] = np.frombuffer(
            hashlib.blake2b(plan.description.encode(), digest_size=8).digest(), np.uint8
        )
        words = np.frombuffer(plan.description.encode()[: HEADER_BYTES - WORDS], np.uint8)
        self.memory[WORDS : WORDS + len(words)] = words
        self.key = self.memory[:KEY_BYTES]
        self.chunk = self.memory[HEADER_BYTES:]
        if self.carries_vector:
            self.leaving: Array = self.chunk.view(dtype)
            self.arriving: Array = heard[HEADER_BYTES : HEADER_BYTES + plan.num_bytes].view(dtype)
            self.stats = Stats(plan.num_bytes, 1)
            self.adding = next((item for item in plan.work if item.step == 1), plan.greeting_work)
        self.with_chunk = comm.Send_init((self.memory, MPI.BYTE), successor, TAG)
        self.alone = comm.Send_init((self.memory[:HEADER_BYTES], MPI.BYTE), successor, TAG)
        self.request = self.alone

    def send(self, with_chunk: bool) -> None:
        self.request = self.with_chunk if with_chunk else self.alone
        self.request.Start()

    def free(self) -> None:
        self.with_chunk.Free()
        self.alone.Free()


class _Port:
    """This rank's ends of both links in one call, between `MPIRing._execute` and the algorithm."""

    def __init__(self, owner: MPIRing, greeting: _Greeting, shared: bool, timeline: Timeline | None) -> None:
        self._owner, self._greeting, self.shared = owner, greeting, shared
        self.compute = compute_unmeasured if timeline is None else timeline.compute
        self._kept = timeline if timeline is not None and timeline.keep else None
        self.leaves_with_greeting = greeting.leaves_with_chunk and not shared
        self._arrives_with_greeting = greeting.arrives_with_chunk
        self._deferred: list[_Deferred] = []
        self.greeted = False
        self.readable: Payload | None = None

    def greet(self) -> None:
        """Start what had to wait for the predecessor's greeting, which is here and was checked."""
        self.greeted = True
        window, offset = self._owner.heard_numbers[2:]
        if window >= 0:
            self.readable = self._owner.windows[window].predecessors[offset:]
        for receive in self._deferred:
            receive.request = self._receive(receive.buffer)

    def receive(self, buffer: Payload, work: ChunkWork) -> Request:
        return self._receive(buffer)

    def _receive(self, buffer: Payload) -> Request:
        if not self.greeted:
            self._deferred.append(_Deferred(buffer))
            return self._deferred[-1]
        if self.readable is not None:
            return self._owner.comm.Irecv((NOTHING, MPI.BYTE), self._owner.predecessor, TAG)
        if self._arrives_with_greeting:
            self._arrives_with_greeting = False
            buffer[:] = self._owner.heard[HEADER_BYTES : HEADER_BYTES + len(buffer)]
            return DONE
        return self._owner.comm.Irecv((buffer, MPI.BYTE), self._owner.predecessor, TAG)

    def fetch(self, buffer: Payload, work: ChunkWork) -> Payload:
        if self._kept is not None:
            self._kept.mark_received(work)
        return buffer if self.readable is None else self.readable[work.chunk.first_byte : work.chunk.last_byte]

    def send(self, buffer: Payload, work: ChunkWork) -> Request:
        if self._kept is not None:
            self._kept.mark_sent(work)
        if self.leaves_with_greeting:
            self.leaves_with_greeting = False
            self._greeting.chunk[:] = buffer
            self._greeting.send(with_chunk=True)
            return DONE
        message = NOTHING if self.shared else buffer
        return self._owner.comm.Isend((message, MPI.BYTE), self._owner.successor, TAG)


def _ranks_in(comm: MPI.Intracomm, ranks: Sequence[int], other: MPI.Intracomm) -> Sequence[int]:
    """Numbers in `other` of ranks of `comm`; MPI.UNDEFINED for those that are not in it."""
    return comm.Get_group().Translate_ranks(ranks, other.Get_group())


class _Window:
    """Memory for a vector on each rank, which the rank's neighbours on the same host can read."""

    def __init__(self, comm: MPI.Intracomm, host: MPI.Intracomm, before: int, after: int, num_bytes: int) -> None:
        before_here, after_here = _ranks_in(comm, [before, after], host)
        window = MPI.Win.Allocate_shared(num_bytes, 1, comm=host)
        self.own: Payload = np.asarray(window.Shared_query(host.rank)[0])
        self.address = self.own.ctypes.data
        self.read_by_successor = after_here != MPI.UNDEFINED
        self.predecessors: Payload = NOTHING
        if before_here != MPI.UNDEFINED:
            self.predecessors = np.asarray(window.Shared_query(before_here)[0])


def _free_requests(listening: MPI.Prequest, greetings: dict[str, _Greeting]) -> None:
    if not MPI.Is_finalized():
        listening.Free()
        for greeting in greetings.values():
            greeting.free()


def gpu_support() -> bool | None:
    """Whether MPI says that it takes pointers to a CUDA device's memory; None if it doesn't say.

    MPICH and Open MPI have `MPIX_Query_cuda_support` for it. Others say it in the environment at best (Cray MPICH:
    MPICH_GPU_SUPPORT_ENABLED=1, MVAPICH2: MV2_USE_CUDA=1).
    """
    for name in ("MPICH_GPU_SUPPORT_ENABLED", "MV2_USE_CUDA"):
        if name in os.environ:
            return os.environ[name] == "1"
    try:
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support  # found in the MPI that the module is linked with
    except (OSError, AttributeError):
        return None
    return bool(query())


class MPIRing(Ring):
    """This process's place in a ring of all ranks of a communicator.

    Args:
        comm: the ranks, in ring order; `MPI.COMM_WORLD` by default. It is duplicated; creation is collective.
        chunk_bytes: bytes of payload in one message.
        timeout_s: seconds that a neighbour may do nothing before a wait gives up.
    Raises:
        ValueError: a number is out of its range.
        RingError: the job was started by another MPI's `mpirun`, so that every process is alone.
    """

    def __init__(
        self, comm: MPI.Intracomm | None = None, *, chunk_bytes: int = CHUNK_BYTES, timeout_s: float = 300.0
    ) -> None:
        if not 0 < timeout_s < math.inf:
            raise ValueError(f"`timeout_s` must be a positive number of seconds, got {timeout_s}")
        comm = MPI.COMM_WORLD if comm is None else comm
        check_launcher(comm)
        super().__init__(comm.rank, comm.size, chunk_bytes)
        self.comm, self._alarm = comm.Dup(), comm.Dup()
        self.timeout_s = timeout_s
        self.successor, self.predecessor = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        self._calls = 0
        self._failure: RingError | None = None
        self._greetings: dict[str, _Greeting] = {}
        self.windows: list[_Window] = []
        self._neighbours = cast(MPI.Intracomm, self.comm.Split_type(MPI.COMM_TYPE_SHARED))
        self._quick_polls, self._spin_s = QUICK_POLLS_SHARING, SPIN_S
        if self._neighbours.size <= usable_cores(self._neighbours):
            self._quick_polls = QUICK_POLLS
        if MPI.UNDEFINED in _ranks_in(self.comm, [self.predecessor, self.successor], self._neighbours):
            self._quick_polls, self._spin_s = QUICK_POLLS_BETWEEN_HOSTS, 0.0
        self.heard = np.zeros(HEADER_BYTES + GREETING_BYTES, np.uint8)
        self._heard_key = self.heard[:KEY_BYTES]
        self.heard_numbers = self.heard[:WORDS].view(np.int64)
        self._listening = self.comm.Recv_init((self.heard, MPI.BYTE), self.predecessor, TAG)
        weakref.finalize(self, _free_requests, self._listening, self._greetings)

    def empty(self, length: int, dtype: npt.DTypeLike = np.float32) -> Array:
        """Make a vector, uninitialised, that neighbours on the same host read in place. Collective.

        Its memory is kept until the process ends, so allocate once and use it again. MPI takes it from where the system
        keeps shared memory (on Linux /dev/shm, of which a container may have little).

        Returns, raises: as in the base class.
        """
        dtype = np.dtype(dtype)
        if self.size == 1 or length <= 0:
            return np.empty(length, dtype)
        self.windows.append(
            _Window(self.comm, self._neighbours, self.predecessor, self.successor, length * dtype.itemsize)
        )
        vector: Array = self.windows[-1].own.view(dtype)
        return vector

    def all_reduce_directly(self, buffer: Any, *, timeline: Timeline | None = None) -> Stats:
        """Sum a float32 buffer over all ranks, in place, by MPI's own all-reduce.

        Args:
            buffer: contiguous, of the same length on all ranks, and anything that mpi4py takes: what has DLPack or the
                CUDA array interface may be in a GPU's memory, if MPI is GPU-aware (`gpu_support`). All that is to
                write or read it has to be done.
            timeline: gets "wait".
        Returns:
            The bytes that a ring would send; what MPI sends is its own business.
        Blocks without a deadline: Open MPI, for one, has non-blocking reductions for host memory only. A rank that dies
        takes the job with it (`ring.abort`).
        """
        start_s = 0.0 if timeline is None else timeline.clock()
        self.comm.Allreduce(MPI.IN_PLACE, buffer)
        if timeline is not None:
            timeline.record("wait", start_s, timeline.clock())
        num_bytes = 2 * (self.size - 1) * buffer.nbytes // self.size
        return Stats(num_bytes, int(self.size > 1))

    def _place(self, plan: CollectivePlan, vector: Array) -> tuple[int, int]:
        """The window that the successor can read `vector` in, and where in it; (-1, 0) if there is none."""
        if self.windows and plan.payload is None and plan.num_bytes >= SHARED_BYTES:
            address = vector.ctypes.data
            for index, window in enumerate(self.windows):
                if window.address <= address < window.address + len(window.own) and window.read_by_successor:
                    return index, address - window.address
        return -1, 0

    def _execute(self, plan: CollectivePlan, codec: Codec, vector: Array, timeline: Timeline | None) -> Stats:
        if self._failure is not None:
            raise self._failure
        greeting = self._greetings.get(plan.description)
        if greeting is None:
            if len(self._greetings) >= MOST_GREETINGS:
                self._greetings.pop(next(iter(self._greetings))).free()
            greeting = self._greetings[plan.description] = _Greeting(
                self.comm, self.successor, plan, vector.dtype, self.heard
            )
        self._calls += 1
        greeting.numbers[0] = self._calls
        self._listening.Start()
        if greeting.carries_vector:
            return self._exchange(greeting, plan, vector, timeline)
        window, _ = greeting.numbers[2:] = self._place(plan, vector)
        port = _Port(self, greeting, window >= 0, timeline)
        if not port.leaves_with_greeting:
            greeting.send(with_chunk=False)
        for wait in self._waits(plan, port, greeting, codec, vector):
            if not port.greeted:
                self._hear_greeting(greeting, plan, timeline)
                port.greet()
            self._complete(wait, plan, timeline)
        return plan.stats

    def _waits(
        self, plan: CollectivePlan, port: _Port, greeting: _Greeting, codec: Codec, vector: Array
    ) -> Generator[Wait, None, None]:
        """The waits of the algorithm, and behind them those before which the call must not return."""
        yield from plan.start(port, codec, vector, self.size)
        yield Wait(greeting.request, plan.greeting_work, True)
        last = plan.work[-1] if plan.work else plan.greeting_work
        if port.readable is not None:
            yield Wait(self.comm.Isend((NOTHING, MPI.BYTE), self.predecessor, DONE_READING), last, False)
        if port.shared:
            yield Wait(self.comm.Irecv((NOTHING, MPI.BYTE), self.successor, DONE_READING), last, True)

    def _exchange(self, greeting: _Greeting, plan: CollectivePlan, vector: Array, timeline: Timeline | None) -> Stats:
        """Sum a small vector between two ranks: each sends all of it, and both rounds of the ring become one step.

        The bytes are the same, half the latency is saved, and as a + b = b + a, so are the sums.
        """
        greeting.leaving[:] = vector
        greeting.send(with_chunk=True)
        self._hear_greeting(greeting, plan, timeline)
        compute = compute_unmeasured if timeline is None else timeline.compute
        # The same operands in the same order on both: which of two NaNs a sum becomes depends on it.
        terms = (greeting.leaving, greeting.arriving) if self.rank == 0 else (greeting.arriving, greeting.leaving)
        compute("add", greeting.adding, np.add, *terms, vector)
        if plan.mean:
            compute("add", greeting.adding, np.divide, vector, 2, vector)
        if not greeting.request.Test():
            self._complete(Wait(greeting.request, plan.greeting_work, True), plan, timeline)
        return greeting.stats

    def _hear_greeting(self, greeting: _Greeting, plan: CollectivePlan, timeline: Timeline | None) -> None:
        self._complete(Wait(self._listening, plan.greeting_work, False), plan, timeline)
        if self._heard_key.tobytes() != greeting.key.tobytes():
            theirs, ours = (
                f"{bytes(memory[WORDS:HEADER_BYTES]).rstrip(bytes(1)).decode(errors='replace')} "
                f"as collective number {memory[:8].view(np.int64)[0]}"
                for memory in (self.heard, greeting.memory)
            )
            self._fail(RingMismatch(f"rank {self.predecessor} calls {theirs}; rank {self.rank} calls {ours}"))

    def _complete(self, wait: Wait, plan: CollectivePlan, timeline: Timeline | None) -> None:
        """Wait until the request is complete."""
        start_s = 0.0 if timeline is None else timeline.clock()
        test = wait.request.Test
        for _ in range(self._quick_polls):
            if test():
                break
        else:
            self._wait(wait, plan)
        if timeline is not None:
            timeline.record("wait", start_s, timeline.clock(), wait.work)

    def _wait(self, wait: Wait, plan: CollectivePlan) -> None:
        """Poll until the request is complete, somebody fails, or the deadline passes."""
        start = now = time.perf_counter()
        test, polls = wait.request.Test, 0
        while not test():
            polls += 1
            if polls % 64 and now - start < self._spin_s:
                yield_core()
                continue
            now = time.perf_counter()
            if self._alarm.Iprobe():
                self._hear_alarm(wait, plan)
            if now - start > self.timeout_s:
                self._fail(RingTimeout(f"{self._where(wait, plan)} and gave up after {self.timeout_s:g} s"))
            if now - start >= self._spin_s:
                time.sleep(min(max(SHORTEST_SLEEP_S, SLEEP_SHARE * (now - start)), LONGEST_SLEEP_S))

    def _where(self, wait: Wait, plan: CollectivePlan) -> str:
        peer = f"to send to rank {self.successor}" if wait.sending else f"for rank {self.predecessor}"
        return (
            f"rank {self.rank} waited {peer} in step {wait.work.step} (segment {wait.work.segment}) "
            f"of {plan.operation}, collective number {self._calls},"
        )

    def _fail(self, error: RingError) -> NoReturn:
        """Tell every other rank, then raise."""
        self._failure = error
        text = f"{type(error).__name__}: {error}".encode()
        messages = [self._alarm.Isend((text, MPI.BYTE), peer) for peer in range(self.size) if peer != self.rank]
        deadline = time.monotonic() + LAST_WORDS_S
        while not MPI.Request.Testall(messages) and time.monotonic() < deadline:
            time.sleep(0.001)
        raise error

    def _hear_alarm(self, wait: Wait, plan: CollectivePlan) -> NoReturn:
        status = MPI.Status()
        self._alarm.Probe(status=status)
        text = bytearray(status.Get_count(MPI.BYTE))
        self._alarm.Recv((text, MPI.BYTE), status.source)
        kind, _, story = text.decode().partition(": ")
        known = {"RingMismatch": RingMismatch, "RingTimeout": RingTimeout}.get(kind, RingError)
        self._failure = known(f"{story} ({self._where(wait, plan)} when it heard of this)")
        raise self._failure
