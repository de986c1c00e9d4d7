"""A real cluster on one Linux machine: hosts are network namespaces, links are as slow as they are told to be.

                       the switch: a namespace with a bridge in it
        +------------------------------------------------------------------+
        |   br0 10.77.0.254        port0        port1   …    port5         |
        +----------------------------|------------|------------|-----------+
                                     | veth       | veth       | veth       both ends: tc tbf
                                +----|----+  +----|----+  +----|----+
                                |  eth0   |  |  eth0   |  |  eth0   |
                                |10.77.0.1|  |10.77.0.2|  |10.77.0.6|
                                |  host 0 |  |  host 1 |  |  host 5 |
                                +---------+  +---------+  +---------+

    with Hosts(6, rate_mbps=100) as hosts:
        done = hosts.mpirun([sys.executable, "-m", "ring.bench"], timeout_s=60)   # one rank per host
        hosts.reshape(rate_mbps=1000)
        hosts.popen(0, ["nc", "-l", "7000"])                                      # any process on any host

Nothing of it can be seen from outside: the bridge too is in a namespace, with every launcher. So two runs never
collide (they may use the same addresses), no firewall of the machine takes part, and to remove all of it is to end the
processes in the namespaces and delete those. That happens on leaving the `with`, also by an exception, SIGINT or
SIGTERM. What SIGKILL leaves behind is removed by the next `Hosts` of anybody: names say which process made them.

What is shaped: the rate of both ends of each link, so that senders *and* receivers are limited as by a switch's port.
What is not: latency (the kernel of the machine at hand may have no netem), which is that of a few process switches;
loss (the queue of each port holds `queue_ms` and drops beyond that); and the cores, which all hosts share. The rate
counts Ethernet's 14 and IP and TCP's 52 bytes of each 1,514: a TCP stream gets at most 0.9564 of it.

The burst. A token bucket (`tc tbf`) lets `burst_bytes` pass at full speed after a pause: who measures has to empty it
first, by something that isn't timed. It should be small, then; but the kernel hands packets to it in bundles of up to
64 KiB, and a bundle that the bucket can't hold is taken apart, which costs ten times the processor time (10 instead of
0.8 ms for each MB of a stream, and then 1 Gbit/s is not reached). So the bucket is what the rate carries in a
millisecond, which is also what the timer that fills it may be late, and bundles are half of that: 125,000 and 62,500
bytes at 1 Gbit/s, 12,500 and 6,250 at 100 Mbit/s.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

#: Namespaces are called PREFIX-(pid of the owner)-(when that process began)-(number of the set)-(host0 …, switch).
PREFIX = "gvqhosts"
NAMED = re.compile(rf"{PREFIX}-(\d+)-(\d+)-")
FOLDER = Path(tempfile.gettempdir())
MOST_HOSTS = 6
SUBNET = "10.77.0"
SWITCH_ADDRESS = f"{SUBNET}.254"
BURST_MS = 1.0
LEAST_BURST_BYTES = 2 * 1514
#: The most that the kernel hands over at once.
MOST_BUNDLE_BYTES = 65_536
#: Signals that end a process without unwinding it, unless they are made an exception.
DEADLY = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
#: How long processes that were killed may take to go.
GONE_S = 10.0

#: How MPICH has to be told to talk over the network between hosts that have the same name and the same memory.
MPI_OVER_TCP = {
    "MPIR_CVAR_NOLOCAL": "1",
    "UCX_TLS": "tcp,self",
    "UCX_NET_DEVICES": "eth0",
}


class HostsError(RuntimeError):
    """A command that builds or shapes the hosts has failed."""


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise HostsError(f"`{shlex.join(command)}` can't be run: {error}") from None
    if done.returncode:
        raise HostsError(f"`{shlex.join(command)}` failed: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _began(pid: int) -> int | None:
    """When a process began, in clock ticks after boot; None if there is none. A pid is used again, the pair is not."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, IndexError):
        return None


