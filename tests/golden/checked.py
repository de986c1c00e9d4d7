"""Runs a driver's golden cases for the tests, once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.golden.record import ENVIRONMENT, case_names, compare, load, shown
from tests.support.processes import ROOT

#: Seconds for one driver's cases. On two cores with nothing beside them they take a tenth of it.
DEADLINE_S = 1200
RECORD = load()
#: The tests hold every third case of the drivers that take minutes; `make golden` holds all.
EVERY = {"here": 3, "lockstep": 3, "hook": 3}


def cases(driver: str) -> list[str]:
    """Names of the cases of a driver that are run."""
    chosen = case_names(driver)[:: EVERY.get(driver, 1)]
    if driver != "hook":
        return chosen
    return [name for name in RECORD[driver] if name.rpartition(", ")[0] in chosen]


@cache
def results(driver: str) -> dict[str, Any]:
    """What these cases give now, in a process whose libraries use one thread."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [sys.executable, "-m", "tests.golden.record", "--driver", driver, "--json", str(out)]
        command += ["--every", str(EVERY.get(driver, 1))]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"} | ENVIRONMENT
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)
        assert done.returncode == 0, done.stderr[-5000:]
        found: dict[str, Any] = json.loads(out.read_text())[driver]
        return found


def check(driver: str, name: str) -> None:
    """Hold one case to the record."""
    found = results(driver)[name]
    assert "error" not in found, found["error"]
    different = compare(driver, {name: found}, RECORD)
    assert not different, shown(different)
