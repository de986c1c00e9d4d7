"""Records and compares: see the package."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT

GOLDEN = Path(__file__).with_name("golden.json")
DRIVERS = ("payloads", "here", "lockstep", "mpi", "hook")
#: Whose threads would change the order of additions.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
#: Of a processor that isn't the recorded one.
RTOL = 1e-4
#: Digests and counts that follow the last bits of a BLAS.
LAST_BITS = ("weights", "means", "log", "all_ranks", "rows")


def fingerprint() -> dict[str, str]:
    """What the last bits of a BLAS depend on."""
    import numpy
    import scipy
    import torch

    from ring.machine import processor

    return {
        "processor": processor(),
        "machine": platform.machine(),
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "torch": torch.__version__,
        "OPENBLAS_CORETYPE": os.environ.get("OPENBLAS_CORETYPE", ""),
    }


def case_names(driver: str) -> list[str]:
    from . import cases

    match driver:
        case "payloads":
            return list(cases.payloads())
        case "here":
            return [*cases.here(), "probe"]
        case "lockstep":
            return list(cases.lockstep())
        case "mpi":
            return [name for name, case in cases.lockstep().items() if case.over_mpi]
    return [*cases.hook(), "probe"]


def by_library(driver: str, name: str) -> bool:
    """Whether a BLAS takes part in a case."""
    from . import cases

    name = re.sub(r", \d ranks$", "", name) if driver == "hook" else name
    if name == "probe":
        return True
    if driver == "payloads":
        return False
    found = {"here": cases.here, "hook": cases.hook}.get(driver, cases.lockstep)()
    return found[name].by_library


def run(driver: str, only: str = "", seed: int = 0, every: int = 1) -> dict[str, Any]:
    """The results of a driver's cases whose name matches; {"error": a traceback} of one that fails.

    Args:
        every: 3 for the first, the fourth and so on.
    Raises:
        RuntimeError: a job of several ranks failed.
    """
    from . import cases

    names = [name for name in case_names(driver)[::every] if re.search(only, name)]
    if not names:
        return {}
    if driver == "mpi":
        return _job([str(Path(sys.executable).parent / "mpirun"), "-n", "3", sys.executable], driver, names, seed)
    if driver == "hook":
        found = {}
        for size in (2, 3):
            torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", str(size)]
            chosen = names if size == 2 else [name for name in names if name in (*cases.ON_THREE_RANKS, "probe")]
            if chosen:
                found |= _job(torchrun, driver, chosen, seed)
        return found

    import torch

    from . import inputs
    from .in_process import here_case, payload_case, probe_case
    from .on_ring import lockstep_case

    torch.set_num_threads(1)
    inputs.SEED = seed
    known: Mapping[str, Any] = {"payloads": cases.payloads, "here": cases.here, "lockstep": cases.lockstep}[driver]()
    results = {}
    for name in names:
        try:
            if name == "probe":
                results[name] = probe_case()
            elif driver == "payloads":
                results[name] = payload_case(known[name])
            else:
                do: Callable[[str, Any], dict[str, Any]] = here_case if driver == "here" else lockstep_case
                results[name] = do(name, known[name])
        except Exception:
            results[name] = {"error": traceback.format_exc()}
    return results


def _job(command: Sequence[str], driver: str, names: Sequence[str], seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        done = subprocess.run(
            [*command, "-m", "tests.golden.ranks", str(out), str(seed), driver, json.dumps(names)],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=900,
        )
        if done.returncode or not out.exists():
            raise RuntimeError(f"the job {driver} failed:\n{done.stdout[:6000]}")
        found: dict[str, Any] = json.loads(out.read_text())
        return found


# --- the record ------------------------------------------------------------------------------------------------------


def load() -> dict[str, Any]:
    """{"fingerprint", driver: {case: result}}; states of cases are lists of names again."""
    record: dict[str, Any] = json.loads(GOLDEN.read_text())
    lists = record.pop("state_names")
    for driver in DRIVERS:
        for result in record.get(driver, {}).values():
            if "state" in result:
                result["state"] = lists[result["state"]]
    return record


def save(record: dict[str, Any]) -> None:
    """A line for each case; names of states apart, each list of them once."""
    lists: list[list[str]] = []
    lines = [f'"fingerprint": {json.dumps(record["fingerprint"])}']
    for driver in DRIVERS:
        if driver not in record or driver == "mpi":
            continue
        rows = []
        for name, result in record[driver].items():
            kept = dict(result)
            if "state" in kept:
                if kept["state"] not in lists:
                    lists.append(kept["state"])
                kept["state"] = lists.index(kept["state"])
            rows.append(f"{json.dumps(name)}: {json.dumps(kept, separators=(',', ':'))}")
        lines.append(f'"{driver}": {{\n' + ",\n".join(rows) + "\n}")
    names = ",\n".join(json.dumps(one, separators=(",", ":")) for one in lists)
    lines.append(f'"state_names": [\n{names}\n]')
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(recorded: Any, found: Any, exact: bool) -> Iterator[tuple[str, Any, Any]]:
    """(field, recorded, found) of what isn't the same.

    Args:
        exact: to the last bit; otherwise a BLAS of another processor may have taken part.
    """
    if recorded is None:
        yield "", "no such case", "found"
        return
    if "error" in found:
        yield "error", None, found["error"].strip().splitlines()[-1]
        return
    for field in dict.fromkeys([*recorded, *found]):
        ours, theirs = recorded.get(field), found.get(field)
        if exact:
            if ours != theirs:
                yield from _inside(field, ours, theirs)
        elif field not in LAST_BITS and not _close(ours, theirs):
            yield from _inside(field, ours, theirs)


def _inside(field: str, ours: Any, theirs: Any) -> Iterator[tuple[str, Any, Any]]:
    """Which parts of a field differ, if it has some."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in dict.fromkeys([*ours, *theirs]):
            if ours.get(key) != theirs.get(key):
                yield f"{field}.{key}", ours.get(key), theirs.get(key)
    elif field == "state":
        yield field, sorted(set(ours or []) - set(theirs or [])), sorted(set(theirs or []) - set(ours or []))
    else:
        yield field, ours, theirs


