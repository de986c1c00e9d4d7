"""What a method costs in DDP's hook on one model: the hook's own code (`gradiveq.ddp.driver`), run without a network.

Each bucket of the model's own gradients goes through the family that `gradiveq.ddp.State` would choose, on a process
group that only notes what it is asked to send. So payloads, rounds, error memories and seconds are those of the hook on
a CPU; nothing about a method is written down twice. GradiVeQ's bases are random numbers of the right shape: how long a
product takes doesn't depend on them.

Seconds are processor time of one thread, as in `bench.advice.model`; each is the median of some repeats.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import median
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.futures import Future
from tqdm import tqdm

from bench.advice.model import Assigned, Profile, Task, assign_buckets, profile
from gradiveq.compressors.half import Half
from gradiveq.compressors.identity import Identity
from gradiveq.compressors.randomk import RandomK
from gradiveq.ddp.bucket import Parameters
from gradiveq.ddp.driver import Delivery, carried
from gradiveq.ddp.layers import compressible_layers
from gradiveq.ddp.methods import make_hook_family
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.exchange.family import Family
from gradiveq.exchange.flaws import Codes
from gradiveq.exchange.requests import Iteration
from gradiveq.flatten import Bucket, slice_sizes
from gradiveq.methods import Compressed, GradiVeQ, Method, Plain
from gradiveq.pca import Basis, LayerBasis, held_bytes
from gradiveq.pca.basis import basis_state
from gradiveq.sizes import sized_bases

#: How plain DDP is called among the methods.
PLAIN = "plain DDP"
#: Repeats of a measurement, of which the first isn't counted.
REPEATS = 4
#: Compressors that read the gradient once, and do next to nothing with it.
ONE_PASS = (Half, Identity, RandomK)
#: Workers whose gathered payloads are decoded, to see what each adds.
FEW, MORE = 2, 4
#: The iteration from which on the hook's State compresses.
START = 2


class SentBytes(NamedTuple):
    """What one rank hands to a collective: "all_reduce" or "all_gather"."""

    collective: str
    num_bytes: int


class RoundCost(NamedTuple):
    """Computing on backward's thread, then collectives."""

    compute_s: float
    sent: tuple[SentBytes, ...]


@dataclass(frozen=True)
class BucketCost:
    """One bucket.

    Attributes:
        decode_s: with `FEW` workers.
        decode_each_s: more for each further worker, whose payload is gathered.
        length: elements.
        multiplications: what GradiVeQ needs to encode it, and as many to decode it.
    """

    rounds: tuple[RoundCost, ...]
    decode_s: float
    decode_each_s: float
    length: int
    multiplications: int = 0

    def decoding_s(self, workers: int) -> float:
        return self.decode_s + self.decode_each_s * (workers - FEW)


