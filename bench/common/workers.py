"""What the workers of a job tell each other beside gradients: values, and what went wrong, so that all leave together.

Workers are MPI's processes or threads of one process; `Workers` is all that a job needs to know of either. Nothing here
imports NumPy: how many threads that may have has to be told before.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from ring.machine import usable_cores

if TYPE_CHECKING:
    from mpi4py import MPI

#: How long workers wait for one that does work which all do, and for one that downloads, draws, or writes for all.
SHORT_S, LONG_S = 300.0, 3600.0


class Failure(Exception):
    """The run can't begin or go on. All workers know, so all leave, and one line says why."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class Workers(ABC):
    """All workers of a job, as one of them sees them.

    Attributes:
        rank, size: as in MPI.
        lead: whether this is rank 0, which reads, writes and speaks for all.
        local_rank, local_size: the same among the workers of this machine.
        cores: how many the workers of this machine may keep busy together.
        one_process: whether they are threads.
        mpi: the library that brings processes together.
        command: what comes before `python` to start them.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cores: int
    one_process = False
    mpi: str | None = None
    command = ""

    @property
    def lead(self) -> bool:
        return self.rank == 0

    @abstractmethod
    def gather(self, value: Any, timeout_s: float = SHORT_S) -> list[Any]:
        """Every worker's value, by rank. Collective; for small things, as it may pickle them.

        Args:
            timeout_s: how long to wait for the other workers before the job is ended.
        """

    def agree(self, error: str | None, timeout_s: float = SHORT_S) -> None:
        """Go on only if no worker has an error; raises Failure on all of them with the first one's. Collective."""
        errors = self.gather(error, timeout_s)
        ranks = [rank for rank, text in enumerate(errors) if text is not None]
        if ranks:
            text = errors[ranks[0]]
            raise Failure(text if len(set(errors)) == 1 else f"{text} (on rank {', '.join(map(str, ranks))})")

    def attempt(
        self,
        action: Callable[[], Any],
        *known: type[Exception],
        here: bool = True,
        timeout_s: float = SHORT_S,
    ) -> Any:
        """What `action` returns on this worker; if it raises one of `known` on any, Failure on all. Collective.

        Args:
            here: whether to call it on this worker.
            timeout_s: as for `gather`.
        """
        error, value = None, None
        try:
            if here:
                value = action()
        except known as caught:
            error = " ".join(str(caught).split())
        self.agree(error, timeout_s)
        return value


class Processes(Workers):
    """The processes of an MPI communicator."""

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.mpi = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        self.command = f"mpirun -n {self.size} " if self.size > 1 else ""
        node = comm.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = node.rank, node.size
        self.cores = usable_cores(node)
        node.Free()

    def gather(self, value: Any, timeout_s: float = SHORT_S) -> list[Any]:
        # MPI's own collectives spin while they wait, which would slow down the rank that is waited for; so a barrier
        # that sleeps comes first.
        arrived = self.comm.Ibarrier()
        deadline = time.monotonic() + timeout_s
        while not arrived.Test():
            if time.monotonic() > deadline:
                print(f"error: rank {self.rank} waited {timeout_s:g} s for another rank", file=sys.stderr, flush=True)
                self.abort(1)
            time.sleep(0.002)
        return self.comm.allgather(value)

    def abort(self, status: int) -> NoReturn:
        """End all ranks, after a moment in which the launcher passes on what this one has said."""
        sys.stderr.flush()
        time.sleep(0.5)
        self.comm.Abort(status)
        sys.exit(status)


class Meeting:
    """A place where workers that are threads tell each other values. `barrier.abort()` sends everybody home."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.values: list[Any] = [None] * size
        self.said: list[Any] = []
        # The last to come copies for all; nobody can come again before everybody has left with that copy.
        self.barrier = threading.Barrier(size, action=self._copy)

    def _copy(self) -> None:
        self.said = list(self.values)


class Threads(Workers):
    """The threads of one process."""

    one_process = True

    def __init__(self, meeting: Meeting, rank: int) -> None:
        self._meeting = meeting
        self.rank = self.local_rank = rank
        self.size = self.local_size = meeting.size
        self.cores = usable_cores()

    def gather(self, value: Any, timeout_s: float = SHORT_S) -> list[Any]:
        deadline = time.monotonic() + timeout_s
        self._meeting.values[self.rank] = value
        try:
            self._meeting.barrier.wait(timeout_s)
        except threading.BrokenBarrierError:
            if time.monotonic() < deadline:  # another one has failed, and says why
                raise
            raise Failure(f"rank {self.rank} waited {timeout_s:g} s for another rank", 1) from None
        return self._meeting.said
