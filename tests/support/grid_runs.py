"""Runs for `bench.experiments.grid`; processes that it spawns find them here, and import nothing else for them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def tiny(spec: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    if spec.get("fail"):
        raise RuntimeError("as asked")
    return {"sum": spec["seed"] + spec["lr"], "threads": torch.get_num_threads(), "pid": os.getpid()}


def slow(spec: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    Path(spec["pids"], str(os.getpid())).touch()
    time.sleep(120)
    return {}
