"""What `bench.ddp` runs on every rank: training runs, and methods timed in turn.

    torchrun ... -m bench.hooks.runs PLAN        or with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set by anybody else

PLAN is a file, the JSON of a `RunsPlan`. Rank 0 does the runs that aren't recorded yet (`bench.experiments.grid`) and
tells the others which.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

import gradiveq.ddp
from bench.common.launch import INTERRUPTED
from bench.common.learning_rate import rise_and_fall
from bench.data import Batches, Dataset, evaluation_batches, load
from bench.experiments.grid import GridError, run_grid
from bench.hooks.equal_bytes import CASTS, PLAIN, TORCH_MIN_RATE, TORCH_POWERSGD, method_of
from bench.models import MODELS
from gradiveq.methods import GradiVeQ
from gradiveq.sizes import Handed

TRAIN, TIME = "train", "time"
EVALUATION_BATCH = 250
#: Untimed iterations before the first round: DDP rebuilds its buckets after the first, and methods may draw bases.
WARM = 4
#: What an entry of timings is called in which GradiVeQ samples.
SAMPLING = ", sampling"
#: Iterations of GradiVeQ's phase that is timed.
FOR_EVER = 10**9
#: Above the size of any model here: one bucket.
ONE_BUCKET_MB = 4096
BYTES_PER_MB = 1 << 20
#: Each rank's batch norm goes by its own batches, so that nothing but gradients travels. Newer versions of PyTorch have
#: another name for it.
GRADIENTS_ONLY: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel.__init__).parameters
    else {"broadcast_buffers": False}
)
#: The share of a run in which the learning rate rises, as in `bench.layerwise`.
LR_WARMUP = 5 / 24


@dataclass(frozen=True)
class RunsPlan:
    """What the ranks are to do.

    Attributes:
        runs: specs by name; see `train` and `time_in_turn`.
        folder: for records.
        resume: whether there may be some already.
        backend: backend of the process group.
        device: "cpu" or "cuda".
        threads: threads of each rank.
        timeout_s: after which an exchange has failed.
        links: what is between the ranks, for the record; None for this machine's loopback.
    """

    runs: Mapping[str, Mapping[str, Any]]
    folder: str
    resume: bool
    backend: str
    device: str
    threads: int
    timeout_s: float
    links: Mapping[str, Any] | None = None

    def write(self, file: Path) -> None:
        file.write_text(json.dumps(asdict(self)))


# --- bytes -----------------------------------------------------------------------------------------------------------


class Counter:
    """Bytes that hooks hand to collectives while `with` lasts: of PyTorch's hooks and of ours by the same count.

    Both call `torch.distributed.all_reduce` and the like, which count here and do as before; maybe on a thread of the
    backend's. The gradient that DistributedDataParallel reduces without a hook doesn't come by here.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.total = Handed()

    @contextmanager
    def counting(self) -> Iterator[None]:
        with (
            mock.patch.object(dist, "all_reduce", self._all(dist.all_reduce, lambda tensor: Handed(tensor.nbytes))),
            mock.patch.object(dist, "broadcast", self._all(dist.broadcast, lambda tensor: Handed(0, 0, tensor.nbytes))),
            mock.patch.object(
                dist, "all_gather", self._all(dist.all_gather, lambda _, tensor: Handed(0, tensor.nbytes))
            ),
        ):
            yield

    def _all(self, collective: Callable[..., Any], handed: Callable[..., Handed]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            tensors = [value for value in arguments if isinstance(value, Tensor | list)]
            with self._lock:
                self.total = self.total.plus(handed(*tensors))
            return collective(*arguments, **options)

        return counted


def wire_bytes(device: str) -> int | None:
    """Bytes that this host has sent through a network device so far, headers included; None where nobody says."""
    try:
        lines = Path("/proc/net/dev").read_text().splitlines()
    except OSError:
        return None
    counts = {name.strip(): rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return int(counts[device][8]) if device in counts else None


# --- a model and its hook --------------------------------------------------------------------------------------------


class Replica:
    """A model wrapped by DistributedDataParallel, with a method as its hook, and its optimiser.

    Args:
        text: the method (`bench.hooks.equal_bytes`).
        spec: what is said of it in `train`.
        one_bucket: whether the whole gradient is one bucket, or DDP cuts it as it does by default.
    """

    def __init__(self, text: str, spec: Mapping[str, Any], *, one_bucket: bool = True, sampling: bool = False) -> None:
        dataset = _dataset(spec["data"])
        options = {} if spec["width"] is None else {"width": spec["width"]}
        net = MODELS[spec["model"]](dataset.num_classes, seed=spec["seed"], **options).to(spec["device"])
        self.net, self.device = net, torch.device(spec["device"])
        self.num_parameters = sum(p.numel() for p in net.parameters() if p.requires_grad)
        self.state: gradiveq.ddp.State | None = None
        if one_bucket:
            with one_first_bucket():
                self.model = DistributedDataParallel(net, **GRADIENTS_ONLY, bucket_cap_mb=ONE_BUCKET_MB)
        else:
            self.model = DistributedDataParallel(net, **GRADIENTS_ONLY)
        self._register(text, spec, sampling)
        self._optimiser = torch.optim.SGD(
            net.parameters(), lr=spec["lr"], momentum=spec["momentum"], weight_decay=spec["weight_decay"], nesterov=True
        )

    def _register(self, text: str, spec: Mapping[str, Any], sampling: bool) -> None:
        if text == PLAIN:
            return
        if text in CASTS:
            hooks = {"torch:fp16": default_hooks.fp16_compress_hook, "torch:bf16": default_hooks.bf16_compress_hook}
            self.model.register_comm_hook(None, hooks[text])
        elif text.startswith(TORCH_POWERSGD):
            rank = int(text.rpartition(":")[2])
            state = powerSGD_hook.PowerSGDState(
                None,
                rank,
                start_powerSGD_iter=spec["start"],
                min_compression_rate=TORCH_MIN_RATE,
                random_seed=spec["seed"],
            )
            self.model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
        else:
            method = method_of(text, spec["start"])
            assert method is not None
            if isinstance(method, GradiVeQ) and spec["kind"] == TIME:  # what is timed is to last
                method = replace(method, sample=FOR_EVER) if sampling else replace(method, compress=FOR_EVER)
            self.state = gradiveq.ddp.State(
                self.model, method, start_iteration=spec["start"], seed=spec["seed"], nonfinite="propagate"
            )
            self.model.register_comm_hook(self.state, gradiveq.ddp.hook)

    @property
    def settled(self) -> bool:
        """Whether the next iteration is one as all that follow; of GradiVeQ's, one of those that are timed."""
        if self.state is None:
            return True
        sampling = isinstance(self.state.method, GradiVeQ) and self.state.method.sample == FOR_EVER
        return self.state.phase not in ("start", "warm-up") and (self.state.phase != "sample" or sampling)

    def step(self, images: Tensor, labels: Tensor, lr: float) -> Tensor:
        """One iteration; returns the loss of this rank's batch."""
        for group in self._optimiser.param_groups:
            group["lr"] = lr
        self._optimiser.zero_grad()
        loss = functional.cross_entropy(self.model(images), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        return loss.detach()

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def one_first_bucket() -> AbstractContextManager[Any]:
    """While this lasts, DDP's first bucket isn't smaller than the others; older versions have no option for it."""
    return mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", ONE_BUCKET_MB * BYTES_PER_MB)


def several_by_default(num_parameters: int) -> bool:
    """Whether DDP cuts a gradient of so many float32 into more than one bucket unless it is told otherwise."""
    return 4 * num_parameters > int(dist._DEFAULT_FIRST_BUCKET_BYTES)  # type: ignore[attr-defined]


# --- a training run --------------------------------------------------------------------------------------------------


def train(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Train one model by one method. Collective.

    Args:
        spec: "method", "model", "width" (or None), "data" (or None for the shipped sample), "device", "ranks",
            "batch_size" (of a rank), "iterations", "start", "evaluations" (how many), "seed", "lr", "warmup",
            "momentum", "weight_decay".
    Returns:
        "source" (what the data are), "num_parameters", "handed" (bytes of this rank, by kind of collective, in the
        mean over all iterations), "compressed" (the same of the median one of those that compress), "evaluations"
        ({"iteration", "accuracy", "loss", "handed"}, the last so far and of all kinds together), "diverged" (whether
        the last loss wasn't finite), "stats" (of ours, what its State counted since `start`).
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    dataset = _dataset(spec["data"])
    batches = Batches(dataset, spec["batch_size"], rank, size, seed=spec["seed"], device=spec["device"], augment=False)
    replica, counter = Replica(spec["method"], spec), Counter()
    rate = rise_and_fall(spec["lr"], spec["warmup"], spec["iterations"])
    due = {round(spec["iterations"] * (i + 1) / spec["evaluations"]) for i in range(spec["evaluations"])}
    each: list[Handed] = []
    compresses: list[bool] = []
    evaluations = []
    for iteration in range(spec["iterations"]):
        batch = batches.batch(iteration)
        compresses.append(iteration >= spec["start"] and replica.settled)
        before = counter.total
        with counter.counting():
            replica.step(*batch, rate(iteration))
        # DDP without a hook hands over what its bucket holds: the gradient.
        plain = Handed(all_reduce=4.0 * replica.num_parameters if spec["method"] == PLAIN else 0.0)
        each.append(plain.plus(counter.total.plus(before.times(-1))))
        if iteration + 1 in due:
            found = evaluate(replica.net, dataset, replica.device)
            total = sum((sum(one) for one in each), 0.0)
            evaluations.append({"iteration": iteration + 1, **found, "handed": total})
    compressed = sorted((one for one, does in zip(each, compresses, strict=True) if does), key=sum) or each[-1:]
    whole = Handed(*(sum(values) for values in zip(*each, strict=True)))
    stats = None if replica.state is None else replica.state.compression_stats()._asdict()
    return {
        "source": dataset.source,
        "num_parameters": replica.num_parameters,
        "handed": whole.times(1 / len(each))._asdict(),
        "compressed": compressed[len(compressed) // 2]._asdict(),
        "evaluations": evaluations,
        "diverged": not math.isfinite(evaluations[-1]["loss"]),
        "stats": stats,
    }


def evaluate(net: nn.Module, dataset: Dataset, device: torch.device) -> dict[str, float]:
    """Accuracy and loss on the test images, shared among the ranks, with the ranks' mean of batch norm's statistics."""
    judged = copy.deepcopy(net).eval()
    for buffer in judged.buffers():
        if buffer.is_floating_point():
            dist.all_reduce(buffer)
            buffer /= dist.get_world_size()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    shares = evaluation_batches(dataset, EVALUATION_BATCH, dist.get_rank(), dist.get_world_size(), device=device)
    with torch.no_grad():
        for images, labels in shares:
            logits = judged(images)
            right = float((logits.argmax(1) == labels).sum())
            loss = float(functional.cross_entropy(logits, labels, reduction="sum"))
            sums += torch.tensor([right, loss, len(labels)], dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    all_right, all_loss, count = sums.tolist()
    return {"accuracy": all_right / count, "loss": all_loss / count}


# --- times -----------------------------------------------------------------------------------------------------------


def time_in_turn(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Time the iterations of all methods in rounds: each round goes through all, from another one on every time.

    What disturbs the machine for a while so hits none of them alone. A time is the slowest rank's, over `stretch`
    iterations of one batch; GradiVeQ's are compressed ones, and sampling ones in an entry of their own. Collective.

    Args:
        spec: as for `train`, and "methods", "rounds", "stretch", "rate_mbps" (None for this machine's loopback),
            "defaults" (whether to time all but PyTorch's PowerSGD with DDP's default buckets too).
    Returns:
        "times_s": {name: seconds per iteration, by round}; "defaults_s": the same with DDP's default buckets, of a
        gradient that makes several; "wire": {name: bytes per iteration that rank 0 sent through the link's device,
        headers included}, where there is one; "threads"; "num_parameters".
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    batches = Batches(_dataset(spec["data"]), spec["batch_size"], rank, size, device=spec["device"], augment=False)
    batch = batches.batch(0)
    replicas = {text: Replica(text, spec) for text in spec["methods"]}
    for text in spec["methods"]:
        if text.startswith(GradiVeQ.name):
            replicas[text + SAMPLING] = Replica(text, spec, sampling=True)
    num_parameters = replicas[PLAIN].num_parameters
    apart: dict[str, Replica] = {}
    if spec["defaults"] and several_by_default(num_parameters):
        several = [text for text in spec["methods"] if not text.startswith(TORCH_POWERSGD)]
        apart = {text: Replica(text, spec, one_bucket=False) for text in several}
    entrants = [(text, replica, False) for text, replica in replicas.items()]
    entrants += [(text, replica, True) for text, replica in apart.items()]
    for _, replica, _ in entrants:
        for _ in range(WARM):
            replica.step(*batch, spec["lr"] / 100)
        while not replica.settled:
            replica.step(*batch, spec["lr"] / 100)
    times: dict[bool, dict[str, list[float]]] = {False: {text: [] for text in replicas}, True: {t: [] for t in apart}}
    wire: dict[str, list[float]] = {text: [] for text in replicas}
    device = os.environ.get("GLOO_SOCKET_IFNAME", "") if spec["rate_mbps"] is not None else ""
    for number in range(spec["rounds"]):
        first = number % len(entrants)
        for text, replica, is_apart in [*entrants[first:], *entrants[:first]]:
            dist.barrier()
            sent, start_s = wire_bytes(device), time.perf_counter()
            for _ in range(spec["stretch"]):
                replica.step(*batch, spec["lr"] / 100)
            replica.synchronise()
            spent = torch.tensor([time.perf_counter() - start_s], dtype=torch.float64, device=replica.device)
            now = wire_bytes(device)
            dist.all_reduce(spent, dist.ReduceOp.MAX)
            times[is_apart][text].append(float(spent) / spec["stretch"])
            if sent is not None and now is not None and not is_apart:
                wire[text].append((now - sent) / spec["stretch"])
    return {
        "times_s": times[False],
        "defaults_s": times[True],
        "wire": {text: statistics.median(values) for text, values in wire.items() if values},
        "threads": torch.get_num_threads(),
        "num_parameters": num_parameters,
    }


# --- all ranks -------------------------------------------------------------------------------------------------------


@cache
def _dataset(path: str | None) -> Dataset:
    return load(path)


def do(spec: Mapping[str, Any]) -> dict[str, Any]:
    """A run of either kind. Collective."""
    return train(spec) if spec["kind"] == TRAIN else time_in_turn(spec)


class RunFailed(BaseException):
    """Ranks may be at different places now: no other run is tried, as a grid does after an ordinary exception."""


class Lead:
    """Rank 0's side of a run: tells the others, and does it with them.

    Args:
        links: to be recorded with times.
    """

    def __init__(self, links: Mapping[str, Any] | None) -> None:
        self._links = links

    def __call__(self, spec: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
        try:
            tell(spec)
            result = do(spec)
        except Exception as error:
            what = f"{spec['method']}, seed {spec['seed']}" if spec["kind"] == TRAIN else "timing"
            raise RunFailed(f"{what}: {type(error).__name__}: {error}") from error
        return {**result, "links": self._links} if spec["kind"] == TIME else result


def tell(spec: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Rank 0's spec on all ranks; None after the last."""
    told = [spec]
    dist.broadcast_object_list(told, src=0)
    return told[0]


def work(plan: RunsPlan) -> int:
    """What each rank does; its exit status. Says in one line what went wrong.

    An error of one rank alone leaves the others waiting for it: the process ends at once, and the launcher ends them.
    """
    rank = int(os.environ["RANK"])
    try:
        torch.set_num_threads(plan.threads)
        if plan.device == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        dist.init_process_group(plan.backend, timeout=timedelta(seconds=plan.timeout_s))
        if rank == 0:
            run_grid(
                Lead(plan.links),
                plan.runs,
                Path(plan.folder),
                processes=1,
                threads=plan.threads,
                resume=plan.resume,
                show=lambda line: print(line, flush=True),
            )
            tell(None)
        else:
            while (spec := tell(None)) is not None:
                do(spec)
        dist.destroy_process_group()
    except KeyboardInterrupt:
        _leave(INTERRUPTED)
    except (GridError, RunFailed) as error:
        _leave(1, f"error: {error}")
    except Exception as error:
        _leave(1, f"error: rank {rank}: {type(error).__name__}: {error}")
    return 0


def _leave(status: int, line: str = "") -> None:
    if line:
        print(" ".join(line.split()), file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def main(arguments: Sequence[str] | None = None) -> int:
    (file,) = sys.argv[1:] if arguments is None else arguments
    return work(RunsPlan(**json.loads(Path(file).read_text())))


if __name__ == "__main__":
    _leave(main())  # at once: a thread of PyTorch's was once seen to abort a process that was done
