"""The exchange layer gives what it gave when `golden.json` was recorded: in the hook."""

from __future__ import annotations

import pytest

from tests.golden.checked import DEADLINE_S, cases, check

pytestmark = pytest.mark.slow


@pytest.mark.timeout(DEADLINE_S + 60)
@pytest.mark.parametrize("name", cases("hook"))
def test_same_as_recorded(name: str) -> None:
    check("hook", name)
