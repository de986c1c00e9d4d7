"""The machine on which numbers are measured: its processor and its cores.

Nothing here imports NumPy: a job asks for its cores before it tells NumPy's libraries how many threads they may start.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpi4py import MPI

CGROUPS = Path("/sys/fs/cgroup")


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores_allowed() -> set[int]:
    """The numbers of the cores that this process may run on (`taskset`, a cpuset)."""
    return set(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def core_quota() -> float:
    """Number of cores whose time this process's control group may use; infinite if not limited."""
    quota = math.inf
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return quota
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        root = CGROUPS / "cpu" if controllers else CGROUPS
        # In a container the path may be the host's; what the container itself is limited to is then at the root.
        group = root / path.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(root))):
            try:
                if controllers:
                    allowed = (folder / "cpu.cfs_quota_us").read_text(), (folder / "cpu.cfs_period_us").read_text()
                else:
                    allowed = tuple((folder / "cpu.max").read_text().split())  # type: ignore[assignment]
                if int(allowed[0]) > 0:
                    quota = min(quota, int(allowed[0]) / int(allowed[1]))
            except (OSError, ValueError):  # no such limit: no file, or "max"
                continue
    return quota


def cores_together(limits: Sequence[tuple[set[int], float]]) -> int:
    """Number of cores that processes of one machine may keep busy together.

    Args:
        limits: `cores_allowed` and `core_quota` of each process. A quota may be one that they share, so it counts once.
    """
    allowed = set[int]().union(*(cores for cores, _ in limits))
    return max(1, int(min(len(allowed), *(quota for _, quota in limits))))


def usable_cores(host: MPI.Comm | None = None) -> int:
    """Number of cores that this process may keep busy.

    Args:
        host: a communicator of ranks on one machine, to count for all of them together, as a launcher may bind each to
            a core of its own; then collective.
    """
    limits = cores_allowed(), core_quota()
    return cores_together([limits] if host is None else host.allgather(limits))
