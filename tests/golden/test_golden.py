"""The exchange layer gives what it gave when `golden.json` was recorded: in one process and on the ring."""

from __future__ import annotations

import pytest

from tests.golden.checked import DEADLINE_S, RECORD, cases, check
from tests.golden.record import DRIVERS, case_names, compare, fingerprint

pytestmark = pytest.mark.slow

CASES = [(driver, name) for driver in DRIVERS if driver != "hook" for name in cases(driver)]


@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize(("driver", "name"), CASES, ids=[f"{driver}: {name}" for driver, name in CASES])
def test_same_as_recorded(driver: str, name: str) -> None:
    check(driver, name)


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
