"""The commands that bench/LAUNCH.md calls tried, between two hosts, as they stand there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.shaped.hosts import MPI_OVER_TCP, Hosts, why_not
from tests.support.printed import LAUNCH, README, ROOT, block, losses, section

pytestmark = pytest.mark.slow

REFUSED = why_not()
DEADLINE_S = 90


def commands(listing: str) -> dict[str, str]:
    """By the address of the host that the listing names before them."""
    _, *parts = re.split(r"(?m)^# on (\S+)\n", listing)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.skipif(REFUSED is not None, reason=f"no hosts here: {REFUSED}")
@pytest.mark.parametrize("heading", ["## torchrun", "### MPICH"])
def test_a_job_on_two_hosts(tmp_path: Path, heading: str) -> None:
    for name, where in (("train_ddp.py", "## In PyTorch"), ("train_mpi.py", "## Over MPI")):
        (tmp_path / name).write_text(block(section(README, where), "python"))
    tried, *_ = re.findall(r"```sh\n(.*?)```", section(LAUNCH, heading), re.DOTALL)
    with Hosts(2, rate_mbps=1000) as hosts:
        (tmp_path / "ssh").symlink_to(hosts.remote_shell)
        path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = os.environ | MPI_OVER_TCP | {"PATH": path, "PYTHONPATH": str(ROOT)}
        jobs = [
            hosts.popen(
                hosts.addresses.index(address),
                ["sh", "-ec", command],
                cwd=tmp_path,
                env=environment,
                text=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            for address, command in commands(tried).items()
        ]
        said = [job.communicate(timeout=DEADLINE_S) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * len(jobs), said
    found = losses(said[0][0])
    assert found[-1] < found[0] / 3, said
    assert "compress" in said[0][0]
