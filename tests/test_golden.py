"""The exchange layer gives what it gave when `golden/golden.json` was recorded, method by method, driver by driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from conftest import ROOT
from golden.record import DRIVERS, ENVIRONMENT, case_names, compare, fingerprint, load, shown

#: Of one driver's cases. On two cores with nothing beside them they take a tenth of it.
DEADLINE_S = 1200
RECORD = load()
CASES = [(driver, name) for driver in DRIVERS for name in (case_names("mpi") if driver == "mpi" else RECORD[driver])]


@cache
def results(driver: str) -> dict[str, Any]:
    """What all cases of a driver give now, in a process whose libraries use one thread."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "golden.record", "--driver", driver, "--json", str(out)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONWARNINGS": "error"} | ENVIRONMENT
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stderr[-5000:]
        found: dict[str, Any] = json.loads(out.read_text())[driver]
        return found


@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize(("driver", "name"), CASES, ids=[f"{driver}: {name}" for driver, name in CASES])
def test_same_as_recorded(driver: str, name: str) -> None:
    found = results(driver)[name]
    assert "error" not in found, found["error"]
    different = compare(driver, {name: found}, RECORD)
    assert not different, shown(different)


@pytest.mark.parametrize("driver", DRIVERS)
def test_every_case_is_recorded(driver: str) -> None:
    recorded = {name.removesuffix(", 2 ranks") for name in RECORD["lockstep" if driver == "mpi" else driver]}
    assert set(case_names(driver)) <= recorded


def test_a_difference_is_found() -> None:
    """Of the last bits only on the processor of the record, where a BLAS takes part; of all else everywhere."""
    here, elsewhere = (RECORD | {"fingerprint": one} for one in (fingerprint(), {}))
    case, name = RECORD["lockstep"]["gradiveq ratio"], "gradiveq ratio"
    for field, value in {
        "sample": [case["sample"][0] + 0.01, *case["sample"][1:]],
        "reports": case["reports"] | {"phase": [["plain", 18]]},
        "state": case["state"][1:],
    }.items():
        assert compare("lockstep", {name: case | {field: value}}, here), field
        assert compare("lockstep", {name: case | {field: value}}, elsewhere), field
    assert compare("lockstep", {name: case | {"means": "0"}}, here)
    assert not compare("lockstep", {name: case | {"means": "0"}}, elsewhere)
    assert compare("lockstep", {"rar": RECORD["lockstep"]["rar"] | {"means": "0"}}, elsewhere)
