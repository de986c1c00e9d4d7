"""Runs a piece of Python on several ranks, with a deadline of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MPIRUN = Path(sys.executable).parent / "mpirun"

Launch = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def mpirun(tmp_path: Path) -> Launch:
    """mpirun(ranks, "code" or ["-m", "module", …], timeout_s=…) -> CompletedProcess with text output."""

    def launch(ranks: int, program: str | list[str], timeout_s: float = 60.0, **environment: str):
        if isinstance(program, str):
            script = tmp_path / "program.py"
            script.write_text(textwrap.dedent(program))
            program = [str(script)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        return subprocess.run(
            [str(MPIRUN), "-n", str(ranks), sys.executable, *program],
            env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"} | environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return launch
