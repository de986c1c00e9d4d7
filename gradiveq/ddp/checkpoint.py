"""What `State.load_state_dict` is given: whether it is a State's, and one that fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gradiveq.ddp.agreement import disagreement
from gradiveq.exchange.error_memory import Memories
from gradiveq.exchange.family import check_shapes
from gradiveq.report import listed

_FIELDS = {"identity": Mapping, "rank": int, "size": int, "iteration": int, "traffic": list, "family": Mapping}


def fitting(
    state: object,
    memories: Memories | None,
    identity: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    rank: int,
    size: int,
) -> list[Mapping[str, Any]]:
    """The states to go on from: this rank's own, or with another number of workers all that were given.

    Args:
        state, memories: as `State.load_state_dict` has them.
        identity: what has to be the same there and here.
        shapes: of the parameters' gradients, by name.
        rank, size: of this worker.
    Raises:
        ValueError: they don't fit.
    """
    states = [state] if isinstance(state, Mapping) else state
    if not isinstance(states, list | tuple):
        raise ValueError(f"`state` must be a state, or a list of those of all ranks, got {type(state).__name__}")
    if not states:
        raise ValueError("`state` must be a state, or a list of those of all ranks, got an empty list")
    for one in states:
        _check(one, identity, shapes)
    if len({one["iteration"] for one in states}) > 1:
        raise ValueError(f"the states are of different iterations: {[one['iteration'] for one in states]}")
    if memories not in (None, "sum", "drop"):
        raise ValueError(f"`memories` must be 'sum' or 'drop', got {memories!r}")
    old_size = states[0]["size"]
    if old_size != size and memories is None:
        raise ValueError(
            f"the state is of one of {old_size} workers, here are {size}: say what becomes of memories, 'sum' "
            "(with the list of all old states) or 'drop'"
        )
    if len(states) > 1 or memories == "sum":
        ranks = [one["rank"] for one in states]
        if ranks != list(range(old_size)):
            raise ValueError(f"the states must be of ranks 0 ... {old_size - 1} in order, got those of {ranks}")
    if old_size != size:
        return list(states)
    own: Mapping[str, Any] = states[rank] if len(states) > 1 else states[0]
    if own["rank"] != rank:
        raise ValueError(f"the state is rank {own['rank']}'s, this is rank {rank}")
    return [own]


def _check(state: object, identity: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if not isinstance(state, Mapping):
        raise ValueError(f"`state` must be what `State.state_dict()` gives, got {type(state).__name__}")
    for name, kind in _FIELDS.items():
        if not isinstance(state.get(name), kind):
            found = f"a {type(state[name]).__name__} as" if name in state else "no"
            keys = listed([repr(key) for key in state]) or "nothing"
            raise ValueError(f"`state` must be what `State.state_dict()` gives; this has {found} {name!r}, but {keys}")
    difference = disagreement([state["identity"], identity], ("there", "here"))
    if difference:
        raise ValueError(f"the state is of another model or method: {difference}")
    check_shapes(state["family"], shapes)
