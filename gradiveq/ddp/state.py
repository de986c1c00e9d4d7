"""The state of a communication hook: one for each wrapped model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gradiveq.ddp.agreement import compare
from gradiveq.ddp.blocking import Following
from gradiveq.ddp.bucket import Parameters, unwrapped
from gradiveq.ddp.checkpoint import fitting
from gradiveq.ddp.driver import Delivery, Flight, Traffic, carried, device_kernels, uncompressed
from gradiveq.ddp.methods import DDPMethod, make_hook_family
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.device.host_copy import HostCopy
from gradiveq.exchange import flaws
from gradiveq.exchange.error_memory import Memories
from gradiveq.exchange.family import Family
from gradiveq.exchange.requests import Iteration
from gradiveq.flatten import Bucket
from gradiveq.report import NonFiniteGradient, listed

#: PyTorch's convention for `start_iteration`, as DDP rebuilds its buckets after the first iteration.
FIRST_START = 2


class CompressionStats(NamedTuple):
    """Bytes of this rank from `start_iteration` on, in the words of PyTorch's PowerSGD hook.

    Attributes:
        compress_rate: before / after; 0 if nothing was sent.
        bytes_before: of the gradients.
        bytes_after: that were handed to the process group in their place.
    """

    compress_rate: float
    bytes_before: int
    bytes_after: int


class State:
    """What `gradiveq.ddp.hook` needs to know, and remembers. Each rank makes one, with the same arguments.

        model = DistributedDataParallel(net)
        state = gradiveq.ddp.State(model, GradiVeQ(ratio=8, fit_slices="all"))
        model.register_comm_hook(state, gradiveq.ddp.hook)

    Args:
        model: wrapped by DistributedDataParallel or not; its parameters that require a gradient now.
        method: Plain, GradiVeQ, PowerSGD, a compressor, or Compressed for one with error feedback and the like.
        process_group: the one that the model is wrapped with; None for that, or for the default group.
        start_iteration: the first iteration that may be compressed, from 0 on. DDP rebuilds its buckets after the first
            iteration, so it is at least 2. GradiVeQ's warm-up lasts at least until then.
        seed: of random numbers.
        nonfinite: what a gradient with an infinity or a NaN leads to, and a mean that overflows. "fail": an error on
            all ranks, from `backward()`, that names the layer and the rank (on a GPU from the next one: nothing waits
            for the finding). "propagate": NaN in that bucket on all ranks, as without a hook, so that a GradScaler
            skips the step on all of them. Either way the iteration leaves no trace in memories and windows.
        min_ratio: layers that would not be this much smaller go uncompressed: elements over floats for GradiVeQ, bytes
            over bytes for compressors of a fixed size. (PowerSGD has `min_compression_rate`.)
        also: names, or patterns of names, of parameters that GradiVeQ is to compress besides convolutions
            (`gradiveq.ddp.layers.compressible_layers`).
        loss_scale: gives the factor by which the loss is multiplied, as a number or a tensor: `scaler.get_scale` with
            a GradScaler (on a GPU that waits for what has been computed until then, which a tensor need not). Memories,
            µ and samples are kept in units without it, so that it may change. None for 1.
    Raises:
        TypeError, ValueError: an argument is invalid, or nothing in the model can be compressed as asked.

    **Types.** Buckets of float32, float16 and bfloat16 are compressed, in float32; in the latter two, and under
    `fp16_compress_wrapper` and `bf16_compress_wrapper`, float32 payloads travel in these 16 bits. Other buckets
    (float64) travel as they are. Complex numbers are pairs of real ones, which GradiVeQ leaves alone. Sparse gradients
    are refused. An autocast that `backward()` is called under doesn't reach in here, nor does torch's default type.

    **Unused parameters** (`find_unused_parameters`) count as zeros. DDP leaves `.grad` alone where no rank has used the
    parameter; what error feedback has sent for it in such an iteration is then lost.

    **A parameter that is replaced** in the model later is found out on all ranks, unless its gradient was to come in
    the first bucket: DDP itself waits for it then, and the process group's timeout tells the other ranks; as it does on
    a GPU.

    **Errors** come from `backward()`, on all ranks: ValueError if ranks differ, NonFiniteGradient, FitError if PCA
    fails, RuntimeError with the exchange that failed if a worker is gone; PyTorch makes RuntimeErrors that quote them
    of those that callbacks find. After a NonFiniteGradient training may go on. The others leave DDP in the midst of an
    iteration, so that it refuses the next forward pass: wrap the model again, make a new State, and load the last
    checkpoint. Two faults end before a State hears of them, in a message of DDP's or the backend's that needn't name
    the rank: parameters that differ in number or shape when the model is wrapped, and a rank without any hook.

    **Resuming** bit by bit: DDP starts with other buckets than it goes on with, and so with another order of additions
    in a process group's all-reduce. Run one iteration on any batch, forward and backward, and only then load model,
    optimiser, and `load_state_dict`. The buckets are rebuilt in the following forward pass, as in the first run.

    Attributes:
        iteration: of the next backward pass that communicates; those under `no_sync()` don't count.
        traffic: bytes, from `start_iteration` on.
    """

    def __init__(
        self,
        model: nn.Module,
        method: DDPMethod,
        *,
        process_group: dist.ProcessGroup | None = None,
        start_iteration: int = FIRST_START,
        seed: int = 0,
        nonfinite: Literal["fail", "propagate"] = "fail",
        min_ratio: float = 1.0,
        also: Sequence[str] = (),
        loss_scale: Callable[[], Tensor | float] | None = None,
    ) -> None:
        if not isinstance(start_iteration, int) or start_iteration < FIRST_START:
            raise ValueError(
                f"`start_iteration` must be at least {FIRST_START}, as DDP rebuilds its buckets after the first "
                f"iteration, got {start_iteration!r}"
            )
        if nonfinite not in ("fail", "propagate"):
            raise ValueError(f"`nonfinite` must be 'fail' or 'propagate', got {nonfinite!r}")
        if not (loss_scale is None or callable(loss_scale)):
            raise TypeError(
                f"`loss_scale` must be a function without arguments, as scaler.get_scale, got {loss_scale!r}"
            )
        model = unwrapped(model)
        if isinstance(model, DistributedDataParallel):
            process_group = model.process_group if process_group is None else process_group
            model = model.module
        self.method, self.start_iteration, self.nonfinite = method, start_iteration, nonfinite
        self.iteration = 0
        self.traffic = Traffic()
        self._parameters = Parameters(model)
        self._group = ProcessGroup(process_group, self._parameters.device)
        if not self._parameters.names:
            raise ValueError("`model` has no parameter that requires a gradient")
        self._codes = flaws.Codes(self._group.size, len(self._parameters.names))
        self._new_family = partial(
            make_hook_family,
            method,
            model,
            self._parameters,
            self._group,
            seed=seed,
            start=start_iteration,
            min_ratio=min_ratio,
            also=also,
        )
        self._family: Family = self._new_family()
        self._following = Following()
        self._now = Iteration(0)
        self._before = Traffic()  # as it was when the iteration began
        self._identity = {
            "method": repr(method),
            "start_iteration": start_iteration,
            "seed": seed,
            "min_ratio": min_ratio,
            "also": list(also),
            **self._parameters.identity,
        }
        self._loss_scale = loss_scale
        self._compared = False
        # The iteration under way. Callbacks come on threads of the backend's.
        self._lock = threading.Lock()
        self._flights: list[Flight] = []
        self._begun = self._landed = 0
        self._all_begun = self._settled = True
        self._spoilt = False
        self._fatal: Exception | None = None  # after it, other ranks' buckets can't be waited for
        self._scale: Tensor | float | None = None
        self._replaced: int | None = None
        self._works: list[Delivery] = []
        self._unread: list[tuple[Bucket, HostCopy]] = []  # on a GPU: codes, and whether the mean is finite

    @property
    def phase(self) -> str:
        """Phase of the next iteration: "start" before `start_iteration`, then "plain", "compressed", or GradiVeQ's
        "warm-up", "sample" and "compress" (as far as it is known: a fit that is under way may end the sampling)."""
        self._settle()
        return "start" if self.iteration < self.start_iteration else self._family.phase

    @property
    def window_log(self) -> list[dict[str, Any]]:
        """GradiVeQ's windows, as `gradiveq.Aggregator.window_log` has them; of others there are none.

        What is sent is what is handed to the process group. Most of "fit_s" is spent on a thread, beside training.
        """
        self._settle()
        self._following.wait()
        return list(self._family.log)

    def compression_stats(self) -> CompressionStats:
        """Bytes of this rank so far, as PyTorch's own hooks tell them. Not collective."""
        before, after = self.traffic.dense, self.traffic.payload
        return CompressionStats(before / after if after else 0.0, before, after)

    def on_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """What `hook` does."""
        contents = self._parameters.contents(bucket)
        if bucket.index() == 0:
            self._check_turn(contents)
            self._begin()
        buffer = bucket.buffer()
        if buffer.layout != torch.strided:
            raise ValueError(f"gradients must be dense, {contents.title()} has a {buffer.layout} one")
        number = self.iteration - 1
        work = Delivery(contents, buffer, self._now, bucket.index(), 0, self._scale, self._group, self._codes)
        work.flaw, work.vote = self._own_flaw(work), int(self._family.vote)
        own_flaw = work.flaw  # on a device the code becomes a tensor
        self._works.append(work)
        if number >= self.start_iteration:
            work.traffic = self.traffic
            self.traffic.dense += buffer.nbytes
        compressed = number >= self.start_iteration and work.compressible
        carrying = carried(self._family, work) if compressed else uncompressed(work)
        with self._lock:
            self._begun += 1
            self._all_begun = bucket.is_last()
        flight = Flight(carrying, work, self._judge)
        earlier = list(self._flights)
        self._flights.append(flight)
        for one in earlier:
            one.advance()
        if bucket.is_last():
            for one in self._flights:
                while not one.launched:
                    one.advance()
        if self._fatal is not None:
            raise self._fatal
        if flaws.is_hard(own_flaw):
            raise self._hard(flight, int(own_flaw))
        return flight.future

    def _hard(self, flight: Flight, code: int) -> Exception:
        """What is to be raised on a rank that can't go on, once the others have heard of it.

        Other buckets of this rank may never come, as the gradients that DDP waits for don't. On a device, where the
        others don't look at codes while they exchange, they go on with their next bucket, and run into the process
        group's timeout; a second round would meet that bucket's first there.
        """
        while not (flight.launched or flight.delivery.stays):
            flight.advance()
        flight.wait()
        codes = torch.zeros(self._group.size, dtype=torch.int64, device="cpu")
        codes[self._group.rank] = code
        error = self._fatal or self._error(codes, self.iteration - 1)
        assert error is not None
        return error

    def _check_turn(self, contents: Bucket) -> None:
        """Refuse to begin an iteration with a bucket of another wrapped model than the last one's, on all ranks alike.

        Raises:
            RuntimeError: it is, or the last iteration's buckets haven't all come.
        """
        before = [work.bucket for work in self._works]
        if contents not in before and contents.blocks and before:
            known = {block.index for one in before for block in one.blocks}
            if known.isdisjoint(block.index for block in contents.blocks):
                raise RuntimeError(
                    f"{contents.title()} is not of the model that iteration {self.iteration - 1} was of: each wrapped "
                    "model needs a State of its own"
                )
        if not self._all_begun:
            raise RuntimeError(
                f"iteration {self.iteration - 1} never came to its last bucket: after an error in the midst of "
                "`backward()` a wrapped model needs a new State, or this one a checkpoint"
            )

    def _begin(self) -> None:
        """A new iteration; collective."""
        self._close()
        if not self._compared:
            self._compare(self.iteration)
        number, self.iteration = self.iteration, self.iteration + 1
        self._flights, self._works = [], []
        self._begun = self._landed = 0
        self._all_begun = self._settled = self._spoilt = False
        self._scale = None if self._loss_scale is None else self._loss_scale()
        self._replaced = self._parameters.replaced()
        self._following.wait()  # whose thread may be about to replace what is looked at here
        self._family.skip()  # what is left of an iteration that never ended
        traffic = self.traffic if number >= self.start_iteration else Traffic()
        self._following.finish(self._group, self._now, self._family.fitted, partial(_count_fit, traffic))
        self._now, self._before = Iteration(number), replace(self.traffic)

    def _own_flaw(self, work: Delivery) -> Tensor | int:
        """What is wrong with this rank's gradient; looked at in one pass."""
        blocks = work.bucket.blocks
        if self._replaced is not None:
            return flaws.flaw(flaws.REPLACED, self._replaced)
        if work.bucket.unknown:
            return flaws.flaw(flaws.UNKNOWN, blocks[-1].index if blocks else len(self._parameters.names))
        if work.buffer.is_cuda:
            found: Tensor = device_kernels(work.buffer.device).flaw_of(work.buffer, blocks, flaws.NOT_FINITE)
            return found
        if _is_finite(work.buffer):
            return 0
        return flaws.flaw(flaws.NOT_FINITE, _flawed(work.buffer, work.bucket)[0])

    def _judge(self, work: Delivery, error: Exception | None) -> Exception | None:
        """A bucket is through; maybe on a thread of the backend's."""
        verdict = error
        try:
            if error is not None:
                self._spoilt = True
            elif work.buffer.is_cuda:
                self._note_flaws(work)
            else:
                verdict = self._find_flaws(work)
        except Exception:
            self._spoilt = True
            raise
        finally:
            with self._lock:
                self._landed += 1
        if not self._unread:
            self._settle()
        return verdict

    def _find_flaws(self, work: Delivery) -> Exception | None:
        """What is to be raised because of this bucket, the same on all ranks."""
        assert work.heard is not None
        if flaws.any_flaw(work.heard):
            self._spoilt = True
            if self.nonfinite == "propagate":
                work.buffer.fill_(torch.nan)
            return self._error(work.heard, work.now.number)
        if not _is_finite(work.buffer):  # the same bits on all ranks, so the same finding
            self._spoilt = True
            if self.nonfinite == "fail":
                names = [self._parameters.names[index] for index in _flawed(work.buffer, work.bucket)]
                return _overflow(names, work.now.number)
        return None

    def _note_flaws(self, work: Delivery) -> None:
        """The same on a GPU, where it is only noted what there is to see."""
        assert work.heard is not None
        codes = work.heard.to(work.buffer.device)
        work.buffer.masked_fill_((codes > 1).any(), torch.nan)
        finite = torch.linalg.vector_norm(work.buffer, torch.inf).isfinite()
        self._unread.append((work.bucket, HostCopy(torch.cat([codes, finite.long().view(1)]))))

    def _read(self) -> None:
        """What was noted on a GPU in the last iteration.

        Raises: as `_find_flaws` says.
        """
        unread, self._unread = self._unread, []
        for contents, later in unread:
            error, codes, finite = None, later.value[:-1], later.value[-1] > 0
            if flaws.any_flaw(codes):
                self._spoilt, error = True, self._error(codes, self.iteration - 1)
            elif not finite:
                self._spoilt = True
                if self.nonfinite == "fail":
                    error = _overflow([contents.title()], self.iteration - 1)
            if error is not None:
                raise error

    def _error(self, codes: Tensor, iteration: int) -> Exception | None:
        found = flaws.story(codes.tolist(), [*self._parameters.names, "a bucket"])
        where = "; ".join(text for _, text in found)
        if any(reason in flaws.HARD for reason, _ in found):
            self._fatal = ValueError(
                f"in iteration {iteration} {where}: make a new State of the model as it is wrapped now"
            )
            return self._fatal
        return NonFiniteGradient(f"in iteration {iteration} {where}") if self.nonfinite == "fail" else None

    def _close(self) -> None:
        """The iteration is over for whoever trains. After an error DDP doesn't wait for the buckets behind it.

        Raises: as `_find_flaws` says, of what was noted on a GPU.
        """
        if self._landed < self._begun:
            for flight in self._flights:
                if flight.launched:
                    with suppress(Exception):  # which DDP has raised, or an earlier bucket's
                        flight.wait()
        self._read()
        self._settle()

    def _settle(self) -> None:
        """The iteration is over, if all buckets are through."""
        with self._lock:
            if self._settled or not self._all_begun or self._landed < self._begun or self._unread:
                return
            self._settled = True
            if self._spoilt:
                self._family.skip()
                return
            dense, payload = self.traffic.dense - self._before.dense, self.traffic.payload - self._before.payload
            if payload:
                self._now.ratio = dense / payload
            self._following.start(self._family.accept(self._now))

    def _compare(self, iteration: int, refused: str = "") -> None:
        """Refuse ranks that differ; collective.

        Args:
            iteration: of the next backward pass.
            refused: why this rank can't go on, if it can't.
        Raises:
            ValueError: on all ranks, naming what differs or was refused where.
        """
        options = {
            "nonfinite": self.nonfinite,
            "loss_scale": "none" if self._loss_scale is None else "given",
            "iteration": iteration,
        }
        compare(self._group, {"hook": "State", **self._identity, **options}, iteration, refused)
        self._compared = True

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit by bit, between iterations; it differs by rank. Not collective.

        Dicts and lists of tensors on the CPU, numbers, strings and None, copied: `torch.load` takes them with
        weights_only=True.
        """
        self._close()
        self._following.wait()
        return {
            "identity": dict(self._identity),
            "rank": self._group.rank,
            "size": self._group.size,
            "iteration": self.iteration,
            "traffic": [self.traffic.dense, self.traffic.payload, self.traffic.fit],
            "family": self._family.state_dict(),
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | Sequence[Mapping[str, Any]], memories: Memories | None = None
    ) -> None:
        """Go on from there. Every rank loads its own state, of the same iteration; see the class for how to resume.
        Collective, so that all ranks hear of one that is refused.

        With another number of workers every rank loads the list of the old ones' states, by rank, and says what is to
        become of error feedback's memories: "sum", so that the mean over the workers of what was left out stays what it
        was (`gradiveq.exchange.error_memory.summed`); or "drop", for which a single old state will do. Bases, µ and Q
        are of the mean gradient and are kept; a sampling that is under way begins anew. No such run equals another bit
        by bit.

        Args:
            memories: only with another number of workers.
        Raises:
            ValueError: on all ranks, if one of them was given no state, one of another model, method, option, rank or
                number of workers, or ranks one of different iterations; names the ranks. Nothing was changed.
        """
        refused, iteration = "", self.iteration
        try:
            iteration, traffic, family = self._fitting(state, memories)
        except ValueError as error:
            refused = str(error)
        self._compare(iteration, refused)
        self._following.wait()
        self.iteration, self.traffic, self._family = iteration, traffic, family
        self._now = Iteration(iteration - 1)
        self._following.start(family.pending(self._now))
        self._all_begun, self._settled, self._unread, self._works = True, True, [], []

    def _fitting(self, state: object, memories: Memories | None) -> tuple[int, Traffic, Family]:
        """What to go on with; not collective.

        Raises:
            ValueError: the states don't fit.
        """
        group = self._group
        shapes = dict(zip(self._parameters.names, self._parameters.shapes, strict=True))
        states = fitting(state, memories, self._identity, shapes, group.rank, group.size)
        contents, family = [one["family"] for one in states], self._new_family()
        try:
            traffic = Traffic(*states[0]["traffic"])
            if states[0]["size"] == group.size:
                family.load_state_dict(contents[0])
            else:
                assert memories is not None
                family.load_others(contents, memories, group.rank, group.size)
        except Exception as error:  # whatever is where something else should be
            raise ValueError(f"`state` is damaged: {type(error).__name__}: {error}") from error
        return states[0]["iteration"], traffic, family


def _is_finite(values: Tensor) -> bool:
    """Cost: one pass."""
    return bool(torch.linalg.vector_norm(values, torch.inf).isfinite()) if values.numel() else True


def _flawed(buffer: Tensor, bucket: Bucket) -> list[int]:
    """The indices of the parameters with an infinity or a NaN in a bucket."""
    return [block.index for block in bucket.blocks if not _is_finite(buffer[block.where])]


def _count_fit(traffic: Traffic, num_bytes: int) -> None:
    traffic.payload += num_bytes
    traffic.fit += num_bytes


def _overflow(names: Sequence[str], iteration: int) -> NonFiniteGradient:
    return NonFiniteGradient(
        f"in iteration {iteration} the mean of finite gradients overflows on all ranks: {listed(names)}"
    )
