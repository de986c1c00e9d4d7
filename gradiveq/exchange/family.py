"""What every family of methods is: one worker's side of an exchange, written once, without input or output.

    driver                                  family
    ------------------------------------    -----------------------------------------------------------------
    exchange(call, gradient)            ->  x = gradient + memory; compresses; yields rounds of requests
    carries requests out, resumes       ->  ...
                                        <-  the mean
    finds all vectors' means finite:
    accept(now, mean)                   ->  what was left out is remembered; maybe there is more to exchange
    finds one that isn't:
    skip()                              ->  nothing has happened

`gradiveq.exchange.requests` says what may be asked for. A family's state is by parameter name, of tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradiveq.exchange.error_memory import ErrorFeedback, ErrorMemory, Memories
from gradiveq.exchange.requests import Call, Exchange, Iteration
from gradiveq.flatten import matrix_shape


class Family(ABC):
    """One worker's side.

    Args:
        feedback: of its error memory; None for none.

    Attributes:
        memory: wraps `rounds`, whatever they are.
    """

    #: Whether this worker says in the next iteration that the window should end.
    vote = False
    #: Windows and decisions so far, for `Aggregator.window_log`.
    log: Sequence[dict[str, Any]] = ()
    #: Names of the layers that what follows an iteration is of, for errors.
    fitted: Sequence[str] = ()

    def __init__(self, feedback: ErrorFeedback | None = None) -> None:
        self.memory = ErrorMemory(feedback)

    @property
    def phase(self) -> str:
        """Phase of the next iteration, for reports."""
        return "compressed"

    def stays_on_device(self) -> bool:
        """Whether the next exchange can be by `gradiveq.device.kernels`, and not only on the host."""
        return False

    def exchange(self, call: Call, gradient: Any) -> Exchange:
        """The mean over the workers, or what the method makes of it: the same bits on every worker.

        Args:
            gradient: finite float32 of shape (length,), of the call's kernels; zeros if it is of no use.
        """
        x, latest = self.memory.corrected(call, gradient)
        return (yield from self.rounds(call, x, latest))

    @abstractmethod
    def rounds(self, call: Call, x: Any, latest: Any) -> Exchange:
        """Exchange x, and tell `memory.keep` what of it was left out, if `memory.wants` to know.

        Args:
            x: the gradient and what is remembered.
            latest: the gradient.
        """

    def accept(self, now: Iteration, mean: Any = None) -> Exchange | None:
        """The iteration counts, all of its vectors are through.

        Args:
            mean: of a driver that has one vector: what `exchange` ended with. Not modified.
        Returns:
            What is to be exchanged besides, before the next iteration; its work may be done on another thread, up to
            each round.
        """
        self.memory.commit()
        return None

    def skip(self) -> None:
        """The iteration doesn't count."""
        self.memory.forget()

    def pending(self, now: Iteration) -> Exchange | None:
        """What `accept` would have returned, for a state that was taken before that was over."""
        return None

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to go on bit by bit; it may differ by rank. Copies: tensors on the CPU, numbers,
        strings, None, lists and dicts."""
        return self.memory.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there, with as many workers.

        Raises:
            ValueError: the state is of another method or model; nothing was changed.
        """
        self.memory.load_state_dict(state)

    def load_others(self, states: Sequence[Mapping[str, Any]], memories: Memories, rank: int, size: int) -> None:
        """Go on as this rank of another number of workers, from the states of all the old ones, by rank."""
        self.memory.load_others(states, memories, rank, size)


def check_shapes(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a family's state whose memories or Q are of other parameters.

    Args:
        shapes: of the parameters' gradients, by name.
    Raises:
        ValueError: names the parameter, the shape that was found and the one that is due.
    """
    if "inner" in state:
        check_shapes(state["inner"] or {}, shapes)
    columns = {name: matrix_shape(shape)[1:] for name, shape in shapes.items() if len(shape) > 1}
    for key, what, due, free in (
        ("memory", "memory", shapes, 0),
        ("momentum", "momentum", shapes, 0),
        ("q", "Q", columns, 1),
    ):
        for name, one in (state.get(key) or {}).items():
            found, dims = tuple(one.shape) if isinstance(one, Tensor) else type(one).__name__, due.get(name)
            if dims is None or len(found) != len(dims) + free or found[: len(dims)] != dims:
                shape = (
                    "nothing here" if dims is None else f"of shape ({', '.join([*map(str, dims), *['any'] * free])})"
                )
                raise ValueError(f"the state's {what} of {name} must be {shape}, got {found}")


def as_tensors(state: Any) -> Any:
    """A state with tensors in place of NumPy arrays, of memory of their own."""
    return _converted(state, np.ndarray, lambda array: torch.from_numpy(array.copy()))


def as_arrays(state: Any) -> Any:
    """A state with NumPy arrays in place of tensors, of the same memory."""
    return _converted(state, Tensor, lambda tensor: tensor.numpy())


def _converted(tree: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """The same dicts and lists with each leaf of one type converted."""
    if isinstance(tree, kind):
        return convert(tree)
    if isinstance(tree, Mapping):
        return {key: _converted(value, kind, convert) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_converted(value, kind, convert) for value in tree]
    return tree