def _namespaces() -> list[str]:
    names = (line.split()[0] for line in _run("ip", "netns", "list").splitlines() if line.strip())
    return [name for name in names if NAMED.match(name)]


def _kill_all(namespaces: Sequence[str]) -> None:
    """End every process in these namespaces. Raises HostsError if one stays."""
    deadline = time.monotonic() + GONE_S
    while True:
        pids = [int(pid) for name in namespaces for pid in _run("ip", "netns", "pids", name).split()]
        if not pids:
            return
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        # Those that this process has started stay, as zombies, in no namespace.
        if time.monotonic() > deadline:
            raise HostsError(f"processes {pids} in {', '.join(namespaces)} did not go within {GONE_S:g} s of SIGKILL")
        time.sleep(0.01)


def _remove(namespaces: Sequence[str]) -> None:
    try:
        _kill_all(namespaces)
    finally:
        for name in namespaces:
            _run("ip", "netns", "delete", name)


def _is_left(name: str) -> bool:
    named = NAMED.match(name)
    return named is not None and _began(int(named[1])) != int(named[2])


def remove_leftovers() -> list[str]:
    """Remove what owners that are gone have left: namespaces, the processes in them, launchers. Returns the names."""
    for folder in FOLDER.glob(f"{PREFIX}-*"):
        if _is_left(folder.name):
            shutil.rmtree(folder, ignore_errors=True)
    left = [name for name in _namespaces() if _is_left(name)]
    try:
        _remove(left)
    except HostsError:
        # Somebody else may be doing the same.
        if set(left) & set(_namespaces()):
            raise
    return left


