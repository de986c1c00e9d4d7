"""The last iteration of a method as a trace, for `--trace`: what every rank did and what was on its way, to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.common.files import file_name
from bench.job.report import Clock
from ring import perfetto
from ring.timeline import Timeline
from ring.trace import RunTrace, critical_path, records


def trace_name(method: str, clock: Clock) -> str:
    """The file's name of a method's trace by one clock."""
    return f"trace-{file_name(method)}{clock.suffix}.perfetto.json.gz"


def rows(timeline: Timeline) -> dict[str, Any]:
    """What one rank has kept by both clocks, to be gathered."""
    return {"wall": records(timeline)} | ({} if timeline.virtual is None else {"virtual": records(timeline.virtual)})


def write(folder: Path, method: str, clocks: Sequence[Clock], said: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write a file for each clock.

    Args:
        said: what `rows` says on each rank.
    Returns:
        Lines for people: what held each iteration up, and where it is written.
    Raises:
        TraceError: what was recorded contradicts itself; ranks on machines whose clocks differ can't be traced.
        OSError: a file can't be written.
    """
    lines = []
    for clock in clocks:
        name = clock.key or "wall"
        trace = RunTrace("virtual" if clock.key else "wall", [ranks[name] for ranks in said], {"method": method})
        content = perfetto.events(trace)
        perfetto.check(content)
        path = folder / trace_name(method, clock)
        perfetto.write(path, content)
        lines.append(
            f"{method}, an iteration on {clock.name}: {critical_path(trace).describe()} All of it is in {path}"
        )
    return lines
