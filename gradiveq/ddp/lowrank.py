"""PowerSGD (`gradiveq.powersgd`) on buckets: two all-reduces each.

    | vectors and small layers, as they are | all P of the bucket | codes |         | all Q of the bucket |
      round 1                                                                         round 2

NumPy, for models on the CPU. (A model that is moved to a GPU only after its State was made has its gradients copied to
the host, which waits for them, and the means back; else see `gradiveq.ddp.native_lowrank`.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.compressors.base import Float32
from gradiveq.ddp.bucket import Plan
from gradiveq.ddp.flaws import OVERFLOWED, any_flaw, flaw
from gradiveq.ddp.memory import Memories, summed
from gradiveq.ddp.scheme import Round, Rounds, Scheme, Traffic, Work
from gradiveq.flatten import Block
from gradiveq.powersgd import PowerSGD, PowerSGDWorker


class PowerSGDScheme(Scheme):
    """A `PowerSGDWorker` for each bucket; what they keep goes by parameters' names from one to the other."""

    def __init__(self, method: PowerSGD, seed: int) -> None:
        self.method, self.seed = method, seed
        self._workers: dict[Plan, PowerSGDWorker] = {}
        self._now: dict[Plan, PowerSGDWorker] = {}  # of this iteration
        self._loaded: dict[str, dict[str, Tensor]] = {"memory": {}, "q": {}}

    def begin(self, iteration: int, traffic: Traffic) -> None:
        self._now = {}

    def rounds(self, work: Work) -> Rounds:
        work.code = int(work.code)
        worker = self._now[work.plan] = self._worker(work)
        gradient = work.gradient().cpu().numpy()
        out = np.empty(work.plan.length, np.float32)
        steps = worker.rounds(gradient, out, work.iteration)
        message = next(steps)
        length = len(message) - work.codes.length
        if worker.overflowed and work.code <= 1:
            largest = int(np.abs(gradient).argmax())
            work.code = flaw(OVERFLOWED, next(p.index for p in work.plan.places if largest < p.stop))
            message.fill(0)
        first = work.message(length)
        _fill(first[:length], message[:length], work)
        single = all(self.method.rank_of(place.shape) is None for place in work.plan.places)
        yield Round([work.all_reduce(first)], last=single)

        work.hear(first, length)
        assert work.heard is not None
        if not any_flaw(work.heard):
            message[:length] = _mean(first[:length], work)
            second = next(steps, None)
            if second is not None:
                wire = torch.empty(len(second), dtype=work.buffer.dtype, device=work.buffer.device)
                _fill(wire, second, work)
                yield Round([work.all_reduce(wire)], last=True)
                second[:] = _mean(wire, work)
                next(steps, None)
            work.write(torch.from_numpy(out).to(work.buffer.device))

    def end(self, compressed: bool) -> None:
        if compressed:
            for worker in self._now.values():
                worker.accept()
            self._workers = dict(self._now)

    def state_dict(self) -> dict[str, Any]:
        return {kind: {name: one.clone() for name, one in kept.items()} for kind, kept in self._by_name().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._workers, self._now = {}, {}
        self._loaded = {kind: dict(state[kind]) for kind in ("memory", "q")}

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """Q is the same on all workers."""
        self._workers, self._now = {}, {}
        memory = summed([state["memory"] for state in states], rank, size, memories)
        self._loaded = {"memory": memory, "q": dict(states[0]["q"])}

    def _worker(self, work: Work) -> PowerSGDWorker:
        found = self._workers.get(work.plan)
        if found is not None:
            return found
        places = work.plan.places
        blocks = [Block(place.name, place.start, place.stop - place.start, place.shape, False) for place in places]
        worker = PowerSGDWorker(blocks, self.method, seed=self.seed, num_extra=work.codes.length)
        known = self._by_name()
        state = worker.state_dict()
        state["q"] = {i: known["q"][p.name].numpy() for i, p in enumerate(places) if p.name in known["q"]}
        if state["memory"] is not None:
            flat = torch.from_numpy(state["memory"])
            for place in places:
                if place.name in known["memory"]:
                    place.view(flat).copy_(known["memory"][place.name])
        worker.load_state_dict(state)
        return worker

    def _by_name(self) -> dict[str, dict[str, Tensor]]:
        """What all workers keep, and what was loaded and is in none yet."""
        found = {kind: dict(kept) for kind, kept in self._loaded.items()}
        for plan, worker in self._workers.items():
            state = worker.state_dict()
            found["q"].update({plan.places[i].name: torch.from_numpy(q) for i, q in state["q"].items()})
            if state["memory"] is not None:
                flat = torch.from_numpy(state["memory"])
                found["memory"].update({place.name: place.view(flat).contiguous() for place in plan.places})
        return found


def _fill(wire: Tensor, message: Float32, work: Work) -> None:
    values = torch.from_numpy(message)
    wire.copy_(work.to_wire(values) if work.half else values)


def _mean(wire: Tensor, work: Work) -> Float32:
    total = wire.cpu()
    mean: Tensor = (work.from_wire(total) if work.half else total) / work.group.size
    return mean.numpy()
