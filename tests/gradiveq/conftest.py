from __future__ import annotations

import pytest

from gradiveq.over_ring.staging import Lane
from tests.support.on_devices import LateLane


@pytest.fixture(params=[Lane, LateLane], ids=["at once", "late"])
def lane(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradiveq.over_ring.staging.Lane", request.param)
