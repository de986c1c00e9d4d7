"""Methods that leave all to the driver: uncompressed, and QSGD at every hop of the ring (Fig. 2a of Yu et al. 2018)."""

from __future__ import annotations

from typing import Any

from gradiveq.exchange.family import Family
from gradiveq.exchange.requests import Call, Exchange, Round, Sum
from gradiveq.methods import Plain, QSGDRing


class Direct(Family):
    """The vector itself is summed, in every iteration alike. Nothing is left out that could be remembered."""

    def __init__(self, method: Plain | QSGDRing) -> None:
        super().__init__()
        self.method = method

    @property
    def phase(self) -> str:
        return "plain" if isinstance(self.method, Plain) else "qsgd"

    def stays_on_device(self) -> bool:
        return True

    def rounds(self, call: Call, x: Any, latest: Any) -> Exchange:
        ((mean,),) = yield Round([Sum([x], self.method, mean=True)])
        return mean

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None:
        """There is nothing to load."""

    def load_others(self, states: Any, memories: Any, rank: int, size: int) -> None:
        """There is nothing to load."""
