"""What each rank of a job runs: cases one after another. Rank 0 writes the results as JSON.

mpirun -n 3 python -m tests.golden.ranks OUT SEED mpi NAMES         NAMES: a JSON list
torchrun ... -m tests.golden.ranks OUT SEED hook NAMES
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from . import inputs
from .cases import PROBED, hook, lockstep


def over_mpi(names: list[str]) -> dict[str, Any]:
    from mpi4py import MPI

    from ring.abort import end_together
    from ring.mpi import MPIRing

    from .on_ring import joined, work

    end_together()
    comm, cases, found = MPI.COMM_WORLD, lockstep(), {}
    for name in names:
        try:  # an error that isn't every rank's ends the job
            found[name] = joined(comm.allgather(work(MPIRing(comm, timeout_s=60), cases[name])), name)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    return found


def in_ddp(names: list[str]) -> dict[str, Any]:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from .in_hook import hook_case, probe_case

    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    cases, size = hook(), dist.get_world_size()
    found = {}
    for name in names:
        title = f"{name}, {size} ranks"
        try:  # an error that isn't every rank's ends the job
            found[title] = probe_case(PROBED) if name == "probe" else hook_case(name, cases[name])
        except Exception:
            found[title] = {"error": traceback.format_exc()}
    dist.barrier()
    return found


def main() -> None:
    out, seed, driver, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
    inputs.SEED = seed
    found = (over_mpi if driver == "mpi" else in_ddp)(names)
    if driver == "mpi":
        from mpi4py import MPI

        first = MPI.COMM_WORLD.rank == 0
    else:
        first = os.environ["RANK"] == "0"
    if first:
        out.write_text(json.dumps(found))
    if driver == "hook":
        import torch.distributed as dist

        dist.destroy_process_group()


if __name__ == "__main__":
    main()
