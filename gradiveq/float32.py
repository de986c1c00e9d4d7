"""Where float32 ends, for what is rounded or cut by hand."""

from __future__ import annotations

import numpy as np

#: The largest finite number.
LARGEST = float(np.finfo(np.float32).max)
#: The bits of infinity, as an integer. Those of finite numbers without their signs are smaller, in the numbers' order;
#: those of NaNs are larger.
INFINITY_BITS = 0x7F800000
