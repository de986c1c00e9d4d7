"""Times of all-reduces between the ranks of a job, for `bench.validate`, which starts it on shaped hosts.

    mpirun … python -m bench.shaped.validation_ranks PLAN

PLAN is JSON: {"methods": ["rar"], "sizes": [65536], "repeats": 3, "seconds": 0.2}.

Prints one line of JSON, from rank 0: a list of

    {"method", "size_bytes", "calls", "times_s": [seconds per call, mean over ranks, by repeat],
     "amounts_s": {rate's name: [amount, seconds of processor time]} (means over ranks, of all calls),
     "bytes_sent", "messages" (of a call, mean over ranks)}

Every repeat goes through all cells, so that what disturbs the machine for a while doesn't hit one of them alone. Before
each, links are drained of what they may pass at once by calls that aren't timed.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mpi4py import MPI

from bench.shaped.codecs import METHODS
from ring.abort import end_together
from ring.algorithm import ChunkWork
from ring.codec import Array, Codec
from ring.mpi import MPIRing
from ring.plan import Stats
from ring.program import amounts_of
from ring.timeline import Timeline

DRAIN_BYTES = 512 * 1024
MOST_CALLS = 200


class _Meter(Timeline):
    """Processor time of computations beside what they computed."""

    def __init__(self, codec: Codec, vector: Array) -> None:
        super().__init__(time.thread_time)
        self._codec, self._vector = codec, vector
        self.found: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self._payload = np.broadcast_to(np.zeros(1, np.uint8), (vector.nbytes,))

    def compute(self, kind: str, work: ChunkWork, function: Callable[..., Any], *args: Any) -> None:
        start_s = self.clock()
        function(*args)
        spent_s = self.clock() - start_s
        amounts = amounts_of(self._codec.amounts, kind, work, function, self._vector, self._payload)
        whole = sum(amount for _, amount in amounts)
        for name, amount in amounts:  # of several, each by its share
            self.found[name][0] += amount
            self.found[name][1] += spent_s * amount / whole if whole else 0.0


def measure(ring: MPIRing, plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The cells of the plan, the same on every rank."""
    memory = ring.empty(max(*plan["sizes"], DRAIN_BYTES) // 4)
    memory[:] = np.random.default_rng(ring.rank).standard_normal(len(memory), np.float32) * 1e-3
    drain = memory[: DRAIN_BYTES // 4]
    cells: list[tuple[str, int, Array, Codec, int, Stats, _Meter, list[float]]] = []
    for method in plan["methods"]:
        for size_bytes in plan["sizes"]:
            vector = memory[: size_bytes // 4]
            codec = METHODS[method](len(vector))
            start_s = time.perf_counter()
            stats = ring.all_reduce(vector, codec, op="mean")
            first_s = ring.rows_of_all([time.perf_counter() - start_s]).max()
            calls = max(1, min(MOST_CALLS, int(plan["seconds"] / first_s)))
            cells.append((method, size_bytes, vector, codec, calls, stats, _Meter(codec, vector), []))
    for _ in range(plan["repeats"]):
        for _, _, vector, codec, calls, _, meter, times in cells:
            ring.all_reduce(drain, op="mean")
            start_s = time.perf_counter()
            for _ in range(calls):
                ring.all_reduce(vector, codec, op="mean", timeline=meter)
            times.append(ring.rows_of_all([(time.perf_counter() - start_s) / calls]).mean())
    for method, size_bytes, _, _, calls, stats, meter, times in cells:
        names = sorted(meter.found)
        found = [number for name in names for number in meter.found[name]]
        means = ring.rows_of_all([stats.bytes_sent, stats.messages, *found]).mean(0)
        yield {
            "method": method,
            "size_bytes": size_bytes,
            "calls": calls,
            "times_s": times,
            "amounts_s": {name: means[2 + 2 * i : 4 + 2 * i].tolist() for i, name in enumerate(names)},
            "bytes_sent": means[0],
            "messages": means[1],
        }


def main() -> int:
    end_together()
    plan = json.loads(sys.argv[1])
    ring = MPIRing(timeout_s=plan.get("timeout_s", 120.0))
    cells = list(measure(ring, plan))
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
