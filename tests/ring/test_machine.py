"""How many cores processes have together."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ring.machine import cores_allowed, cores_together
from tests.support.processes import ROOT, Launch


@pytest.mark.parametrize(
    ("limits", "cores"),
    [
        ([({0, 1}, float("inf"))] * 2, 2),
        ([({0}, float("inf")), ({5}, float("inf"))], 2),  # as Open MPI binds two ranks
        ([({0, 1}, 8.0), ({1, 2, 3}, 2.5)], 2),
        ([({0, 1}, 0.5)], 1),
    ],
)
def test_cores_of_processes_together(limits: list[tuple[set[int], float]], cores: int) -> None:
    assert cores_together(limits) == cores


@pytest.mark.skipif(len(cores_allowed()) < 2, reason="needs two cores")
def test_ranks_that_are_bound_to_a_core_each(mpirun: Launch) -> None:
    """All find both cores, and a wait in the ring tests as often as where nobody is bound."""
    cores = sorted(cores_allowed())[:2]
    done = mpirun(
        2,
        f"""
        import os
        import sys
        from mpi4py import MPI
        comm = MPI.COMM_WORLD
        os.sched_setaffinity(0, {{{cores}[comm.rank]}})
        from bench.common.workers import Processes
        workers = Processes(comm)
        assert "numpy" not in sys.modules
        from ring.machine import core_quota
        from ring.mpi import QUICK_POLLS, MPIRing
        if core_quota() >= 2:
            assert workers.cores == 2
            assert MPIRing(comm)._quick_polls == QUICK_POLLS
        else:
            assert workers.cores == 1
        """,
    )
    assert done.returncode == 0, done.stderr


def test_cores_are_counted_without_numpy() -> None:
    """Importing it fixes how many threads its libraries start, which is to follow from the cores."""
    program = (
        "import sys, bench.common.launch, ring.machine; ring.machine.usable_cores(); "
        "assert 'numpy' not in sys.modules; "
        "from ring import Codec, Region, Ring, RingTimeout, Stats, Timeline"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=dict(os.environ), capture_output=True)
    assert done.returncode == 0, done.stderr
