"""What `bench.shaped_busbw` runs on every shaped host: all-reduces of several implementations, beside plain TCP.

    mpirun … python -m bench.shaped.busbw_ranks '{"part": "busbw", "addresses": [...], "rate_mbps": 1000, …}'

Rank 0 prints one line of JSON, a list of rows. Each repeat goes through all implementations, from another one on every
time, so that what disturbs the machine for a while hits none of them alone. Before each timed stretch an untimed call
of the same implementation empties the links' token buckets; what is timed begins on each rank as that call returns,
without a barrier in which they would fill again. A time is that of the slowest rank.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from mpi4py import MPI

from bench.shaped.codecs import METHODS
from ring.abort import end_together
from ring.bench import wrong
from ring.codec import Array
from ring.mpi import MPIRing
from ring.timeline import Timeline

GLOO_PORT = 29_600
#: Seconds that one measurement of a TCP stream lasts, and the bytes of each call that sends.
STREAM_S, SEND_BYTES = 0.15, 256 * 1024
#: An untimed call moves this many buckets through each link.
DRAINED_BUCKETS = 4
MOST_CALLS = 200
#: Messages there and back for the latency.
PINGS = 200


class TcpStreams:
    """Plain TCP from every host to the next."""

    def __init__(self, comm: MPI.Intracomm, addresses: Sequence[str]) -> None:
        self._comm = comm
        with socket.create_server(("", 0)) as server:
            ports = comm.allgather(server.getsockname()[1])
            after = (comm.rank + 1) % comm.size
            self._out = socket.create_connection((addresses[after], ports[after]))
            self._in, _ = server.accept()
        self._memory = bytearray(1 << 20)

    def measure(self, rate_mbps: float, burst_bytes: int, together: bool) -> float:
        """Bytes per second from host 0 to 1, or, `together`, of the slowest of all streams at once. Collective."""
        drain = DRAINED_BUCKETS * burst_bytes
        whole = drain + int(rate_mbps * 1e6 / 8 * STREAM_S)
        senders = range(self._comm.size) if together else range(1)
        self._comm.Barrier()
        sender = threading.Thread(target=self._send, args=(whole,))
        if self._comm.rank in senders:
            sender.start()
        speed = np.inf
        if (self._comm.rank - 1) % self._comm.size in senders:
            speed = self._receive(whole, drain)
        if self._comm.rank in senders:
            sender.join()
        return float(self._comm.allreduce(speed, MPI.MIN))

    def _send(self, num_bytes: int) -> None:
        piece = bytes(SEND_BYTES)
        for start in range(0, num_bytes, SEND_BYTES):
            self._out.sendall(piece[: min(SEND_BYTES, num_bytes - start)])

    def _receive(self, num_bytes: int, drain: int) -> float:
        """Bytes per second after the first `drain` bytes."""
        received, begin = 0, (0, 0.0)
        while received < num_bytes:
            received += self._in.recv_into(self._memory, min(len(self._memory), num_bytes - received))
            if not begin[0] and received >= drain:
                begin = received, time.perf_counter()
        return (received - begin[0]) / (time.perf_counter() - begin[1])


def timed(comm: MPI.Intracomm, drain: Callable[[], object], call: Callable[[], object], calls: int) -> list[float]:
    """[seconds, seconds of processor time] per call; the slowest rank's, and the mean over ranks."""
    drain()
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(calls):
        call()
    spent_s, spent_cpu_s = time.perf_counter() - start_s, time.process_time() - start_cpu_s
    return [comm.allreduce(spent_s, MPI.MAX) / calls, comm.allreduce(spent_cpu_s) / comm.size / calls]


def in_turn(names: Sequence[str], repeat: int) -> list[str]:
    """The names, from another one on in every repeat."""
    first = repeat % len(names)
    return [*names[first:], *names[:first]]


def latency_us(comm: MPI.Intracomm) -> float:
    """Half of a message of 8 bytes from rank 0 to 1 and back, by MPI's own blocking calls; the median."""
    message, samples = np.zeros(8, np.uint8), []
    for _ in range(PINGS):
        start_s = time.perf_counter()
        if comm.rank == 0:
            comm.Send([message, MPI.BYTE], 1)
            comm.Recv([message, MPI.BYTE], 1)
        elif comm.rank == 1:
            comm.Recv([message, MPI.BYTE], 0)
            comm.Send([message, MPI.BYTE], 0)
        samples.append((time.perf_counter() - start_s) / 2 * 1e6)
    return float(comm.bcast(statistics.median(samples)))


