"""What all tests share: which are slow, and `mpirun`, which runs a piece of Python on several ranks.

Without a GPU, Triton's kernels run in its interpreter, on CPU tensors; that has to be said before they are imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.register_assert_rewrite("tests.support")  # before anything of it is imported

from tests.support.processes import MPIRUN, Launch, environment  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # each worker has a core; more threads would wait for each other's


#: Fixtures that start processes, each of which imports PyTorch.
STARTING_PROCESSES = {"installed", "mpirun"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts processes as slow, and puts files with slow tests first, so that no worker has one at the end.

    Whole files are marked by a `pytestmark` of their own.
    """
    for item in items:
        if STARTING_PROCESSES & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture
def mpirun(tmp_path: Path) -> Launch:
    """mpirun(ranks, "code" or ["-m", "module", …], timeout_s=…) -> CompletedProcess with text output."""

    def launch(ranks: int, program: str | list[str], timeout_s: float = 60.0, **variables: str):
        if isinstance(program, str):
            script = tmp_path / "program.py"
            script.write_text(textwrap.dedent(program))
            program = [str(script)]
        return subprocess.run(
            [str(MPIRUN), "-n", str(ranks), sys.executable, *program],
            env=environment(**variables),
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    return launch
