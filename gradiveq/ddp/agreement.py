"""Whether the ranks of a group were told the same, found out before anything is sent that would not fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradiveq.ddp.process_group import ProcessGroup
from gradiveq.report import listed


def compare(group: ProcessGroup, said: Mapping[str, Any], iteration: int, refused: str = "") -> None:
    """Refuse ranks that differ, or of which some can't go on; collective, 8 bytes from each rank.

    Args:
        said: what has to be the same on all.
        refused: why this rank can't go on, if it can't.
    Raises:
        ValueError: on all ranks, naming what differs where, or what was refused where.
    """
    digest = hashlib.blake2b(repr((sorted(said.items()), refused)).encode(), digest_size=8).digest()
    with group.exchange("the comparison of the ranks' models and options", iteration):
        table = group.rows_of(np.frombuffer(digest, np.int64))
        if not refused and (table == table[0]).all():
            return
        everybody = group.objects_of((dict(said), refused))
    reasons: dict[str, list[str]] = {}
    for rank, (_, why) in enumerate(everybody):
        if why:
            reasons.setdefault(why, []).append(f"rank {rank}")
    if reasons:
        raise ValueError("; ".join(f"on {listed(ranks)} {why}" for why, ranks in reasons.items()))
    raise ValueError(f"the ranks' models, methods or options differ: {disagreement([one for one, _ in everybody])}")


def disagreement(told: Sequence[Mapping[str, Any]], labels: Sequence[str] | None = None) -> str:
    """The first of all entries that isn't the same in all, or nothing."""
    for key in dict.fromkeys(key for one in told for key in one):
        where: dict[str, list[str]] = {}
        for index, one in enumerate(told):
            value = repr(one[key]) if key in one else "missing"
            where.setdefault(value, []).append(labels[index] if labels else f"rank {index}")
        if len(where) > 1:
            return f"{key} is " + " and ".join(f"{value} {_on(places)}" for value, places in where.items())
    return ""


def _on(places: Sequence[str]) -> str:
    return listed(list(places)) if places[0] in ("there", "here") else "on " + listed(list(places))
