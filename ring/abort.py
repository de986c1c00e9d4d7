"""The end of a job in which something goes wrong: on all ranks, with a non-zero status, and with words."""

from __future__ import annotations

import os
import sys
import time
import traceback
from types import TracebackType

from ring.errors import RingError
from ring.world import MPI

#: Seconds that a failing rank goes on trying to tell the others, and lets them speak.
LAST_WORDS_S = 1.0

#: Environment variables in which MPI's launchers say how many processes they have started.
_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "PMIX_SIZE", "MPI_LOCALNRANKS")
#: The variable in which `srun` says it, whatever MPI the processes use. (An `mpirun` that starts its helpers by `srun`
#: sets one of the others too.)
_SLURM_SIZE = "SLURM_STEP_NUM_TASKS"


def check_launcher(comm: MPI.Intracomm) -> None:
    """Recognise a foreign `mpirun`, or an `srun` without the right PMI, whose N processes each believe to be alone.

    Raises:
        RingError: the launcher says that there are more processes than this MPI sees.
    """
    for variable in [name for name in _SIZES if name in os.environ] or [_SLURM_SIZE]:
        launched = os.environ.get(variable, "")
        if comm is MPI.COMM_WORLD and comm.size == 1 and launched.isdigit() and int(launched) > 1:
            library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
            raise RingError(
                f"the launcher started {launched} processes ({variable}={launched}), but mpi4py uses {library}, which "
                "sees only one: this `mpirun` belongs to another MPI, or this `srun` needs another --mpi. Use the one "
                f"installed with it, e.g. {os.path.join(os.path.dirname(sys.executable), 'mpirun')}"
            )


def end_together(comm: MPI.Intracomm | None = None) -> None:
    """Let an exception that nobody catches on this rank end the whole job with a non-zero status.

    Without it, a rank that dies of an exception leaves the others waiting. A `RingError` is printed as one line,
    because the ring has told its whole story; anything else with its traceback. Other ranks get a second to say
    what they know.
    """
    comm = MPI.COMM_WORLD if comm is None else comm

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, RingError):
            text = f"{kind.__name__}: {error}\n"
        else:
            text = "\n" + "".join(traceback.format_exception(kind, error, trace))
        sys.stderr.write(f"rank {comm.rank}: {text}")  # in one piece, as other ranks write there too
        sys.stderr.flush()
        time.sleep(LAST_WORDS_S)
        comm.Abort(1)

    sys.excepthook = hook
