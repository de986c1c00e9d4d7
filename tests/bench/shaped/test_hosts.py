"""Hosts as network namespaces: they are as slow as told, and nothing of them stays."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from bench.shaped import hosts as module
from bench.shaped.hosts import Hosts, HostsError, find_mpirun, remove_leftovers, why_not
from tests.support.processes import ROOT

pytestmark = pytest.mark.slow

REFUSED = why_not()
here = pytest.mark.skipif(REFUSED is not None, reason=f"no hosts here: {REFUSED}")

#: What one TCP stream of full packets carries of the rate: 1,448 of 1,514 bytes (with time stamps).
TCP_SHARE = 1448 / 1514
SINK = """
    import socket, time
    connection, _ = socket.create_server(("", 7000)).accept()
    received, memory, seen = 0, bytearray(1 << 20), []
    while count := connection.recv_into(memory):
        received += count
        seen.append((time.perf_counter(), received))
    # The first quarter fills buffers and empties the bucket.
    first, last = next(s for s in seen if s[1] > received / 4), seen[-1]
    print((last[1] - first[1]) * 8e-6 / (last[0] - first[0]))
"""
SOURCE = """
    import socket, sys, time
    for _ in range(200):
        try:
            connection = socket.create_connection((sys.argv[1], 7000))
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    connection.sendall(bytes(int(sys.argv[2])))
"""


def names() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines() if line}


def of_this_process() -> set[str]:
    return {name for name in names() if name.startswith(f"{module.PREFIX}-{os.getpid()}-")}


def stream_mbps(hosts: Hosts, num_bytes: int) -> float:
    """What one TCP stream carries from the first host to the last."""
    last = hosts.number - 1
    code = [textwrap.dedent(program) for program in (SINK, SOURCE)]
    with (
        hosts.popen(last, [sys.executable, "-c", code[0]], stdout=subprocess.PIPE, text=True) as sink,
        hosts.popen(0, [sys.executable, "-c", code[1], hosts.addresses[last], str(num_bytes)]) as source,
    ):
        said, _ = sink.communicate(timeout=60)
        assert source.wait(10) == 0
    return float(said)


@here
def test_a_stream_gets_what_the_rate_leaves_it_and_rates_change() -> None:
    with Hosts(3, rate_mbps=100) as hosts:
        for rate_mbps, burst_bytes in ((100, None), (300, None), (40, 20_000)):
            hosts.reshape(rate_mbps, burst_bytes)
            assert hosts.burst_bytes == (burst_bytes or rate_mbps * 125)
            fraction = stream_mbps(hosts, rate_mbps * 60_000) / (rate_mbps * TCP_SHARE)
            assert 0.95 < fraction < 1.02, (rate_mbps, fraction)
        said = hosts.describe()
        assert said["qdisc"].startswith("qdisc tbf")
        assert "rate 40Mbit" in said["qdisc"]
        assert (said["hosts"], said["rate_mbps"], said["congestion_control"]) == (3, 40, "cubic")


@here
def test_one_rank_per_host_over_the_network() -> None:
    program = """
        import socket, subprocess, sys
        from mpi4py import MPI
        comm = MPI.COMM_WORLD
        address = subprocess.run(["ip", "-br", "address", "show", "eth0"], capture_output=True, text=True).stdout
        counted = lambda: int(open("/sys/class/net/eth0/statistics/tx_bytes").read())
        before = counted()
        if comm.rank == 0:
            comm.Send(bytearray(1_000_000), 1)
        if comm.rank == 1:
            comm.Recv(bytearray(1_000_000), 0)
        comm.Barrier()
        assert counted() - before > (1_000_000 if comm.rank == 0 else 0)
        lines = comm.gather(f"rank {comm.rank} of {comm.size} on {address.split()[2]} {sys.argv[1:]}")
        if comm.rank == 0:
            print(*lines, sep=chr(10))
    """
    with Hosts(3, rate_mbps=1000) as hosts:
        for ranks in (3, 2):
            command = [sys.executable, "-c", textwrap.dedent(program), "two words", "$HOME", "it's"]
            done = hosts.mpirun(command, timeout_s=60, ranks=ranks)
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.splitlines() == [
                f"rank {rank} of {ranks} on 10.77.0.{rank + 1}/24 ['two words', '$HOME', \"it's\"]"
                for rank in range(ranks)
            ]
        failed = hosts.mpirun([sys.executable, "-c", "raise SystemExit(3)"], timeout_s=60)
        assert failed.returncode == 3


@here
def test_a_job_that_takes_too_long_is_ended_with_what_it_said() -> None:
    program = "import time; print('started', flush=True); time.sleep(600)"
    with Hosts(2, rate_mbps=1000) as hosts:
        with pytest.raises(subprocess.TimeoutExpired) as caught:
            hosts.mpirun([sys.executable, "-c", program], timeout_s=3)
        assert caught.value.stdout.count("started") == 2
        for name in of_this_process():
            pids = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
            assert pids.stdout == ""


@here
def test_nothing_stays_after_an_exception_and_two_sets_do_not_meet() -> None:
    handlers = [signal.getsignal(number) for number in module.DEADLY]
    processes = []
    with contextlib.suppress(ZeroDivisionError), Hosts(2, rate_mbps=100) as one, Hosts(2, rate_mbps=100) as other:
        processes = [hosts.popen(1, ["sleep", "600"]) for hosts in (one, other)]
        assert len(of_this_process()) == 6
        assert one.addresses == other.addresses
        raise ZeroDivisionError
    assert of_this_process() == set()
    assert [process.wait(10) for process in processes] == [-signal.SIGKILL] * 2
    assert [signal.getsignal(number) for number in module.DEADLY] == handlers
    assert not list(module.FOLDER.glob(f"{module.PREFIX}-{os.getpid()}-*"))


@here
def test_nothing_stays_after_building_failed() -> None:
    with (
        pytest.raises(HostsError, match="Unknown tcp congestion algorithm"),
        Hosts(2, rate_mbps=100, congestion_control="nosuch"),
    ):
        pytest.fail("there is no such congestion control")
    assert of_this_process() == set()


OWNER = """
    import signal, sys, time
    from bench.shaped.hosts import Hosts
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where tests run in the background
    with Hosts(2, rate_mbps=100) as hosts:
        hosts.popen(0, ["sleep", "600"])
        print("built", flush=True)
        if sys.argv[1] == "mpirun":
            hosts.mpirun([sys.executable, "-c", "import time; time.sleep(600)"], timeout_s=600)
        time.sleep(600)
