"""Least squares on log error, in the logarithm of positive constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

FloatArray = NDArray[np.float64]

Bounds = Mapping[str, tuple[float, float, float]]
"""Start, smallest and largest value of each constant; all positive."""


def fit_constants(
    predict: Callable[[dict[str, float]], FloatArray],
    measured_s: FloatArray,
    bounds: Bounds,
    *,
    weight: FloatArray | float = 1.0,
) -> dict[str, float]:
    """Return the constants whose predictions are closest to the measured times.

    The loss is soft-L1 on log error, so that a percent counts the same at every size
    and single outliers do not pull.

    Args:
        predict: Seconds of every measured point for given constants.
        measured_s: Measured seconds.
        bounds: Start and limits of each constant.
        weight: Weight of each point's log error.
    """
    names = list(bounds)
    start, low, high = np.log(np.array([bounds[name] for name in names])).T
    target = np.log(measured_s)

    def residuals(x: FloatArray) -> FloatArray:
        constants = dict(zip(names, np.exp(x).tolist(), strict=True))
        return np.asarray(weight * (np.log(predict(constants)) - target))

    fit = least_squares(
        residuals,
        np.clip(start, low + 1e-9, high - 1e-9),
        bounds=(low, high),
        loss="soft_l1",
        f_scale=0.1,
        diff_step=1e-3,
        max_nfev=60,
    )
    return dict(zip(names, np.exp(fit.x).tolist(), strict=True))
