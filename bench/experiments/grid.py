"""Many runs of one experiment, a few at a time in processes of their own, each stored when it ends and not repeated.

    folder/<name>.json          {"spec": what ran, "result": what the run returned, "seconds": how long it took}
    folder/<name>.checkpoint    of a run that was stopped (`bench.simulated.training`)

A run is a function of its spec, a JSON object; what it needs (data, model) it makes itself, so nothing but the spec
travels to its process.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from bench.common.files import plain, read_json, write_json
from bench.common.launch import thread_variables

Spec = Mapping[str, Any]
#: Called with the spec and the file where it may keep a checkpoint; returns JSON values.
Run = Callable[[Spec, Path], dict[str, Any]]


class GridError(RuntimeError):
    """A folder holds another experiment's runs, or runs failed; one line."""


def run_grid(
    run: Run,
    specs: Mapping[str, Spec],
    folder: Path,
    *,
    processes: int = 2,
    threads: int = 1,
    resume: bool = False,
    show: Callable[[str], None] = print,
) -> dict[str, dict[str, Any]]:
    """Do the runs that are not done yet. A run that fails doesn't keep the others from ending.

    Args:
        run: does the run of one spec; a module's function, as spawned processes have to find it.
        specs: the specs by name, which is also a file's: letters, digits, and "_+-.=".
        folder: for their records; made if it isn't there.
        processes: at a time; with 1 they run in this process.
        threads: threads of each run.
        resume: whether to take the runs that are recorded as done; otherwise there may be none.
        show: called with a line whenever a run ends.
    Returns:
        The records by name, in the order of `specs`.
    Raises:
        GridError: a record is of another spec, or is there without `resume`; or runs failed.
        ValueError: an argument is outside its bounds.
    """
    for value, argument in ((processes, "processes"), (threads, "threads")):
        if value < 1:
            raise ValueError(f"`{argument}` must be at least 1, got {value}")
    for name in specs:
        if not re.fullmatch(r"[\w+=-][\w.+=-]*", name):
            raise ValueError(f"a run's name must be letters, digits and _+-.=, got {name!r}")
    folder.mkdir(parents=True, exist_ok=True)
    records = {name: _recorded(folder / f"{name}.json", spec, resume) for name, spec in specs.items()}
    missing = [name for name, record in records.items() if record is None]
    failures: list[str] = []

    def ended(name: str, outcome: Callable[[], dict[str, Any]]) -> None:
        try:
            records[name] = outcome()
        except Exception as error:
            failures.append(f"{name} failed: {type(error).__name__}: {error}")
            show(failures[-1])
        else:
            left = sum(record is None for record in records.values())
            show(f"{name}: {records[name]['seconds']:.1f} s; {len(specs) - left} of {len(specs)} runs")  # type: ignore[index]

    if processes == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            for name in missing:
                ended(name, lambda name=name: _do(run, name, specs[name], folder))  # type: ignore[misc]
        finally:
            torch.set_num_threads(before)
    elif missing:
        context = get_context("spawn")
        told, telling = context.Pipe(duplex=False)
        with (
            _environment(thread_variables(threads)),
            ProcessPoolExecutor(
                min(processes, len(missing)), context, initializer=_prepare, initargs=(threads, told)
            ) as pool,
        ):
            futures = {pool.submit(_do, run, name, dict(specs[name]), folder): name for name in missing}
            try:
                for future in as_completed(futures):
                    ended(futures[future], future.result)
            except BaseException:
                telling.close()  # so that runs in progress end as well; they can be resumed
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        telling.close()
        told.close()
    if failures:
        raise GridError(f"{len(failures)} of {len(specs)} runs failed; the first: {failures[0]}")
    return {name: record for name, record in records.items() if record is not None}


def _read(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = read_json(path)
        record["spec"].keys(), record["result"].keys(), record["seconds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GridError(f"{path} is not a run's record ({error!r})") from error
    return record


def _recorded(path: Path, spec: Spec, resume: bool) -> dict[str, Any] | None:
    if not path.exists():
        return None
    if not resume:
        raise GridError(f"{path} is there already; resume, or choose another folder")
    record, wanted = _read(path), plain(spec)
    for key in sorted(wanted.keys() | record["spec"].keys()):
        ours, theirs = wanted.get(key), record["spec"].get(key)
        if ours != theirs:
            raise GridError(f"{path} was run with {key} = {theirs!r}, now it is {ours!r}; choose another folder")
    return record


def _do(run: Run, name: str, spec: Spec, folder: Path) -> dict[str, Any]:
    """One run, recorded by the process that did it: it counts even if the one that asked is gone."""
    start = time.monotonic()
    result = run(spec, folder / f"{name}.checkpoint")
    record: dict[str, Any] = plain({"spec": spec, "result": result, "seconds": time.monotonic() - start})
    write_json(folder / f"{name}.json", record)
    return record


def _prepare(threads: int, told: connection.Connection) -> None:
    """Set up a process of the pool: its threads, and its end when its parent has stopped, even if that was killed.

    Args:
        told: a pipe whose other end that process closes if it doesn't want the results any more.
    """
    torch.set_num_threads(threads)
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        connection.wait([parent.sentinel, told])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Variables that processes started meanwhile inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
