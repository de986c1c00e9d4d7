"""What `bench.advice.validation` runs on every shaped host: DDP training over Gloo, timed, and what predictions need.

    mpirun … python -m bench.advice.validation_ranks PLAN.json FOUND.pickle

First what an iteration computes and what methods cost (`bench.advice.model`, `bench.advice.costs`), on all hosts at the
same time, without communication. Then collectives alone, which the described cluster is fitted to. Then training, plain
DDP and with the hook: every repeat goes through all methods, from another one on each time. A time is that of the
slowest rank, per iteration.

Rank 0 leaves a pickled `Found`. DDP runs with `broadcast_buffers=False`: what batch norm's buffers take is not
predicted.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradiveq.ddp
from bench.advice.costs import PLAIN, SentBytes, measure
from bench.advice.model import Task
from bench.advice.validation_plan import METHODS, MODELS, Found
from gradiveq.methods import GradiVeQ, Method

PORT = 29_610
TIMEOUT_S = 120
#: Iterations before anything is timed: DDP rebuilds its buckets, the hook begins.
WARM_UP = 4


def of_all(seconds: float, operation: Any) -> float:
    """The slowest rank's, or the sum; collective."""
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, operation)
    return float(value)


def collectives(plan: Mapping[str, Any]) -> list[tuple[SentBytes, list[float], float]]:
    """All-reduces and all-gathers of some sizes, nothing else."""
    found = []
    for num_bytes in plan["collective_bytes"]:
        for what in ("all_reduce", "all_gather"):
            share = num_bytes if what == "all_reduce" else num_bytes // dist.get_world_size()
            tensor = torch.zeros(share // 4)
            gathered = [torch.zeros(share // 4) for _ in range(dist.get_world_size())]

            def once(what: str = what, tensor: torch.Tensor = tensor, gathered: Any = gathered) -> None:
                dist.all_reduce(tensor) if what == "all_reduce" else dist.all_gather(gathered, tensor)

            begin_s = time.perf_counter()
            once()
            first_s = of_all(time.perf_counter() - begin_s, dist.ReduceOp.MAX)
            calls = max(1, min(50, int(plan["collective_s"] / first_s)))
            times, cpu_s = [], 0.0
            for _ in range(plan["repeats"]):
                dist.barrier()
                once()  # which empties the links' token buckets
                begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
                for _ in range(calls):
                    once()
                spent_s = time.perf_counter() - begin_s
                cpu_s += (time.process_time() - begin_cpu_s) / calls / plan["repeats"]
                times.append(of_all(spent_s, dist.ReduceOp.MAX) / calls)
            found.append((SentBytes(what, share), times, cpu_s))
    return found


def trainer(task: Task, method: Method | None, batch_size: int, bucket_mb: float) -> Callable[[], None]:
    """One training iteration of a model of its own, warmed up; collective."""
    model: nn.Module = DistributedDataParallel(task.model, bucket_cap_mb=bucket_mb, broadcast_buffers=False)
    iterations = WARM_UP
    if method is not None:
        state = gradiveq.ddp.State(model, method)  # type: ignore[arg-type]
        model.register_comm_hook(state, gradiveq.ddp.hook)  # type: ignore[operator]
        iterations += method.sample if isinstance(method, GradiVeQ) and isinstance(method.sample, int) else 0
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def once() -> None:
        optimizer.zero_grad()
        task.loss(model, batch_size).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    for _ in range(iterations):
        once()
    return once


def train(
    plan: Mapping[str, Any], name: str, refused: Mapping[str, str]
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """(seconds per iteration, by method and repeat; processor time, by method)."""
    make, batch_size = MODELS[name]
    steps = {PLAIN: trainer(make(), None, batch_size, plan["bucket_mb"])}
    for method in plan["methods"]:
        if method not in refused:
            steps[method] = trainer(make(), METHODS[method], batch_size, plan["bucket_mb"])
    times: dict[str, list[float]] = {method: [] for method in steps}
    cpu_s = dict.fromkeys(steps, 0.0)
    calls = plan["repeats"] * plan["iterations"] * dist.get_world_size()
    order = list(steps)
    for repeat in range(plan["repeats"]):
        for method in order[repeat % len(order) :] + order[: repeat % len(order)]:
            steps[method]()  # not timed: another method was in the caches, and links had time to rest
            dist.barrier()
            begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
            for _ in range(plan["iterations"]):
                steps[method]()
            spent_s, spent_cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu_s
            times[method].append(of_all(spent_s, dist.ReduceOp.MAX) / plan["iterations"])
            cpu_s[method] += of_all(spent_cpu_s, dist.ReduceOp.SUM) / calls
    return times, cpu_s


def main() -> int:
    plan, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.manual_seed(0)
    os.environ["GLOO_SOCKET_IFNAME"] = plan["device"]
    # What MPICH's launcher tells its processes; MPI itself isn't needed.
    rank, size = int(os.environ["PMI_RANK"]), int(os.environ["PMI_SIZE"])
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{plan['address']}:{PORT}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    found = Found()
    for name in plan["models"]:
        make, batch_size = MODELS[name]
        dist.barrier()
        methods = {method: METHODS[method] for method in plan["methods"]}
        found.models[name] = measure(make(), methods, batch_size, plan["bucket_mb"])
    found.collectives = collectives(plan)
    for name in plan["models"]:
        found.times_s[name], found.cpu_s[name] = train(plan, name, found.models[name].refused)
    if rank == 0:
        out.write_bytes(pickle.dumps(found))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
