"""Waiting times of queues, in forms that broadcast over arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.metrics import PERCENTILES

FloatArray = NDArray[np.float64]

NORMAL_QUANTILES = {0.50: 0.0, 0.90: 1.281552, 0.95: 1.644854, 0.99: 2.326348}
"""Quantiles of the standard normal distribution."""


def multi_server_wait(
    *, utilisation: ArrayLike, servers: ArrayLike, service_s: ArrayLike, variability: ArrayLike
) -> FloatArray:
    """Mean wait for one of several servers, in seconds.

    Allen and Cunneen's G/G/m form with Sakasegawa's approximation of Erlang's C:
    W = (ca² + cs²)/2 · ρ^(√(2(m+1)) − 1) / (m (1 − ρ)) · service.

    Args:
        utilisation: ρ, below 1.
        servers: m, batch slots here.
        service_s: Mean time that a request holds a slot.
        variability: (ca² + cs²)/2 of arrivals and service.
    """
    rho = np.clip(utilisation, 0.0, 0.999)
    m = np.maximum(np.asarray(servers, dtype=np.float64), 1.0)
    congestion = rho ** (np.sqrt(2 * (m + 1)) - 1) / (m * (1 - rho))
    return np.asarray(variability * congestion * service_s, dtype=np.float64)


class GammaQuantiles:
    """Percentiles of a gamma distribution with given moments, by their name.

    Wilson and Hilferty's cube-root form: q ≈ mean · (1 − c/9 + z·√c/3)³ with
    c = variance / mean².
    """

    def __init__(self, mean: ArrayLike, variance: ArrayLike) -> None:
        self._mean = np.asarray(mean, dtype=np.float64)
        cv_squared = np.asarray(variance) / np.maximum(self._mean, 1e-12) ** 2
        self._middle = 1 - cv_squared / 9
        self._cv = np.sqrt(cv_squared)

    def __call__(self, name: str) -> FloatArray:
        """Return the percentile of that name in `PERCENTILES`."""
        root = self._middle + NORMAL_QUANTILES[PERCENTILES[name]] * self._cv / 3
        return np.asarray(self._mean * np.maximum(root, 0.0) ** 3, dtype=np.float64)
