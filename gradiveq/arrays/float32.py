"""float32: types of arrays, and where the format ends, for what is rounded or cut by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Array = npt.NDArray[Any]

#: The largest finite number.
LARGEST = float(np.finfo(np.float32).max)
#: The bits of infinity, as an integer. Those of finite numbers without their signs are smaller, in the numbers' order;
#: those of NaNs are larger.
INFINITY_BITS = 0x7F800000
