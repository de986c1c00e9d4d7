"""States of families and aggregators, compared bit by bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def exact(state: Any) -> Any:
    """The same with each tensor and array as its type, shape and bytes, so that equal states are equal objects."""
    if isinstance(state, Tensor):
        return str(state.dtype), tuple(state.shape), state.contiguous().numpy().tobytes()
    if isinstance(state, np.ndarray):
        return str(state.dtype), state.shape, state.tobytes()
    if isinstance(state, Mapping):
        return {key: exact(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [exact(value) for value in state]
    return state


def flat(by_name: Mapping[str, Tensor] | None) -> Any:
    """All of a memory in one float32 array, in the order of its names, each as its parameter has it."""
    assert by_name is not None
    return np.concatenate([np.empty(0, np.float32), *(tensor.numpy().reshape(-1) for tensor in by_name.values())])
