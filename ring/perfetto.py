"""A trace as a file that Perfetto (ui.perfetto.dev) and chrome://tracing open: Chrome's Trace Event Format.

    write(Path("run.json.gz"), events(run))

Each worker is a process with two threads, "computing" and "link to rank r"; each message is an arrow from its slice
on the link to the wait that it ends, or to what was done with it. By the wall clock a message's slice begins when it
was posted (or the one before it was found) and ends when it was found, because more is not known.

The format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. Times are microseconds with
up to three decimals, as readers count nanoseconds.
"""

from __future__ import annotations

import gzip
import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ring.trace import Activity, RunTrace, TraceError, Transfer

#: Keys that an event must have besides "name", "ph", "pid" and "tid", by its phase (`ph`).
REQUIRED: dict[str, tuple[str, ...]] = {
    "X": ("ts", "dur"),
    "s": ("ts", "id", "cat"),
    "f": ("ts", "id", "cat", "bp"),
    "M": ("args",),
}
#: Names of the events that describe processes and threads, and the key of what each says.
METADATA = {
    "process_name": "name",
    "thread_name": "name",
    "process_sort_index": "sort_index",
    "thread_sort_index": "sort_index",
}
#: JavaScript holds whole numbers exactly up to this one.
SAFE_INTEGER = 2**53


def _ns(time_s: float) -> int:
    return round(time_s * 1e9)


def _us(time_ns: int) -> float:
    return time_ns / 1000


def _ids(rank: int) -> tuple[int, int, int]:
    """Ids of a worker's process and of its two threads, "computing" and "link".

    None is 0 or another worker's. The main thread has its process's id, by which readers know it.
    """
    return 10 * rank + 10, 10 * rank + 10, 10 * rank + 11


def events(trace: RunTrace) -> dict[str, Any]:
    """Content of the file, in JSON's types; it passes `check`."""
    found: list[dict[str, Any]] = []
    for rank in range(trace.size):
        found += _names(rank, trace.size)
    slices = [event for rank in range(trace.size) for event in _slices(trace, rank)]
    # In the order of time, and a slice before what begins in it.
    found += sorted(slices, key=lambda event: (event["ts"], event["ph"] != "X"))
    return {"traceEvents": found, "displayTimeUnit": "ms", "otherData": {"clock": trace.clock, **trace.about}}


def _names(rank: int, size: int) -> Iterator[dict[str, Any]]:
    process, computing, link = _ids(rank)
    names: list[tuple[int, str, Any]] = [
        (computing, "process_name", f"rank {rank}"),
        (computing, "process_sort_index", rank),
        (computing, "thread_name", "computing"),
        (computing, "thread_sort_index", 0),
    ]
    if size > 1:
        names += [(link, "thread_name", f"link to rank {(rank + 1) % size}"), (link, "thread_sort_index", 1)]
    for thread, name, value in names:
        yield {"name": name, "ph": "M", "pid": process, "tid": thread, "args": {METADATA[name]: value}}


