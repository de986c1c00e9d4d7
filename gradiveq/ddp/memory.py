"""What error feedback remembers of each parameter: flat per bucket while buckets last, by name beyond."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from gradiveq.ddp.bucket import Place, Plan

#: What becomes of memories where the number of workers changes.
Memories = Literal["sum", "drop"]


class Memory:
    """Vectors as long as the buckets, in the buckets' order of elements, float32; zeros to begin with.

    A call counts once it is committed, so that an iteration that is skipped leaves no trace.
    """

    def __init__(self) -> None:
        self._flat: dict[Plan, Tensor] = {}
        self._staged: dict[Plan, Tensor] = {}
        self._home: dict[str, tuple[Plan, Place]] = {}
        self._loaded: dict[str, Tensor] = {}

    def of(self, plan: Plan, device: torch.device) -> Tensor:
        """A bucket's memory; not to be modified. Parameters keep theirs if they were in another bucket before."""
        flat = self._flat.get(plan)
        if flat is not None:
            return flat
        known = self.by_name()
        flat = torch.zeros(plan.length, dtype=torch.float32, device=device)
        for place in plan.places:
            if place.name in known:
                place.view(flat).copy_(known[place.name])
            self._home[place.name] = plan, place
            self._loaded.pop(place.name, None)
        self._flat[plan] = flat
        lived_in = {plan for plan, _ in self._home.values()}
        self._flat = {plan: tensor for plan, tensor in self._flat.items() if plan in lived_in}
        return flat

    def stage(self, plan: Plan, flat: Tensor) -> None:
        """What the bucket's memory will be, unless the iteration is skipped."""
        self._staged[plan] = flat

    def commit(self) -> None:
        self._flat.update(self._staged)
        self._staged = {}

    def forget(self) -> None:
        """The iteration is skipped."""
        self._staged = {}

    def by_name(self) -> dict[str, Tensor]:
        """Each parameter's memory, in its shape; views."""
        return {**self._loaded, **{name: place.view(self._flat[plan]) for name, (plan, place) in self._home.items()}}

    def state_dict(self) -> dict[str, Tensor]:
        return {
            name: tensor.cpu().clone(memory_format=torch.contiguous_format) for name, tensor in self.by_name().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._flat, self._staged, self._home = {}, {}, {}
        self._loaded = {name: tensor.clone() for name, tensor in state.items()}


def summed(states: Sequence[Mapping[str, Tensor]], rank: int, size: int, rule: Memories) -> dict[str, Tensor]:
    """A rank's memory from those of another number of workers.

    With "sum" rank r of M takes those of the N old ranks r, r + M, ..., times M/N: the mean over the workers of what
    has been left out stays what it was. With "drop" it is forgotten.
    """
    total: dict[str, Tensor] = {}
    if rule == "sum":
        for old in range(rank, len(states), size):
            for name, tensor in states[old].items():
                share = tensor * (size / len(states))
                total[name] = total[name] + share if name in total else share
    return total
