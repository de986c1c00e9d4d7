"""The ranks of `bench.ddp`: started by torchrun on this machine, or each on a shaped host, and waited for."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import IO, Any

from bench.common.launch import for_ranks
from bench.hooks.runs import RunsPlan
from bench.shaped.hosts import Hosts

#: The port on which rank 0 listens on a shaped host.
PORT = 29_600


class RanksError(RuntimeError):
    """The ranks of a job have failed; one line."""


def by_torchrun(plan: RunsPlan, options: argparse.Namespace) -> None:
    """Start the ranks on this machine, and wait for them.

    Raises:
        RanksError: one of them failed.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.nproc)]
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as said:
        file = Path(folder) / "plan.json"
        plan.write(file)
        command = [*torchrun, "-m", "bench.hooks.runs", str(file)]
        _wait_for([subprocess.Popen(command, stderr=said, env=os.environ | for_ranks(options.threads))], [said])


def on_hosts(plan: RunsPlan, options: argparse.Namespace, hosts: Hosts) -> None:
    """Start each rank on a host of its own, and wait for them. Raises as `by_torchrun`."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        file = Path(folder) / "plan.json"
        plan.write(file)
        variables = os.environ | for_ranks(options.threads)
        said = [files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(options.nproc)]
        processes = []
        for rank, errors in enumerate(said):
            address = {
                "RANK": str(rank),
                "WORLD_SIZE": str(options.nproc),
                "LOCAL_RANK": "0",
                "MASTER_ADDR": hosts.addresses[0],
                "MASTER_PORT": str(PORT),
                # What Gloo would otherwise find out by looking up the host's name, which all hosts share.
                "GLOO_SOCKET_IFNAME": "eth0",
            }
            command = [sys.executable, "-m", "bench.hooks.runs", str(file)]
            processes.append(hosts.popen(rank, command, stderr=errors, env=variables | address))
        _wait_for(processes, said)


def _wait_for(processes: Sequence[subprocess.Popen[Any]], said: Sequence[IO[str]]) -> None:
    """Wait until all processes have ended, or one has failed, whereupon the others are ended.

    Args:
        said: what they wrote to their standard errors.
    """
    try:
        while any(process.poll() is None for process in processes):
            if any(process.returncode for process in processes):
                break
            time.sleep(0.05)
    finally:
        for process in processes:
            if process.poll() is None:
                process.terminate()  # torchrun ends its workers
        for process in processes:
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    if any(process.returncode for process in processes):
        lines = []
        for file in said:
            file.seek(0)
            lines += file.read().splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        said_last = [line for line in lines if line.strip()][-1:]
        raise RanksError((errors or said_last or ["the ranks ended"])[0].removeprefix("error: "))


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """SIGTERM is an exception while this lasts, so that ranks are ended too."""
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)
