"""Checks of the hook that all ranks of a torchrun job do together: all modules that register some."""

from tests.ddp.checks import errors, methods, probe, training

__all__ = ["errors", "methods", "probe", "training"]