def _close(ours: Any, theirs: Any, scale: float = 0.0) -> bool:
    """Whether numbers are equal within `RTOL`; digests count as equal."""
    if isinstance(ours, bool | str) or ours is None:
        return bool(ours == theirs)
    if isinstance(ours, int | float):
        return isinstance(theirs, int | float) and abs(ours - theirs) <= RTOL * max(abs(ours), scale)
    if isinstance(ours, list):
        numbers = [abs(one) for one in ours if isinstance(one, float)]
        largest = max(numbers, default=0.0)
        return (
            isinstance(theirs, list)
            and len(ours) == len(theirs)
            and all(_close(one, other, largest) for one, other in zip(ours, theirs, strict=True))
        )
    keys = [key for key in ours if key != "digest"]
    return isinstance(theirs, dict) and all(_close(ours[key], theirs.get(key)) for key in keys)


def compare(driver: str, found: Mapping[str, Any], record: Mapping[str, Any]) -> list[tuple[str, str, str, Any, Any]]:
    """(driver, case, field, recorded, found) of all that differs; the ring over MPI is held to lockstep's record."""
    same = record["fingerprint"] == fingerprint()
    recorded = record["lockstep" if driver == "mpi" else driver]
    return [
        (driver, name, *difference)
        for name, result in found.items()
        for difference in differences(recorded.get(name), result, same or not by_library(driver, name))
    ]


def shown(rows: Sequence[tuple[str, str, str, Any, Any]]) -> str:
    """A table of differences."""
    from tabulate import tabulate

    def short(value: Any) -> str:
        text = json.dumps(value)
        return text if len(text) <= 60 else text[:57] + "..."

    table = [(driver, name, field, short(ours), short(theirs)) for driver, name, field, ours, theirs in rows]
    return tabulate(table, ("driver", "case", "field", "recorded", "found"), disable_numparse=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden.record", description=__doc__)
    parser.add_argument("--compare", action="store_true", help="with the record, which stays as it is")
    parser.add_argument("--driver", choices=DRIVERS, action="append", help="all by default; may be repeated")
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name it is found in")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="each N-th case of a driver")
    parser.add_argument("--seed", type=int, default=0, help="other gradients: everything has to differ")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found to this file, and nothing else")
    arguments = parser.parse_args()
    drivers = arguments.driver or DRIVERS
    record: dict[str, Any] = load() if GOLDEN.exists() else {}
    if arguments.compare and not record:
        parser.error(f"there is no {GOLDEN}")
    rows, results = [], {}
    for driver in drivers:
        start = time.monotonic()
        results[driver] = json.loads(json.dumps(run(driver, arguments.only, arguments.seed, arguments.every)))
        print(f"{driver}: {len(results[driver])} cases, {time.monotonic() - start:.1f} s", file=sys.stderr, flush=True)
        if arguments.compare:
            rows += compare(driver, results[driver], record)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(results))
        return 0
    if arguments.compare:
        print(shown(rows) if rows else "no differences")
        return 1 if rows else 0
    if arguments.seed:
        parser.error("only the gradients of seed 0 are recorded")
    errors = [
        (driver, name, one["error"]) for driver in drivers for name, one in results[driver].items() if "error" in one
    ]
    if errors:
        print("\n".join(f"{driver}: {name}\n{error}" for driver, name, error in errors))
        return 1
    partly = arguments.only or arguments.every > 1
    if record.get("fingerprint") != fingerprint() and (partly or arguments.driver):
        record = {}
    record["fingerprint"] = fingerprint()
    for driver, found in results.items():
        record[driver] = {**record.get(driver, {}), **found} if partly else found
    if "mpi" in results:
        rows = compare("mpi", results["mpi"], record)
        if rows:
            print(shown(rows))
            return 1
    save(record)
    return 0


if __name__ == "__main__":
    if any(os.environ.get(name) != value for name, value in ENVIRONMENT.items()):  # before NumPy is imported
        os.environ.update(ENVIRONMENT)
        os.execv(sys.executable, [sys.executable, "-m", "tests.golden.record", *sys.argv[1:]])
    sys.exit(main())