"""


@here
@pytest.mark.parametrize("doing", ["sleeping", "mpirun"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays_after_a_signal(number: signal.Signals, doing: str) -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(OWNER), doing],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "built\n"
        time.sleep(0.5 if doing == "mpirun" else 0)
        left = {name for name in names() if name.startswith(f"{module.PREFIX}-{owner.pid}-")}
        assert len(left) == 3
        owner.send_signal(number)
        try:
            status = owner.wait(30)
        finally:
            owner.kill()
    if number == signal.SIGKILL:
        assert left <= names()
        assert list(module.FOLDER.glob(f"{module.PREFIX}-{owner.pid}-*"))
        remove_leftovers()
    else:
        assert status in (128 + number, -number)
    assert not left & names()
    assert not list(module.FOLDER.glob(f"{module.PREFIX}-{owner.pid}-*"))


@here
def test_what_a_living_owner_has_stays() -> None:
    with Hosts(2, rate_mbps=100):
        before = of_this_process()
        assert not before & set(remove_leftovers())
        assert of_this_process() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"number": 1}, "`number` of hosts must be 2 to 6, got 1"),
        ({"number": 7}, "`number` of hosts must be 2 to 6, got 7"),
        ({"rate_mbps": 0}, r"`rate_mbps` must be 1 to 100,000 \(10\^6 bit/s\), got 0"),
        ({"rate_mbps": float("nan")}, "`rate_mbps` must be .* got nan"),
        ({"burst_bytes": 1500}, "`burst_bytes` must be 3,028 .* got 1500"),
        ({"queue_ms": 0}, "`queue_ms` must be 1 to 10,000 ms, got 0"),
        ({"congestion_control": "cubic; reboot"}, "`congestion_control` must be a name"),
    ],
)
def test_bad_arguments(arguments: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Hosts(**({"number": 2, "rate_mbps": 100} | arguments))


@here
def test_bad_arguments_of_what_hosts_do() -> None:
    with Hosts(2, rate_mbps=100) as hosts:
        with pytest.raises(ValueError, match="`host` must be 0 to 1, got 2"):
            hosts.popen(2, ["true"])
        with pytest.raises(ValueError, match="`ranks` must be 1 to 2, one per host, got 3"):
            hosts.mpirun(["true"], timeout_s=1, ranks=3)
        with pytest.raises(ValueError, match="`rate_mbps` must be"):
            hosts.reshape(-1)


def test_why_not_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.platform, "system", lambda: "Darwin")
    assert why_not() == "network namespaces need Linux, this is Darwin"
    monkeypatch.setattr(module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(module.shutil, "which", lambda program: None)
    assert why_not() == "there is no `ip` (package iproute2)"
    monkeypatch.setattr(module.shutil, "which", lambda program: program)
    monkeypatch.setattr(module.os, "geteuid", lambda: 1000)
    assert why_not() == "network namespaces need root"


def test_mpirun_of_another_mpi_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = tmp_path / "mpirun"
    other.write_text("#!/bin/sh\necho Open MPI\n")
    other.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(HostsError, match="is not MPICH's"):
        find_mpirun()
    other.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostsError, match="there is no `mpirun`"):
        find_mpirun()