def busbw(comm: MPI.Intracomm, ring: MPIRing, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per size and implementation, and one of the links."""
    most = max(plan["sizes"])
    memory = {
        "ring": ring.empty(most, np.uint8),
        "ring, caller's memory": np.zeros(most, np.uint8),
        "MPI_Allreduce": np.zeros(most, np.uint8),
        "Gloo": np.zeros(most, np.uint8),
    }

    def gloo(values: Array) -> None:
        torch.distributed.all_reduce(torch.from_numpy(values))

    reducers: dict[str, Callable[[Array], object]] = {
        "ring": ring.all_reduce,
        "ring, caller's memory": ring.all_reduce,
        "MPI_Allreduce": lambda values: comm.Allreduce(MPI.IN_PLACE, values),
        "Gloo": gloo,
    }
    streams = TcpStreams(comm, plan["addresses"])
    single: list[float] = []
    together: list[float] = []
    share, drained = 2 * (comm.size - 1) / comm.size, DRAINED_BUCKETS * plan["burst_bytes"]
    rows: list[dict[str, Any]] = []
    for size_bytes in plan["sizes"]:
        vectors = {name: values[:size_bytes].view(np.float32) for name, values in memory.items()}
        errors = {name: wrong(comm, reducers[name], vector) for name, vector in vectors.items()}
        for vector in vectors.values():
            vector[:] = 0
        drains = {name: vector[: int(drained / share) // 4] for name, vector in vectors.items()}
        number, samples = {}, {name: [] for name in vectors}  # type: dict[str, int], dict[str, list[list[float]]]
        for name, vector in vectors.items():
            first_s, _ = timed(comm, comm.Barrier, lambda name=name, vector=vector: reducers[name](vector), 1)  # type: ignore[misc]
            number[name] = max(1, min(MOST_CALLS, int(plan["seconds"] / first_s)))
        for repeat in range(plan["repeats"]):
            single.append(streams.measure(plan["rate_mbps"], plan["burst_bytes"], together=False))
            together.append(streams.measure(plan["rate_mbps"], plan["burst_bytes"], together=True))
            for name in in_turn(list(vectors), repeat):
                reduce, vector, drain = reducers[name], vectors[name], drains[name]
                samples[name].append(
                    timed(
                        comm,
                        lambda reduce=reduce, drain=drain: [reduce(drain) for _ in range(1 + drained // drain.nbytes)],  # type: ignore[misc]
                        lambda reduce=reduce, vector=vector: reduce(vector),  # type: ignore[misc]
                        number[name],
                    )
                )
        for name, pairs in samples.items():
            times = [time_s for time_s, _ in pairs]
            rows.append(
                {
                    "implementation": name,
                    "size_bytes": size_bytes,
                    "calls": number[name],
                    "times_s": times,
                    "time_s": statistics.median(times),
                    "time_quartiles_s": np.percentile(times, (25, 75)).tolist(),
                    "busbw_bytes_per_s": share * size_bytes / statistics.median(times),
                    "cpu_s": statistics.median(cpu_s for _, cpu_s in pairs),
                    "wrong": errors[name],
                }
            )
    stream = statistics.median(single)
    for row in rows:
        row["fraction"] = row["busbw_bytes_per_s"] / stream
        row["fraction_quartiles"] = [
            share * row["size_bytes"] / time_s / stream for time_s in reversed(row["time_quartiles_s"])
        ]
    links = {
        "implementation": "TCP stream",
        "bytes_per_s": stream,
        "quartiles_bytes_per_s": np.percentile(single, (25, 75)).tolist(),
        "all_at_once_bytes_per_s": statistics.median(together),
        "latency_us": latency_us(comm),
    }
    return [links, *rows]


def aggregation(comm: MPI.Intracomm, ring: MPIRing, plan: dict[str, Any]) -> list[dict[str, Any]]:
    """One row per method: the whole gradient by each of them, with where the time went."""
    gradient = np.random.default_rng(comm.rank).standard_normal(plan["elements"], np.float32)
    vector = ring.empty(plan["elements"])
    codecs = {name: make(plan["elements"]) for name, make in METHODS.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in codecs}
    spans: dict[str, list[dict[str, float]]] = {name: [] for name in codecs}
    stats = {}
    for repeat in range(plan["repeats"] + 1):  # the first one is not counted: memory is touched for the first time
        for name in in_turn(list(codecs), repeat):
            vector[:] = gradient
            # Where the call before was the one that emptied the buckets: it moved megabytes.
            kept: list[Timeline] = [Timeline()]

            def run(name: str = name, kept: list[Timeline] = kept) -> None:
                stats[name] = ring.all_reduce(vector, codecs[name], timeline=kept[0])

            pair = timed(comm, lambda name=name: ring.all_reduce(vector, codecs[name]), run, plan["calls"][name])  # type: ignore[misc]
            if repeat:
                samples[name].append(pair)
                spans[name].append({kind: s / plan["calls"][name] for kind, s in kept[0].totals().items()})
    rows = []
    for name, pairs in samples.items():
        times = [time_s for time_s, _ in pairs]
        kinds = {kind: statistics.median(repeat.get(kind, 0.0) for repeat in spans[name]) for kind in spans[name][0]}
        every = comm.allgather(kinds)
        rows.append(
            {
                "method": name,
                "size_bytes": vector.nbytes,
                "bytes_sent": comm.allreduce(stats[name].bytes_sent) / comm.size,
                "messages": comm.allreduce(stats[name].messages) / comm.size,
                "calls": plan["calls"][name],
                "times_s": times,
                "time_s": statistics.median(times),
                "time_quartiles_s": np.percentile(times, (25, 75)).tolist(),
                "cpu_s": statistics.median(cpu_s for _, cpu_s in pairs),
                "spans_s": {kind: statistics.mean(spent[kind] for spent in every) for kind in kinds},
            }
        )
    return rows


def main() -> int:
    comm = MPI.COMM_WORLD
    end_together(comm)
    plan = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    ring = MPIRing(comm, timeout_s=plan["timeout_s"])
    if plan["part"] == "busbw":
        # What Gloo would otherwise find out by looking up the host's name, which all hosts share.
        os.environ["GLOO_SOCKET_IFNAME"] = plan["device"]
        torch.distributed.init_process_group(
            "gloo", init_method=f"tcp://{plan['addresses'][0]}:{GLOO_PORT}", rank=comm.rank, world_size=comm.size
        )
        rows = busbw(comm, ring, plan)
        torch.distributed.destroy_process_group()
    else:
        rows = aggregation(comm, ring, plan)
    if comm.rank == 0:
        print(json.dumps({"mpi": MPI.Get_library_version().split("\n")[0].strip(" \0"), "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
