"""How two limits of a kernel that overlap join to one time."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]


def p_norm(a: FloatArray, b: FloatArray, p: float) -> FloatArray:
    """Join two overlapping times, (aᵖ + bᵖ)^(1/p), scaled so that nothing overflows."""
    larger = np.maximum(np.maximum(a, b), 1e-30)
    smaller = np.minimum(a, b)
    return np.asarray(larger * (1 + (smaller / larger) ** p) ** (1 / p))
