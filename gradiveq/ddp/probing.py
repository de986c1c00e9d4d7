"""What each method would make of this model's gradients, measured while training goes on as if nothing was there.

    for `sample` iterations          the mean gradient is collected, for GradiVeQ's bases
    for `holdout` more               each method compresses every rank's gradient on the side; what training would get
                                     of that is compared with the mean gradient, layer by layer
    then                             nothing

A loss is ‖ĝ - g‖²/‖g‖² with g the mean over the workers and ĝ what the method has of it. Error feedback isn't
simulated: what it remembers depends on the steps that training would take with ĝ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from gradiveq.compressors import COMPRESSORS
from gradiveq.compressors.base import Compressor
from gradiveq.ddp.agreement import compare
from gradiveq.ddp.bucket import COMPRESSIBLE, Parameters, unwrapped
from gradiveq.ddp.layers import compressible_layers
from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.ddp.trials import LayerReport, Mean, Trial
from gradiveq.flatten import Block
from gradiveq.methods import Compressed, GradiVeQ
from gradiveq.powersgd import PowerSGD

Probed = Compressor | Compressed | GradiVeQ | PowerSGD


class Probe:
    """See `probe`, which makes it.

    Attributes:
        iteration: of the next observation.
        left_out: why, by the name of each default method that doesn't fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Mapping[str, Probed] | None,
        sample: int,
        holdout: int,
        also: Sequence[str],
        seed: int,
        process_group: dist.ProcessGroup | None,
    ) -> None:
        if sample < 2 or holdout < 1:
            raise ValueError(f"`sample` must be at least 2 and `holdout` at least 1, got {sample} and {holdout}")
        chosen = default_methods() if methods is None else methods
        if not chosen:
            raise ValueError("`methods` must name at least one, got none")
        self.sample, self.holdout, self.iteration = sample, holdout, 0
        net = model = unwrapped(model)
        if isinstance(model, DistributedDataParallel):
            net, process_group = model.module, process_group or model.process_group
        self._parameters = Parameters(net)
        self._mean = Mean(None if process_group is None else ProcessGroup(process_group, self._parameters.device))
        self._said = {
            "hook": "Probe",
            **{f"method {name}": repr(method) for name, method in chosen.items()},
            **{"sample": sample, "holdout": holdout, "also": list(also), "seed": seed},
            **self._parameters.identity,
        }
        self._compared = False
        convolutions = {block.name for block in compressible_layers(net, self._parameters, also)}
        blocks: list[Block] = []
        offset = 0
        for name, p in zip(self._parameters.names, self._parameters.tensors, strict=True):
            if p.dtype in COMPRESSIBLE and p.numel():
                blocks.append(Block(name, offset, p.numel(), tuple(p.shape), name in convolutions, len(blocks)))
                offset += p.numel()
        if not blocks:
            raise ValueError("`model` has no parameter of float32, float16 or bfloat16 that requires a gradient")
        self._blocks = {block.name: block for block in blocks}
        self._own = np.zeros(offset, np.float32)
        self._flat = torch.from_numpy(self._own)
        self.left_out: dict[str, str] = {}
        self._trials: list[Trial] = []
        for name, method in chosen.items():
            try:
                self._trials.append(self._trial(name, method, blocks, seed))
            except ValueError as error:
                if methods is not None:
                    raise
                self.left_out[name] = str(error)
        if isinstance(model, DistributedDataParallel):
            model.register_comm_hook(self, _hook)

    def _trial(self, name: str, method: Probed, blocks: Sequence[Block], seed: int) -> Trial:
        if isinstance(method, Compressor):
            method = Compressed(method)
        if not isinstance(method, Compressed | PowerSGD | GradiVeQ):
            raise TypeError(
                f"`methods` must be compressors, Compressed, PowerSGD or GradiVeQ, got {method!r} for {name}"
            )
        return Trial(name, method, blocks, self._mean, seed, self.sample)

    @property
    def done(self) -> bool:
        """Whether everything has been measured; then nothing happens on the side any more."""
        return self.iteration >= self.sample + self.holdout

    def observe(self) -> None:
        """Look at the gradients of a model that isn't wrapped, after `backward()`. (A wrapped one is looked at.)

        Parameters whose `.grad` is None count as zeros. Collective if `process_group` was given.
        """
        for name, p in zip(self._parameters.names, self._parameters.tensors, strict=True):
            if name in self._blocks:
                view = self._blocks[name].view(self._flat)
                view.zero_() if p.grad is None else view.copy_(p.grad)
        self._look()

    def on_bucket(self, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
        """What the hook does: DDP's own all-reduce, as it is without a hook."""
        group = self._mean.group
        assert group is not None
        buffer = bucket.buffer()
        self._compare()
        if not self.done:
            for placed in self._parameters.contents(bucket).blocks:
                if placed.name in self._blocks:
                    self._blocks[placed.name].view(self._flat).copy_(placed.view(buffer))
        future = group.all_reduce(buffer.mul_(1 / group.size))
        if bucket.is_last():
            self._look()
        mean: Future[Tensor] = future.then(lambda done: done.value()[0])
        return mean

    def _compare(self) -> None:
        """Refuse ranks that differ, once; collective."""
        if not self._compared and self._mean.group is not None:
            compare(self._mean.group, self._said, self.iteration)
        self._compared = True

    def _look(self) -> None:
        """Collective, and waited for. An iteration with a non-finite gradient on any rank doesn't count."""
        if self.done:
            return
        self._compare()
        message = np.append(self._own, np.float32(0))
        if not np.isfinite(self._own).all():
            message[:] = 0
            message[-1] = 1
        average = self._mean(message)
        if average[-1] > 0 or not np.isfinite(average).all():
            return
        for trial in self._trials:
            if self.iteration < self.sample:
                trial.sample(average[:-1], self.iteration)
            else:
                trial.measure(self._own, average[:-1], self.iteration)
        self.iteration += 1

    def report(self) -> list[LayerReport]:
        """Rows for each method: all layers together, then one by one.

        Raises:
            RuntimeError: nothing has been held out yet.
        """
        if self.iteration <= self.sample:
            raise RuntimeError(
                f"there is nothing to report before {self.sample + 1} iterations with finite gradients, of which "
                f"{self.sample} are sampled, got {self.iteration}"
            )
        return [row for trial in self._trials for row in trial.rows()]

    def table(self, layers: bool = False) -> str:
        """The report as text, and what was left out.

        Args:
            layers: each layer too, and not only all of them together.
        """
        rows = [
            [
                row.method,
                row.layer,
                row.elements,
                row.ratio,
                row.held_out_loss,
                row.in_sample_loss,
                1e3 * row.compress_s,
                1e3 * row.decompress_s,
                1e3 * row.fit_s,
            ]
            for row in self.report()
            if layers or row.layer == "all"
        ]
        headers = [
            "method",
            "layer",
            "elements",
            "ratio",
            "held-out loss",
            "in-sample loss",
            "compress ms",
            "decompress ms",
            "fit ms",
        ]
        text = str(tabulate(rows, headers, floatfmt=("", "", "", ".1f", ".3g", ".3g", ".2f", ".2f", ".1f")))
        reasons = dict.fromkeys(self.left_out.values())
        named = {why: ", ".join(name for name, other in self.left_out.items() if other == why) for why in reasons}
        return "\n".join([text, *(f"left out: {names}, as {why}" for why, names in named.items())])


def _hook(state, bucket):  # type: ignore[no-untyped-def]  # DDP compares annotations with the types themselves
    return state.on_bucket(bucket)


def default_methods() -> dict[str, Probed]:
    """Every compressor as it is by default, PowerSGD of rank 4, GradiVeQ as in the paper and fitted on all slices."""
    return {
        **{name: compressor() for name, compressor in COMPRESSORS.items() if name != "identity"},
        "powersgd:4": PowerSGD(4),
        "gradiveq": GradiVeQ(loss_threshold=0.01),
        "gradiveq:all": GradiVeQ(loss_threshold=0.1, fit_slices="all"),
    }


def probe(
    model: nn.Module,
    methods: Mapping[str, Probed] | None = None,
    *,
    sample: int = 20,
    holdout: int = 10,
    also: Sequence[str] = (),
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
) -> Probe:
    """Find out what methods would do to a model's gradients, while it is trained without compression.

        model = DistributedDataParallel(net)
        found = gradiveq.ddp.probe(model)          # it is the model's communication hook now
        ...                                        # train some 30 iterations or more
        print(found.table())

    Every rank does the same. A model that isn't wrapped is looked at by `found.observe()` after `backward()`; the
    losses are then those of one worker's gradients, or of a `process_group`'s. Gradients stay as they are, to the last
    bit.

    Args:
        model: whose parameters require a gradient now.
        methods: by the name that the report is to give them; None for those of `default_methods()` that fit the model
            and `sample`: `table` says which don't, and why.
        sample: iterations whose mean gradients GradiVeQ's bases are fitted on, whatever its own `sample` is.
        holdout: iterations that are measured after those.
        also: as for `State`.
        seed: of random numbers.
        process_group: as for `State`.
    Raises:
        TypeError, ValueError: an argument is invalid, or a method that was named doesn't fit the model and `sample`.
    Cost: per measured iteration one all-reduce of the gradient and one or two for each method, and compressing all
        of it once with each, while backward waits.
    """
    return Probe(model, methods, sample, holdout, also, seed, process_group)