@dataclass(frozen=True)
class MethodCost:
    """All buckets, in the order in which they are ready.

    Attributes:
        memory_bytes: that one worker keeps from iteration to iteration beside what plain DDP does.
        sampling_bytes, samples_bytes: of GradiVeQ, what each worker keeps while sampling instead, and what all share.
        fit_bytes: what GradiVeQ gathers once per window, all bases.
        by_rates: whether a cluster's own rates can say what encoding and decoding take on its devices: products with
            bases, or a single pass over the gradient. Others may stay on a GPU as well, but what they take there was
            not measured.
    """

    buckets: tuple[BucketCost, ...]
    memory_bytes: int
    sampling_bytes: int = 0
    samples_bytes: int = 0
    fit_bytes: int = 0
    by_rates: bool = False

    def extra_bytes(self, workers: int) -> int:
        """The most that one worker keeps."""
        return max(self.memory_bytes, self.sampling_bytes + -(-self.samples_bytes // workers))

    @property
    def gathers(self) -> bool:
        """Whether anything of it isn't summed on its way."""
        return any(
            sent.collective == "all_gather" for bucket in self.buckets for one in bucket.rounds for sent in one.sent
        )

    @property
    def payload_bytes(self) -> int:
        """What one worker hands to collectives in an iteration."""
        return sum(sent.num_bytes for bucket in self.buckets for one in bucket.rounds for sent in one.sent)


class Alone(ProcessGroup):
    """A process group of `size` in which nothing is sent: sums are this worker's own, and all gathered are alike.

    Attributes:
        sent: what was asked for.
        spent_s: processor time that this took, which is none of the method's.
    """

    def __init__(self, size: int) -> None:
        self.rank, self.size, self.device = 0, size, torch.device("cpu")
        self.sent: list[SentBytes] = []
        self.spent_s = 0.0

    def all_reduce(self, tensor: Tensor) -> Future[Any]:
        self.sent.append(SentBytes("all_reduce", tensor.nbytes))
        return _done([tensor])

    def all_gather(self, tensor: Tensor) -> tuple[Tensor, Future[Any]]:
        begin = time.thread_time()
        self.sent.append(SentBytes("all_gather", tensor.nbytes))
        out = tensor.expand(self.size, -1).clone()
        self.spent_s += time.thread_time() - begin
        return out, _done([])


def _done(value: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(value)
    return future


@dataclass(frozen=True)
class MeasuredCosts:
    """What was measured of a model here, and of methods on it.

    Attributes:
        lengths: elements of each bucket; ready_s: when each is ready, in the profile's seconds.
        copies_s: seconds in which DDP copies gradients into each bucket, and back.
        costs: costs by method, PLAIN among them.
        refused: why other methods are not.
    """

    profile: Profile
    lengths: tuple[int, ...]
    ready_s: tuple[float, ...]
    copies_s: tuple[float, ...]
    costs: Mapping[str, MethodCost]
    refused: Mapping[str, str]


def measure(
    task: Task,
    methods: Mapping[str, Method],
    batch_size: int,
    bucket_mb: float | None = None,
    also: Sequence[str] = (),
) -> MeasuredCosts:
    """Train a little, then run every method on the gradients.

    Args:
        bucket_mb: DDP's `bucket_cap_mb`.
        also: as for `gradiveq.ddp.State`, of GradiVeQ.
    Raises:
        ModelError: the model can't be trained so.
    """
    profiled = profile(task, batch_size)
    buckets = assign_buckets(task.model, profiled.ready_s, bucket_mb)
    costs, refused = {PLAIN: plain_cost(task.model, buckets)}, {}
    for name, method in tqdm(methods.items(), desc="methods", leave=False, disable=None):
        try:
            costs[name] = cost_of(method, task.model, buckets, also=also if isinstance(method, GradiVeQ) else ())
        except (TypeError, ValueError) as error:
            refused[name] = str(error)
    return MeasuredCosts(
        profiled,
        tuple(bucket.length for bucket in buckets),
        tuple(bucket.ready_s for bucket in buckets),
        tuple(copies_s(bucket.length) for bucket in buckets),
        costs,
        refused,
    )


def plain_cost(model: nn.Module, buckets: Sequence[Assigned]) -> MethodCost:
    """DDP without a hook: the hook's `Plain` sends the same, but copies and looks for what isn't finite."""
    found = cost_of(Plain(), model, buckets, repeats=2)
    free = (replace(one, rounds=(RoundCost(0.0, one.rounds[0].sent),), decode_s=0.0) for one in found.buckets)
    return replace(found, buckets=tuple(free), memory_bytes=0)


def copies_s(length: int) -> float:
    """Seconds to copy so many elements twice, into a bucket and back."""
    source, target = torch.ones(length), torch.empty(length)
    times = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        target.copy_(source)
        source.copy_(target)
        times.append(time.thread_time() - begin)
    return median(times[1:])


def cost_of(
    method: Method,
    model: nn.Module,
    buckets: Sequence[Assigned],
    repeats: int = REPEATS,
    also: Sequence[str] = (),
) -> MethodCost:
    """Run a method on a model's gradients.

    Args:
        model: has gradients.
        also: as for `gradiveq.ddp.State`.
    Raises:
        TypeError, ValueError: the hook can't carry it, or it doesn't fit the model; says why.
    """
    few = _run(method, model, buckets, FEW, repeats, also)
    if not few.gathers:
        return few
    more = _run(method, model, buckets, MORE, repeats, also)
    return replace(
        few,
        buckets=tuple(
            replace(a, decode_each_s=max(0.0, b.decode_s - a.decode_s) / (MORE - FEW))
            for a, b in zip(few.buckets, more.buckets, strict=True)
        ),
    )


def _run(
    method: Method, model: nn.Module, buckets: Sequence[Assigned], size: int, repeats: int, also: Sequence[str]
) -> MethodCost:
    group, parameters = Alone(size), Parameters(model)
    family = make_hook_family(
        method,  # type: ignore[arg-type]
        model,
        parameters,
        group,
        seed=0,
        start=START,
        min_ratio=1.0,
        also=also,
    )
    contents = [parameters.contents(SimpleNamespace(parameters=lambda of=of: of.parameters)) for of in buckets]
    bases: dict[str, LayerBasis] = {}
    if isinstance(method, GradiVeQ):
        bases = {basis.name: basis for basis in random_bases(method, model, parameters, also)}
        family.load_state_dict(_compressing(bases))
    buffers = [_filled(one, parameters) for one in contents]
    codes = Codes(size, len(parameters.names))
    rows = []
    for repeat in range(repeats):
        family.skip()
        now = Iteration(START + repeat)
        works = [
            Delivery(one, buffer.clone(), now, index, 0, None, group, codes)
            for index, (one, buffer) in enumerate(zip(contents, buffers, strict=True))
        ]
        rows.append([_exchanged(family, work, group) for work in works])
        if not isinstance(method, GradiVeQ):
            family.accept(now)
    found = []
    for index, one in enumerate(contents):
        runs = [row[index] for row in rows[1:]]
        computing = [median(column) for column in zip(*(spent for spent, _ in runs), strict=True)]
        sent = runs[-1][1]
        # A varying payload's length is that of the last run.
        rounds = tuple(RoundCost(s, tuple(what)) for s, what in zip(computing[:-1], sent, strict=True))
        multiplications = sum(_multiplications(bases[name]) for name in one.names if name in bases)
        found.append(BucketCost(rounds, computing[-1], 0.0, one.length, multiplications))
    by_rates = isinstance(method, Plain | GradiVeQ) or (
        isinstance(method, Compressed) and isinstance(method.compressor, ONE_PASS) and method.master is None
    )
    if isinstance(method, GradiVeQ):
        return MethodCost(tuple(found), *_gradiveq_memory(method, bases), by_rates=by_rates)
    return MethodCost(tuple(found), _tensor_bytes(family.state_dict()), by_rates=by_rates)


def _exchanged(family: Family, work: Delivery, group: Alone) -> tuple[list[float], list[list[SentBytes]]]:
    """One bucket's exchange: seconds before each round and after the last; what each round sends."""
    spent: list[float] = []
    sent: list[list[SentBytes]] = []
    group.sent, group.spent_s = [], 0.0
    begin = time.thread_time()
    _is_finite(work.buffer)  # as the State does on both ends
    rounds = carried(family, work)
    while True:
        begun = next(rounds, None)
        spent.append(time.thread_time() - begin - group.spent_s)
        if begun is None:
            break
        sent.append(group.sent)
        group.sent, group.spent_s = [], 0.0
        begin = time.thread_time()
    begin = time.thread_time()
    _is_finite(work.buffer)
    spent[-1] += time.thread_time() - begin
    return spent, sent


def _is_finite(values: Tensor) -> bool:
    return bool(torch.linalg.vector_norm(values, torch.inf).isfinite())


def _filled(contents: Bucket, parameters: Parameters) -> Tensor:
    """A bucket with the model's gradients."""
    buffer = torch.zeros(contents.length)
    for block in contents.blocks:
        gradient = parameters.tensors[block.index].grad
        if gradient is not None:
            block.view(buffer).copy_(gradient)
    return buffer


def random_bases(method: GradiVeQ, model: nn.Module, parameters: Parameters, also: Sequence[str]) -> list[LayerBasis]:
    """A basis for each layer that the hook compresses, of the shape that a fit would give it.

    Raises:
        ValueError: it depends on the data how many components there will be.
    """
    drawn: dict[tuple[int, int], Basis] = {}
    generator = np.random.default_rng(0)
    layers = compressible_layers(model, parameters, also)
    for k in slice_sizes(layers, method.slice_size).values():
        d = method.pca.wanted_components(k)
        if d is not None and (d, k) not in drawn:
            components = generator.standard_normal((d, k), dtype=np.float32) / np.float32(np.sqrt(k))
            drawn[d, k] = Basis(components, np.ones(d, np.float32), float(k))
    return [basis for basis in sized_bases(method, layers, drawn) if basis.ratio > 1]


def _compressing(bases: Mapping[str, LayerBasis]) -> dict[str, Any]:
    """The state of GradiVeQ's family in the middle of a window, as a checkpoint has it."""
    return {
        "windows": {
            "schedule": {"phase": "compress", "done": 1, "window": 0},
            "first_loss": None,
            "vote": False,
            "entries": [],
        },
        "sampler": None,
        "fit_due": False,
        "iteration": START,
        "memory": None,
        "momentum": None,
        "total_error": 0.0,
        "bases": [_as_tensors(basis_state(basis)) for basis in bases.values()],
    }


def _as_tensors(tree: Any) -> Any:
    if isinstance(tree, np.ndarray):
        return torch.from_numpy(tree)
    if isinstance(tree, dict):
        return {key: _as_tensors(value) for key, value in tree.items()}
    return [_as_tensors(value) for value in tree] if isinstance(tree, list) else tree


def _multiplications(basis: LayerBasis) -> int:
    pairs = zip(basis.groups, basis.bases, strict=True)
    return sum(group.num_slices * one.components_.size for group, one in pairs)


def _gradiveq_memory(method: GradiVeQ, bases: Mapping[str, LayerBasis]) -> tuple[int, int, int, int]:
    """(bases, µ and what is kept of their products; sums while sampling; samples of all layers; bytes of all bases)."""
    held = sums = samples = fit = 0
    for basis in bases.values():
        fitted = sum(one.components_.nbytes + one.explained_variance_.nbytes for one in basis.bases)
        held += fitted + 4 * basis.length + basis.payload_bytes
        sums += 12 * basis.length  # µ's sum in float64, and the sample itself
        samples += sum(held_bytes(group, method.most_samples, method.pca) for group in basis.groups)
        fit += fitted
    return held, sums, samples, fit


def _tensor_bytes(tree: Any) -> int:
    if isinstance(tree, Tensor):
        return tree.nbytes
    if isinstance(tree, Mapping):
        return sum(map(_tensor_bytes, tree.values()))
    return sum(map(_tensor_bytes, tree)) if isinstance(tree, list | tuple) else 0


@cache
def local_rates() -> dict[str, float]:
    """Bytes per second that one thread adds, copies and scales here, 16 MB at a time."""
    a, b = np.ones(4 << 20, np.float32), np.ones(4 << 20, np.float32)

    def rate(work: Any) -> float:
        times = []
        for _ in range(5):
            begin = time.thread_time()
            work()
            times.append(time.thread_time() - begin)
        return a.nbytes / float(np.median(times[1:]))

    return {
        "add": rate(lambda: np.add(a, b, out=a)),
        "copy": rate(lambda: np.copyto(a, b)),
        "scale": rate(lambda: np.divide(a, 1.0, out=a)),
    }
