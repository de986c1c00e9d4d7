"""Which machine numbers were measured on."""

from __future__ import annotations

import math
import os
import platform
from pathlib import Path

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
    """So many cores' time this process and those beside it in its control group may use; infinite if not limited."""
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


def usable_cores() -> int:
    """How many cores this process may keep busy."""
    return max(1, int(min(len(cores_allowed()), core_quota())))