def _slices(trace: RunTrace, rank: int) -> Iterator[dict[str, Any]]:
    """Slices for what a worker did and for what went over its link, and the arrows from there."""
    process, computing, link = _ids(rank)
    for activity in trace.activities[rank]:
        about = {name: getattr(activity, name) for name in ("call", "step", "segment", "chunk")}
        yield _slice(
            activity.kind,
            process,
            computing,
            _ns(activity.start_s),
            _ns(activity.end_s),
            {name: value for name, value in about.items() if value is not None},
        )
    receiver = (rank + 1) % trace.size
    receiving = _receiving(trace.activities[receiver])
    free = 0
    for number, message in enumerate(trace.transfers[rank]):
        start = max(_ns(message.departed_s), free)
        free = end = max(start, _ns(message.left_s if trace.exact else message.arrived_s))
        about = {
            "call": message.call,
            "step": message.step,
            "segment": message.segment,
            "chunk": message.chunk,
            "bytes": message.num_bytes,
            "posted_us": _us(_ns(message.posted_s)),
            "left_us": _us(_ns(message.left_s)),
            "arrived_us": _us(_ns(message.arrived_s)),
        }
        yield _slice(f"step {message.step}, segment {message.segment}", process, link, start, end, about)
        target = _target(message, receiving)
        if target is not None and start < end:
            first, last = max(start, _ns(target.start_s)), _ns(target.end_s)
            if first < last:
                flow = {"name": "message", "cat": "message", "id": number * trace.size + rank + 1}
                yield {**flow, "ph": "s", "pid": process, "tid": link, "ts": _us(start)}
                where = _ids(receiver)
                yield {**flow, "ph": "f", "bp": "e", "pid": where[0], "tid": where[1], "ts": _us((first + last) // 2)}


def _slice(name: str, process: int, thread: int, start: int, end: int, about: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "ph": "X",
        "pid": process,
        "tid": thread,
        "ts": _us(start),
        "dur": _us(end - start),
        "args": about,
    }


Receiving = dict[tuple[int, int, int], list[Activity]]


def _receiving(activities: Sequence[Activity]) -> Receiving:
    """Activities by what they were for."""
    found: Receiving = {}
    for activity in activities:
        if activity.step is not None and activity.chunk is not None:
            found.setdefault((activity.call, activity.step, activity.chunk), []).append(activity)
    return found


def _target(message: Transfer, receiving: Receiving) -> Activity | None:
    """The wait that a message ended, or else what was first done with it."""
    candidates = receiving.get((message.call, message.step + 1, message.chunk), [])
    for activity in candidates:
        if activity.kind == "wait" and activity.start_s < activity.end_s <= message.arrived_s:
            if activity.end_s >= message.left_s:
                return activity
        elif activity.kind not in ("wait", "encode") and activity.start_s >= message.arrived_s:
            return activity
    return None


def check(content: Mapping[str, Any]) -> None:
    """Hold a file's content against the format's rules.

    Every event has the keys that its phase must have, numbers that JSON can hold, and times and durations that are not
    negative. The slices of a thread are one after the other or nested, never overlapping by a part. A flow starts once
    and ends once, not earlier, each in a slice of its thread. Every process and thread has a name, and a thread belongs
    to one process.

    Raises:
        TraceError: with the first event that breaks one.
    """
    try:
        json.dumps(content, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TraceError(f"not JSON: {error}") from error
    listed = content.get("traceEvents")
    if not isinstance(listed, list):
        raise TraceError("`traceEvents` must be a list")
    slices: dict[tuple[int, int], list[tuple[int, int]]] = {}
    flows: dict[tuple[str, str, int], dict[str, Mapping[str, Any]]] = {}
    named: dict[str, set[int]] = {"process_name": set(), "thread_name": set()}
    processes: dict[int, int] = {}
    for event in listed:
        _check_event(event)
        thread = event["pid"], event["tid"]
        if processes.setdefault(event["tid"], event["pid"]) != event["pid"]:
            raise TraceError(f"thread {event['tid']} is in two processes: {event}")
        if event["ph"] == "M":
            key = event["pid"] if event["name"].startswith("process") else event["tid"]
            if event["name"] in named and key in named[event["name"]]:
                raise TraceError(f"named twice: {event}")
            named.setdefault(event["name"], set()).add(key)
        elif event["ph"] == "X":
            start = round(1000 * event["ts"])
            slices.setdefault(thread, []).append((start, start + round(1000 * event["dur"])))
        else:
            ends = flows.setdefault((event["cat"], event["name"], event["id"]), {})
            if event["ph"] in ends:
                raise TraceError(f"a flow with two events of one kind: {event}")
            ends[event["ph"]] = event
    outer: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for thread, found in slices.items():
        if thread[0] not in named["process_name"] or thread[1] not in named["thread_name"]:
            raise TraceError(f"thread {thread[1]} of process {thread[0]} has no name, or its process has none")
        outer[thread] = _outermost(thread, found)
    for flow, ends in flows.items():
        if set(ends) != {"s", "f"}:
            raise TraceError(f"flow {flow} doesn't both start and end")
        if ends["f"]["ts"] < ends["s"]["ts"]:
            raise TraceError(f"flow {flow} ends before it starts")
        for event in ends.values():
            time, around = round(1000 * event["ts"]), outer.get((event["pid"], event["tid"]), [])
            index = bisect_right(around, time, key=lambda slice: slice[0]) - 1
            if index < 0 or time >= around[index][1]:
                raise TraceError(f"no slice to bind to: {event}")


def _check_event(event: Any) -> None:
    if not isinstance(event, dict):
        raise TraceError(f"an event must be an object, got {event!r}")
    phase = event.get("ph")
    if phase not in REQUIRED:
        raise TraceError(f"`ph` must be one of {', '.join(REQUIRED)}: {event}")
    for key in ("name", "pid", "tid", *REQUIRED[phase]):
        if key not in event:
            raise TraceError(f"`{key}` is missing: {event}")
    for key in ("name", "cat"):
        if not isinstance(event.get(key, ""), str):
            raise TraceError(f"`{key}` must be text: {event}")
    for key in ("pid", "tid", "id"):
        if not (type(event.get(key, 0)) is int and 0 <= event.get(key, 0) < SAFE_INTEGER):
            raise TraceError(f"`{key}` must be a whole number below 2**53: {event}")
    for key in ("ts", "dur"):
        value = event.get(key, 0)
        if type(value) not in (int, float) or not math.isfinite(value) or value < 0:
            raise TraceError(f"`{key}` must be a number that is not negative: {event}")
    if phase == "f" and event["bp"] != "e":
        raise TraceError(f"`bp` must be 'e' to bind to the slice around it: {event}")
    if phase == "M" and (event["name"] not in METADATA or METADATA[event["name"]] not in event["args"]):
        raise TraceError(f"unknown metadata: {event}")


def _outermost(thread: tuple[int, int], slices: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The slices of a thread that are in no other, in order; they hold all others as a whole."""
    found: list[tuple[int, int]] = []
    around: list[int] = []
    for start, end in sorted(slices, key=lambda slice: (slice[0], -slice[1])):
        while around and around[-1] <= start:
            around.pop()
        if around and end > around[-1]:
            raise TraceError(f"slices of thread {thread} overlap at {_us(start)} us without nesting")
        if not around:
            found.append((start, end))
        around.append(end)
    return found


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write the file, as a whole or not at all; compressed if its name ends in .gz, which Perfetto opens as it is."""
    data = json.dumps(content, allow_nan=False, separators=(",", ":")).encode()
    partial = path.with_name(f".{path.name}.partial")
    try:
        # Without a time in its header, so that the same trace gives the same bytes.
        partial.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
