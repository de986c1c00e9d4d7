"""How tests start processes: the checkout's root, the launchers, and the environment of what they launch.

Only the root is on the path of those processes. Were `tests` on it as well, `tests/ring` could be taken for `ring`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
MPIRUN = Path(sys.executable).parent / "mpirun"
TORCHRUN = Path(sys.executable).parent / "torchrun"

#: What the fixture `mpirun` is.
Launch = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(**other: str) -> dict[str, str]:
    """This process's, with the checkout's packages, warnings as errors, and one thread a process.

    Args:
        other: variables that are added, or replace those.
    """
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"} | other
