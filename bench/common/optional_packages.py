"""What to install where a package is missing that only some commands need.

Commands import such packages where it suits them; one that is missing ends the command with one line that names the
extra. Nothing here imports NumPy: how many threads that may have has to be told before.
"""

from __future__ import annotations

import sys
from types import TracebackType

#: The package as it is imported, and the extra of pyproject.toml that has it.
EXTRAS = {
    "matplotlib": "figures",
    "mpi4py": "mpich",
    "PIL": "experiments",
    "sklearn": "experiments",
    "threadpoolctl": "experiments",
}
#: How mpi4py's error begins where it finds no MPI.
NO_LIBRARY = "cannot load MPI library"


def what_is_missing(error: BaseException | None) -> str | None:
    """One line for an error that the import of an optional package has raised, None for any other."""
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            return f"{package} is needed and not installed: pip install 'gradiveq[{EXTRAS[package]}]'"
    if isinstance(error, RuntimeError) and str(error).startswith(NO_LIBRARY):
        return "an MPI library is needed and mpi4py finds none: pip install 'gradiveq[mpich]' brings one"
    return None


def say_what_is_missing() -> None:
    """Show an error of a missing package that nobody catches as one line on stderr, from now on."""
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if (text := what_is_missing(error)) is None:
            before(kind, error, trace)
        else:
            print(f"error: {text}", file=sys.stderr, flush=True)

    sys.excepthook = hook
