"""How this package compiles loops with Numba."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
from numba import types

Function = TypeVar("Function", bound=Callable[..., Any])

#: Argument types of what is only read. A contiguous array that may be written is `types.float32[::1]` and so on.
BYTES = types.Array(types.uint8, 1, "C", readonly=True)
FLOATS = types.Array(types.float32, 1, "C", readonly=True)
WORDS = types.Array(types.uint32, 1, "C", readonly=True)


def jit(signature: Any = None, cache: bool = False) -> Callable[[Function], Function]:
    """`numba.njit` with a type. The NumPy error model, as a test for division by zero would prevent vector code.

    With a signature it compiles on import; with `cache`, only on the first one.
    """
    return cast(Callable[[Function], Function], numba.njit(signature, cache=cache, nogil=True, error_model="numpy"))
