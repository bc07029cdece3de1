"""Least squares over constants in units of their prior's standard deviation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

FloatArray = NDArray[np.float64]

STEP = 0.05
"""Change of a constant by which its effect is measured.

Predictions jump where a block more fits or a wave falls apart, so a tiny step would see nothing.
"""

OFFSET = 10.0
"""Added to all unknowns: SciPy scales its steps with them, and they start at 0."""

OUTLIER = 3.0
"""Expected errors beyond which a miss pulls no harder."""


def told(misses: Callable[[FloatArray], FloatArray], start: FloatArray) -> NDArray[np.bool_]:
    """Return which unknowns change any miss at all; the others stay at their prior."""
    base = misses(start)
    shifted = start + np.diag(np.full(start.size, STEP))
    return np.array([bool(np.abs(misses(z) - base).max() > 0) for z in shifted])


def solve(
    residuals: Callable[[FloatArray], FloatArray],
    start: FloatArray,
    *,
    bounds: tuple[FloatArray, FloatArray] | None = None,
    evaluations: int | None = None,
) -> Any:
    """Return SciPy's result, `x` and `bounds` in units of the prior's standard deviation.

    Args:
        residuals: Misses over expected errors, the priors' own among them.
        start: Where to begin.
        bounds: Lowest and highest.
        evaluations: Most of them, those of the Jacobian not counted.
    """
    low, high = bounds or (np.full(start.size, -np.inf), np.full(start.size, np.inf))
    fit = least_squares(
        lambda shifted: residuals(shifted - OFFSET),
        start + OFFSET,
        bounds=(low + OFFSET, high + OFFSET),
        loss="soft_l1",
        f_scale=OUTLIER,
        diff_step=STEP / OFFSET,
        max_nfev=evaluations,
    )
    fit.x = fit.x - OFFSET
    return fit
