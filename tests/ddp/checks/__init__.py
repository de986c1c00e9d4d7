"""Checks of the hook that all ranks of a torchrun job do together: `CHECKS` has those of every module here."""

from tests.ddp.checks import errors, methods, probe, training
from tests.support.ddp_harness import CHECKS

__all__ = ["CHECKS", "errors", "methods", "probe", "training"]
