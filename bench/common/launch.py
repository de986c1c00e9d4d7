"""How a job begins and ends, whether its workers are MPI's processes or threads of this one: threads, errors, signals.

Nothing here imports NumPy: how many threads that may have has to be told before.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from bench.common.workers import Failure, Meeting, Processes, Threads

if TYPE_CHECKING:
    from ring.lockstep import LockstepRing

#: Exit status of a run that somebody stopped: 128 + SIGINT, as shells have it.
INTERRUPTED = 130
#: What launchers of MPI tell the processes that they start.
LAUNCHED = ("PMI_RANK", "PMI_SIZE", "PMIX_RANK", "PMIX_SIZE", "OMPI_COMM_WORLD_SIZE", "MPI_LOCALNRANKS")


def launched() -> bool:
    """Whether this process is one that `mpirun` or the like started, or one of several that `srun` did."""
    return any(name in os.environ for name in LAUNCHED) or os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"


def thread_variables(threads: int) -> dict[str, str]:
    """What tells OpenMP, the BLAS libraries and Numba how many threads they may have."""
    libraries = ("OMP_NUM", "OPENBLAS_NUM", "MKL_NUM", "VECLIB_MAXIMUM", "NUMBA_NUM")
    return {f"{library}_THREADS": str(threads) for library in libraries}


def limit_threads(threads: int) -> None:
    """Limit the threads of libraries that are imported from now on."""
    os.environ.update(thread_variables(threads))


def for_ranks(threads: int) -> dict[str, str]:
    """Variables of processes that this one starts: their threads, and where they find these packages."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return thread_variables(threads) | {"PYTHONPATH": os.pathsep.join(path for path in paths if path)}


class StopRequest:
    """Whether a signal asked this process to stop. One of this process's main thread.

    Within `with`, a signal asks, and a second one, a second later, ends the process at once. Outside of it there is
    nothing to save: SIGINT is a KeyboardInterrupt in the main thread, SIGTERM ends the process.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.since: float | None = None
        self._waited_for = False
        for number in self.SIGNALS:
            signal.signal(number, self._handle)

    def __enter__(self) -> StopRequest:
        self._waited_for = True
        return self

    def __exit__(self, *_: object) -> None:
        self._waited_for = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._waited_for and self.since is None:
            self.since = now
            return
        if self._waited_for and self.since is not None and now - self.since < 1:
            return  # a terminal and a launcher may both pass on one Ctrl-C
        if number == signal.SIGINT and not self._waited_for:
            signal.default_int_handler(number, frame)
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    def __call__(self) -> bool:
        return self.since is not None


def run_together(main: Callable[[Processes, StopRequest], int]) -> int:
    """Call `main` on every rank of MPI and return its exit status; what goes wrong on one rank ends all of them.

    A Failure, which all ranks have, is one line from rank 0. Any other exception that gets here may be this rank's
    alone, and the others may be waiting for it: it ends the job.
    """
    from mpi4py import MPI

    stop, workers = StopRequest(), Processes(MPI.COMM_WORLD)
    try:
        return main(workers, stop)
    except Failure as failure:
        return _say(failure) if workers.lead else failure.status
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        if workers.lead:
            print("interrupted", file=sys.stderr, flush=True)
        workers.abort(INTERRUPTED)
    except SystemExit as leaving:
        if not leaving.code:  # --help
            raise
        if not isinstance(leaving.code, int):
            print(leaving.code, file=sys.stderr, flush=True)
        workers.abort(leaving.code if isinstance(leaving.code, int) else 1)
    except Exception as error:
        # That of `ring.abort.end_together`, once it is installed: it can't be before the threads are limited, as
        # importing it imports NumPy.
        sys.excepthook(type(error), error, error.__traceback__)
        workers.abort(1)


def run_as_threads(
    main: Callable[[Threads, LockstepRing, StopRequest], int], size: int, *, timeout_s: float, chunk_bytes: int
) -> int:
    """Call `main` in a thread for each worker and return its exit status; what goes wrong in one of them ends all.

    The main thread only waits, so that it is there when a signal comes. MPI is not needed.
    """
    from ring import lockstep
    from ring.errors import RingError

    stop, meeting = StopRequest(), Meeting(size)

    def work(ring: LockstepRing) -> int:
        try:
            return main(Threads(meeting, ring.rank), ring, stop)
        except Failure:  # all have it, or will; some may still be on their way out of the last meeting
            raise
        except BaseException:
            meeting.barrier.abort()
            raise

    try:
        return lockstep.run(size, work, timeout_s=timeout_s, chunk_bytes=chunk_bytes)[0]
    except Failure as failure:
        return _say(failure)
    except RingError as error:
        print(f"error: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:  # before or after training, when there is nothing to save
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED)  # the threads still work


def _say(failure: Failure) -> int:
    print(f"{'' if failure.status == INTERRUPTED else 'error: '}{failure}", file=sys.stderr, flush=True)
    return failure.status
