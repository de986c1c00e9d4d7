"""Comparison of what `state_dict` gives."""

from __future__ import annotations

from typing import Any

import torch


def contents(state: Any) -> Any:
    """A state as something that can be compared: tensors as their type, shape and bytes."""
    if isinstance(state, torch.Tensor):
        return str(state.dtype), tuple(state.shape), state.detach().numpy().tobytes()
    if isinstance(state, dict):
        return {key: contents(value) for key, value in state.items()}
    return [contents(value) for value in state] if isinstance(state, list | tuple) else state


def without_times(state: Any) -> Any:
    """Comparable: tensors as their bits, and no wall-clock seconds."""
    if isinstance(state, dict):
        return {key: without_times(value) for key, value in state.items() if key != "fit_s"}
    if isinstance(state, list):
        return [without_times(value) for value in state]
    return contents(state)