def why_not() -> str | None:
    """Why hosts can't be built here, in words; None if they can. Tries, within about 50 ms."""
    if platform.system() != "Linux":
        return f"network namespaces need Linux, this is {platform.system()}"
    for program in ("ip", "tc"):
        if shutil.which(program) is None:
            return f"there is no `{program}` (package iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{PREFIX}-{os.getpid()}-{_began(os.getpid())}-{time.monotonic_ns()}-probe"
    try:
        _run("ip", "netns", "add", name)
        try:
            _run("ip", "-n", name, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", name, "link", "add", "port0", "type", "veth", "peer", "name", "eth0")
            _run(*_shaping(name, "port0", 100.0, 16384, 100.0))
        finally:
            _run("ip", "netns", "delete", name)
    except HostsError as error:
        return f"this machine refuses: {error}"
    return None


def _shaping(namespace: str, device: str, rate_mbps: float, burst_bytes: int, queue_ms: float) -> tuple[str, ...]:
    # tc's bit, kbit and mbit are powers of ten; `burst` in bytes; `latency` is the time that the queue may hold.
    return (
        "tc",
        "-n",
        namespace,
        "qdisc",
        "replace",
        "dev",
        device,
        "root",
        "tbf",
        "rate",
        f"{round(rate_mbps * 1e6)}bit",
        "burst",
        f"{burst_bytes}b",
        "latency",
        f"{queue_ms:g}ms",
    )


def _burst(rate_mbps: float, burst_bytes: int | None) -> int:
    """The bucket's size, once both arguments are known to be within bounds."""
    if not 1 <= rate_mbps <= 100_000:
        raise ValueError(f"`rate_mbps` must be 1 to 100,000 (10^6 bit/s), got {rate_mbps}")
    if burst_bytes is None:
        return max(LEAST_BURST_BYTES, round(rate_mbps * 1e6 / 8 * BURST_MS / 1e3))
    if not LEAST_BURST_BYTES <= burst_bytes <= 2**30:
        raise ValueError(f"`burst_bytes` must be {LEAST_BURST_BYTES:,} (two packets) to 2^30, got {burst_bytes}")
    return burst_bytes


class Hosts:
    """`number` hosts on one switch, for as long as the `with` lasts.

    Args:
        number: 2 to 6.
        rate_mbps: rate of each link, in each direction, in 10^6 bit/s.
        burst_bytes: of the token bucket; by default what the rate carries in BURST_MS, at least LEAST_BURST_BYTES.
        queue_ms: how much traffic each port's queue holds, in time at its rate.
        congestion_control: congestion control of TCP, on every host.
    Raises:
        ValueError: an argument is out of its bounds.
        HostsError: the machine refuses; `why_not` says so beforehand.

    Attributes:
        addresses: the addresses of the hosts.
        remote_shell: a program that stands for ssh: it is called with options, an address, and words for a shell there.
    """

    _serial = 0

    def __init__(
        self,
        number: int,
        rate_mbps: float,
        *,
        burst_bytes: int | None = None,
        queue_ms: float = 100.0,
        congestion_control: str = "cubic",
    ) -> None:
        if not 2 <= number <= MOST_HOSTS:
            raise ValueError(f"`number` of hosts must be 2 to {MOST_HOSTS}, got {number}")
        self.number, self.queue_ms, self.congestion_control = number, queue_ms, congestion_control
        self.rate_mbps, self.burst_bytes = rate_mbps, _burst(rate_mbps, burst_bytes)
        if not 1 <= queue_ms <= 10_000:
            raise ValueError(f"`queue_ms` must be 1 to 10,000 ms, got {queue_ms}")
        if not re.fullmatch(r"[a-z0-9_]+", congestion_control):
            raise ValueError(f"`congestion_control` must be a name like 'cubic', got {congestion_control!r}")
        self.addresses = tuple(f"{SUBNET}.{host + 1}" for host in range(number))
        Hosts._serial += 1
        name = f"{PREFIX}-{os.getpid()}-{_began(os.getpid())}-{Hosts._serial}"
        self._switch = f"{name}-switch"
        self._names = tuple(f"{name}-host{host}" for host in range(number))
        self._before: dict[int, Any] = {}
        self._folder = FOLDER / name

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, _leave) for number in DEADLY}
        try:
            remove_leftovers()
            self._build()
        except BaseException:
            self._tear_down()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tear_down()

    def _build(self) -> None:
        self._folder.mkdir(mode=0o700)
        cases = "\n".join(
            f"  {address}) name={name};;" for address, name in zip(self.addresses, self._names, strict=True)
        )
        self.remote_shell = self._folder / "on-host"
        self.remote_shell.write_text(
            f'#!/bin/sh\nwhile [ "${{1#-}}" != "$1" ]; do shift; done\ncase "$1" in\n{cases}\n'
            '  *) echo "there is no host $1" >&2; exit 255;;\nesac\nshift\n'
            'exec ip netns exec "$name" sh -c "$*"\n'
        )
        self.remote_shell.chmod(0o700)
        for name in (self._switch, *self._names):
            _run("ip", "netns", "add", name)
            _run("ip", "-n", name, "link", "set", "lo", "up")
        _run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", self._switch, "address", "add", f"{SWITCH_ADDRESS}/24", "dev", "br0")
        _run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for host, (name, address) in enumerate(zip(self._names, self.addresses, strict=True)):
            port = f"port{host}"
            _run("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _run("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "-n", name, "link", "set", "eth0", "up")
            # A route may ask for what the namespace may not have as its default, where the machine hasn't allowed it.
            network = f"{SUBNET}.0/24"
            _run(
                "ip",
                "-n",
                name,
                "route",
                "replace",
                network,
                "dev",
                "eth0",
                "src",
                address,
                "congctl",
                "lock",
                self.congestion_control,
            )
        self.reshape(self.rate_mbps, self.burst_bytes)

    def reshape(self, rate_mbps: float, burst_bytes: int | None = None) -> None:
        """Change the rate of all links, at once. Connections stay, but keep the size of bundles that they began with.

        Raises:
            ValueError: out of bounds; HostsError: tc refuses.
        """
        burst_bytes = _burst(rate_mbps, burst_bytes)
        for host, name in enumerate(self._names):
            _run("ip", "-n", name, "link", "set", "eth0", "gso_max_size", str(min(burst_bytes // 2, MOST_BUNDLE_BYTES)))
            _run(*_shaping(name, "eth0", rate_mbps, burst_bytes, self.queue_ms))
            _run(*_shaping(self._switch, f"port{host}", rate_mbps, burst_bytes, self.queue_ms))
        self.rate_mbps, self.burst_bytes = rate_mbps, burst_bytes

    def describe(self) -> dict[str, Any]:
        """What a record of a measurement should say about the hosts."""
        return {
            "hosts": self.number,
            "rate_mbps": self.rate_mbps,
            "qdisc": _run("tc", "-n", self._names[0], "qdisc", "show", "dev", "eth0").strip(),
            "burst_bytes": self.burst_bytes,
            "bundle_bytes": min(self.burst_bytes // 2, MOST_BUNDLE_BYTES),
            "queue_ms": self.queue_ms,
            "congestion_control": self.congestion_control,
            "mtu": 1500,
            "kernel": platform.release(),
            "mpi_environment": MPI_OVER_TCP,
        }

    def popen(self, host: int, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        """Start a process on a host, in a process group of its own; ended with the hosts at the latest.

        Args:
            options: as for subprocess.Popen.
        """
        if not 0 <= host < self.number:
            raise ValueError(f"`host` must be 0 to {self.number - 1}, got {host}")
        return subprocess.Popen(["ip", "netns", "exec", self._names[host], *command], start_new_session=True, **options)

    def mpirun(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        ranks: int | None = None,
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run an MPI job with one rank per host, rank r on host r; needs MPICH's `mpirun`, beside `python` or on PATH.

        Args:
            ranks: on the first so many hosts; all by default.
            environment: added to this process's and to what makes MPI use the network.
        Raises:
            subprocess.TimeoutExpired: with what was said until then; every process on these hosts is ended.
            HostsError: there is no such `mpirun`.
        """
        ranks = self.number if ranks is None else ranks
        if not 1 <= ranks <= self.number:
            raise ValueError(f"`ranks` must be 1 to {self.number}, one per host, got {ranks}")
        arguments = [
            find_mpirun(),
            "-launcher",
            "ssh",
            "-launcher-exec",
            str(self.remote_shell),
            "-localhost",
            SWITCH_ADDRESS,
            "-hosts",
            ",".join(self.addresses[:ranks]),
            "-ppn",
            "1",
            "-n",
            str(ranks),
            *command,
        ]
        job = subprocess.Popen(
            ["ip", "netns", "exec", self._switch, *arguments],
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env=os.environ | MPI_OVER_TCP | dict(environment or {}),
        )
        try:
            out, err = job.communicate(timeout=timeout_s)
        except BaseException as error:
            # Ranks are in process groups of their own, and a launcher that is killed can't end them.
            os.killpg(job.pid, signal.SIGKILL)
            _kill_all(self._names[:ranks])
            out, err = job.communicate()
            if isinstance(error, subprocess.TimeoutExpired):
                raise subprocess.TimeoutExpired(arguments, timeout_s, out, err) from None
            raise
        return subprocess.CompletedProcess(arguments, job.returncode, out, err)

    def _tear_down(self) -> None:
        """Remove what there is. Signals wait until it is done."""
        signals = (signal.SIGINT, *DEADLY)
        held = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            here = set(_namespaces())
            _remove([name for name in (*self._names, self._switch) if name in here])
            shutil.rmtree(self._folder, ignore_errors=True)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def find_mpirun() -> str:
    """MPICH's `mpirun`: the one beside this Python or else the first on PATH."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.is_file() else shutil.which("mpirun")
    if found is None:
        raise HostsError(f"there is no `mpirun`, neither beside {sys.executable} nor on PATH")
    if "HYDRA" not in _run(found, "-info"):
        raise HostsError(f"{found} is not MPICH's, whose launcher can be told how to reach a host")
    return found
