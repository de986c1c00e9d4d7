"""Run by tests, alone or by mpirun: a command's `main` with one list of arguments after another, in the same processes.

    python -m tests.support.in_turn package.module '[["--out", "x"], []]'

Rank 0 prints a line of JSON for each list: {"status", "stdout", "stderr": what each rank returned and said, "files":
all below the working directory afterwards}. To start a process and to import PyTorch takes longer than most of what a
command refuses. That the status and the line reach the shell is for tests that start the command itself.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

from bench.common.launch import launched


def call(main: Any, arguments: list[str]) -> tuple[int, str, str]:
    """(status, stdout, stderr) of this process."""
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        sys.argv[1:] = arguments
        try:
            status = main()
        except SystemExit as leaving:
            status = leaving.code
    return status, out.getvalue(), errors.getvalue()


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*"))


if __name__ == "__main__":
    module, cases = sys.argv[1], json.loads(sys.argv[2])
    main = importlib.import_module(module).main
    comm = None
    if launched():
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
    for case in cases:
        said = [call(main, case)]
        if comm is not None:
            said = comm.allgather(said[0])
        if comm is None or comm.rank == 0:
            statuses, outs, errors = zip(*said, strict=True)
            print(json.dumps({"status": statuses, "stdout": outs, "stderr": errors, "files": files()}), flush=True)
