"""GradiVeQ: windows of sampled and compressed iterations (section 3 of Yu et al. 2018).

    warm-up     | the gradient |                                                                      one sum
    sample      | the gradient |      uncompressed, or by QSGD where each hop of a ring can add       one sum
                then, off the critical path where the driver can:
                  each worker adds the mean to its statistics; after Lt samples it fits its share
                  of the bases; d of all groups is summed, the shares are gathered, and every
                  worker rebuilds the same bases, which digests confirm
    compress    | Uᵀ(g - µ) of the layers | what is between them |                                    one sum

Sampled iterations give every worker the same bits, QSGD's noise included, and these bits both update the model and are
PCA's samples. Everything is a mean over the workers, not a sum: gradients, samples, and µ, which is the µ/N of Eq. 3.

**Error feedback** remembers x - (U Uᵀ(x - µ) + µ) of each worker's own x. With fixed bases that is orthogonal to what
they span, so it is sent in the next sampled iteration, whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from gradiveq.device.host_copy import HostCopy
from gradiveq.exchange.error_memory import ErrorFeedback, Memories
from gradiveq.exchange.family import Family, as_arrays, as_tensors
from gradiveq.exchange.requests import Call, Compare, Exchange, Gather, Iteration, Round, Sum
from gradiveq.flatten import Block, slice_sizes
from gradiveq.methods import GradiVeQ, Plain
from gradiveq.pca.basis import LayerBasis, basis_from, basis_state
from gradiveq.pca.coding import Bases, as_loss, ordered
from gradiveq.pca.config import Float64
from gradiveq.pca.projection import squares
from gradiveq.pca.sampling import PCASampler
from gradiveq.pca.schedule import majority
from gradiveq.pca.window_log import WindowLog, raise_failures


class Windows(Family):
    """One worker's side: samples, bases, losses.

    Args:
        layers: what may be compressed, in the order of Fig. 3a.
        rank, size: as in MPI.
        warmup: iterations of warm-up at least.
        min_ratio: a layer that would not become so many times smaller goes uncompressed in a window.
    Raises:
        ValueError: there is no layer, or the method doesn't fit them.
    """

    def __init__(
        self,
        method: GradiVeQ,
        layers: Sequence[Block],
        rank: int,
        size: int,
        *,
        warmup: int = 0,
        min_ratio: float = 1.0,
    ) -> None:
        super().__init__(ErrorFeedback() if method.error_feedback else None)
        if not layers:
            raise ValueError("GradiVeQ compresses convolutions (groups=1); `model` has none: use Plain or QSGDRing")
        self.method, self.rank, self.size, self.min_ratio = method, rank, size, min_ratio
        self._window_log = WindowLog(method, max(method.warmup, warmup))
        self.schedule = self._window_log.schedule
        self._layers: dict[str, Block] = {}
        start = 0
        for layer in layers:  # each has its place in a sample
            self._layers[layer.name] = replace(layer, start=start, stride=None)
            start += layer.length
        self.fitted = tuple(self._layers)
        self._sample = np.zeros(start, np.float32)
        self._slice_sizes = slice_sizes(layers, method.slice_size)
        self._new_sampler().check(method.most_samples)
        self._sampler: PCASampler | None = None
        self._bases: list[LayerBasis] = []
        self._in_use: Bases | None = None
        self._fit_due = False  # once the sample of the last iteration is in
        self._iteration = 0
        # The iteration under way, by layer. On a GPU nothing waits for them until it is over.
        self._samples: dict[str, HostCopy] = {}
        self._held_out: dict[str, HostCopy] = {}
        self._votes: Callable[[], int] | None = None

    @property
    def phase(self) -> str:
        return self.schedule.phase

    @property
    def vote(self) -> bool:  # type: ignore[override]
        return self._window_log.vote

    @property
    def log(self) -> Sequence[dict[str, Any]]:  # type: ignore[override]
        return self._window_log.entries

    def stays_on_device(self) -> bool:
        return self.phase != "sample" or isinstance(self.method.sampling, Plain)

    def rounds(self, call: Call, x: Any, latest: Any) -> Exchange:
        layers = [block for block in call.bucket.blocks if block.name in self._layers]
        if self.phase == "compress":
            return (yield from self._compressed(call, layers, x))
        sampling = self.method.sampling if self.phase == "sample" and call.per_hop else Plain()
        ((mean,),) = yield Round([Sum([x], sampling, mean=True)])
        if self.phase == "sample":
            values = call.kernels.tensor(mean)
            for block in layers:
                self._samples[block.name] = HostCopy(ordered(block, values))
        if self.memory.feedback is not None:
            self.memory.keep(call, x, call.kernels.zeros(call.bucket.length), call.bucket.length, x.nbytes)
        return mean

    def _compressed(self, call: Call, layers: Sequence[Block], x: Any) -> Exchange:
        kernels, bases = call.kernels, self._in_use
        assert bases is not None
        every = self.method.holdout_every
        due = every > 0 and self.schedule.done % every == 0
        bases.monitor = due or self.method.compress == "auto"
        if self.memory.feedback is not None:
            self._keep(call, x, bases)
        requests = [Sum([x], bases, mean=True)]
        if due:
            with call.now.span("measure"):
                lossy = [block for block in layers if block.name in bases.by_name]
                exact = [ordered(block, kernels.tensor(x)) for block in lossy]
            requests.append(Sum([kernels.array(one) for one in exact], mean=True, purpose="measure"))
        ((mean,), *measured) = yield Round(requests)
        self._votes = call.votes if self.method.compress == "auto" else None
        if due:
            with call.now.span("measure"):
                values = kernels.tensor(mean)
                means = {block.name: kernels.tensor(own) for block, own in zip(lossy, measured[0], strict=True)}
                for block in layers:  # nothing is lost of those without bases, but they are part of the whole
                    found = ordered(block, values)
                    self._held_out[block.name] = HostCopy(squares(found, means.get(block.name, found)))
        return mean

    def _keep(self, call: Call, x: Any, bases: Bases) -> None:
        """What the bases leave out of this worker's own gradient."""
        kernels = call.kernels
        values = kernels.tensor(x)
        coding = bases.coding(call.bucket, values.device)
        left = kernels.empty(call.bucket.length)
        coding.decode(coding.encode(values), kernels.tensor(left))
        left = x - left
        self.memory.keep(call, x, left, call.bucket.length, 4 * coding.length)

    def accept(self, now: Iteration, mean: Any = None) -> Exchange | None:
        super().accept(now, mean)
        self._iteration = now.number
        if self.phase == "warm-up":
            self.schedule.advance()
        elif self.phase == "sample":
            return self._after_sample(now)
        else:
            self._after_compressed(now)
        return None

    def skip(self) -> None:
        super().skip()
        self._samples, self._held_out, self._votes = {}, {}, None
        if self._in_use is not None:
            self._in_use.local = {}

    # Sampling

    def _after_sample(self, now: Iteration) -> Exchange:
        for name, sample in self._samples.items():
            self._sample[self._layers[name].where] = sample.value.numpy()
        self._samples = {}
        first = self._sampler is None
        if self._sampler is None:
            self._sampler = self._new_sampler()
            self._window_log.open(now.number)
        self._fit_due = self._window_log.sampled()
        return self._absorb(now, first)

    def _absorb(self, now: Iteration, first: bool) -> Exchange:
        """Take the sample, and fit if it is time."""
        assert self._sampler is not None
        if first and self._in_use is not None:
            with now.span("measure"):
                losses = self._in_use.losses_on(list(self._layers.values()), torch.from_numpy(self._sample))
                self._report(now, self._window_log.replaced(now.number, losses))
            self._bases, self._in_use = [], None
        with self._window_log.fitting(now.clock), now.span("fit"):
            self._sampler.add(self._sample)
        if self._fit_due:
            yield from self._fit(now)

    def _fit(self, now: Iteration) -> Exchange:
        """Fit this rank's share, agree on every group's d, and with the last sample on the bases.

        Raises:
            FitError: some rank failed, on all ranks.
        """
        sampler, log = self._sampler, self._window_log
        assert sampler is not None
        bytes_before, seconds_before = now.fit_bytes, now.fit_s
        with log.fitting(now.clock), now.span("fit"):
            dims = sampler.fit()
        ((dims,),) = yield Round([Sum([dims], purpose="fit")], last=False)
        raise_failures(sampler, dims, f"in iteration {self._iteration}")
        self._fit_due = False
        if log.checked(dims):
            yield from self._share(now, sampler, dims)
        log.exchanged_for_fit(now.fit_bytes - bytes_before, now.fit_s - seconds_before)

    def _share(self, now: Iteration, sampler: PCASampler, dims: Float64) -> Exchange:
        with self._window_log.fitting(now.clock), now.span("fit"):
            share, lengths = sampler.share(dims)
        (shares,) = yield Round([Gather(share, lengths, "fit")], last=False)
        with self._window_log.fitting(now.clock), now.span("fit"):
            bases = sampler.rebuild(dims, shares)
            self._sampler = None
            digests = np.array([int(basis.digest, 16) - 2**63 for basis in bases], np.int64)
        yield Round([Compare(digests, [basis.name for basis in bases])])
        with self._window_log.fitting(now.clock), now.span("fit"):
            self._use(bases)
        assert self._in_use is not None
        self._window_log.fitted(bases, self._in_use.by_name)

    def _use(self, bases: Sequence[LayerBasis]) -> None:
        self._bases, self._in_use = list(bases), Bases(bases, self.min_ratio)

    def _new_sampler(self) -> PCASampler:
        return PCASampler(
            tuple(self._layers.values()),
            self._slice_sizes,
            self.method.pca,
            self.rank,
            self.size,
            self.method.most_samples,
        )

    # Compressing

    def _after_compressed(self, now: Iteration) -> None:
        assert self._in_use is not None
        if self._held_out:
            losses = {name: as_loss(self._held_out[name]) for name in self._layers if name in self._held_out}
            self._report(now, self._window_log.held_out(now.number, losses))
        if self._in_use.monitor:
            now.losses["local"] = self._in_use.take_local_loss().relative
        stop = self._votes is not None and majority(self._votes(), self.size)
        self._held_out, self._votes = {}, None
        self._window_log.compressed(now.ratio, stop, now.losses.get("local"))

    @staticmethod
    def _report(now: Iteration, record: Mapping[str, Any]) -> None:
        now.losses |= {name: record[name] for name in ("held_out", "layers")}

    # Checkpoints

    def pending(self, now: Iteration) -> Exchange | None:
        return self._fit(now) if self._fit_due else None

    def state_dict(self) -> dict[str, Any]:
        state = {
            "windows": self._window_log.state_dict(),
            "sampler": None if self._sampler is None else self._sampler.state_dict(),
            "fit_due": self._fit_due,
            "iteration": self._iteration,
            "bases": [basis_state(basis) for basis in self._bases],
        }
        return {**super().state_dict(), **as_tensors(state)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._load_common(state)
        self._fit_due, self._iteration = state["fit_due"], state["iteration"]
        if state["sampler"] is not None:
            self._sampler = self._new_sampler()
            self._sampler.load_state_dict(as_arrays(state["sampler"]))

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """µ and the bases are of the mean gradient. Samples are divided among the ranks: sampling begins anew."""
        super().load_others(states, memories, rank, size)
        self._load_common(states[0])
        self._window_log.restart_sampling()

    def _load_common(self, state: Mapping[str, Any]) -> None:
        self._fit_due, self._sampler = False, None
        self._window_log.load_state_dict(state["windows"])
        bases = [basis_from(as_arrays(part)) for part in state["bases"]]
        for basis in bases:
            if basis.name not in self._layers or basis.length != self._layers[basis.name].length:
                raise ValueError(
                    f"the state's basis of {basis.name} is of {basis.length} elements, and not this model's"
                )
        self._bases, self._in_use = [], None
        if bases:
            self._use(bases)
