"""What the ranks of a job do together before and around the work: threads, errors that all leave with, signals.

Nothing here imports NumPy: how many threads that may have has to be told before.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpi4py import MPI


#: Exit status of a run that somebody stopped: 128 + SIGINT, as shells have it.
INTERRUPTED = 130
#: How long ranks wait for one that does work which all do, and for one that downloads, draws, or writes for all.
SHORT_S, LONG_S = 300.0, 3600.0


class Failure(Exception):
    """The run can't begin or go on. All ranks know, so all leave, and rank 0 says why in one line."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


def run_together(main: Callable[[MPI.Intracomm], int]) -> int:
    """Call `main` on every rank and return its exit status; what goes wrong on one rank ends all of them.

    A Failure, which all ranks have, is one line from rank 0. Any other exception that gets here may be this rank's
    alone, and the others may be waiting for it: it ends the job.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    try:
        return main(comm)
    except Failure as failure:
        if comm.rank == 0:
            print(f"{'' if failure.status == INTERRUPTED else 'error: '}{failure}", file=sys.stderr, flush=True)
        return failure.status
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        if comm.rank == 0:
            print("interrupted", file=sys.stderr, flush=True)
        abort(comm, INTERRUPTED)
    except SystemExit as leaving:
        if not leaving.code:  # --help
            raise
        if not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr, flush=True)
        abort(comm, leaving.code if isinstance(leaving.code, int) else 1)
    except Exception as error:
        # That of `ring.abort.end_together`, once it is installed: it can't be before the threads are limited, as
        # importing it imports NumPy.
        sys.excepthook(type(error), error, error.__traceback__)
        abort(comm, 1)
    return 1


def abort(comm: MPI.Intracomm, status: int) -> None:
    """End all ranks, after a moment in which the launcher passes on what this one has said."""
    sys.stderr.flush()
    time.sleep(0.5)
    comm.Abort(status)


def agree(comm: MPI.Intracomm, error: str | None, timeout_s: float = SHORT_S) -> None:
    """Go on only if no rank has an error; raises Failure on all ranks with the first one's. Collective.

    MPI's own collectives spin while they wait, which would slow down the rank that is waited for; so a barrier that
    sleeps comes first.

    Args:
        timeout_s: how long to wait for the other ranks before the job is ended.
    """
    arrived = comm.Ibarrier()
    deadline = time.monotonic() + timeout_s
    while not arrived.Test():
        if time.monotonic() > deadline:
            print(f"error: rank {comm.rank} waited {timeout_s:g} s for another rank", file=sys.stderr, flush=True)
            abort(comm, 1)
        time.sleep(0.002)
    errors = comm.allgather(error)
    ranks = [rank for rank, text in enumerate(errors) if text is not None]
    if ranks:
        text = errors[ranks[0]]
        raise Failure(text if len(set(errors)) == 1 else f"{text} (on rank {', '.join(map(str, ranks))})")


def attempt(
    comm: MPI.Intracomm,
    action: Callable[[], Any],
    *known: type[Exception],
    here: bool = True,
    timeout_s: float = SHORT_S,
) -> Any:
    """What `action` returns on this rank; if it raises one of `known` on any rank, Failure on all. Collective.

    Args:
        here: whether to call it on this rank.
        timeout_s: as for `agree`.
    """
    error, value = None, None
    try:
        if here:
            value = action()
    except known as caught:
        error = " ".join(str(caught).split())
    agree(comm, error, timeout_s)
    return value


def local_ranks(comm: MPI.Intracomm) -> tuple[int, int, int]:
    """This rank's number among those of its machine, how many these are, and the cores that they may use."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    cores: set[int] = set().union(*node.allgather(own))
    result = node.rank, node.size, len(cores)
    node.Free()
    return result


def limit_threads(threads: int) -> None:
    """For what is imported from now on: OpenMP, the BLAS libraries, Numba."""
    for library in ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "VECLIB_MAXIMUM", "NUMBA_NUM"):
        os.environ[f"{library}_THREADS"] = str(threads)


class StopRequest:
    """Whether a signal asked this process to stop; a second one, a second later, ends it at once."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.since: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.since is None:
            self.since = now
        elif now - self.since > 1:  # a terminal and a launcher may both pass on one Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def __call__(self) -> bool:
        return self.since is not None
