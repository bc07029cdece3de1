"""Carries a residual from the (n, k) pairs that were measured to those that were not.

A Gaussian process over (log2 n, log2 k), known in geostatistics as kriging: the
residual at a pair is the sum of a part shared by all pairs of the same n, of the same k,
of the same product n·k (the size of the weights), of the same ratio n/k, and a part of
its own that only close neighbours share.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

CORRELATION_OCTAVES = (0.65, 2.3)
"""Distances in log2 n and log2 k over which a pair's own part (of variance 1) fades."""

SHARED_PARTS = (
    ((1.0, 0.0), 0.5, 0.7),
    ((0.0, 1.0), 0.4, 1.8),
    ((1.0, 1.0), 0.5, 3.0),
    ((1.0, -1.0), 0.15, 3.2),
)
"""Direction in (log2 n, log2 k), variance and distance of the parts in n, k, n·k and n/k."""

MEAN_VARIANCE = 4.0
NOISE_VARIANCE = 0.14
"""Noise of one pair; this and the numbers above minimise the error on pairs left out."""


def krige(known: FloatArray, residual: FloatArray, wanted: FloatArray) -> FloatArray:
    """Return the expected residual at pairs of (n, k), by measured ones.

    Args:
        known: Measured pairs, shape (pairs, 2).
        residual: Their residuals, one column for each, shape (..., pairs).
        wanted: Pairs to predict, shape (others, 2).

    Returns:
        Shape (..., others).
    """
    weights = np.linalg.solve(_noisy_covariance(known), _covariance(known, wanted))
    return np.asarray(residual @ weights)


def left_out_error(known: FloatArray, residual: FloatArray) -> FloatArray:
    """Return what `krige` misses at each pair when it knows all the others.

    Closed form: Rasmussen & Williams, Gaussian Processes for Machine Learning, eq. 5.12.
    """
    precision = np.linalg.inv(_noisy_covariance(known))
    return np.asarray(residual @ precision / np.diag(precision))


def _noisy_covariance(pairs: FloatArray) -> FloatArray:
    return _covariance(pairs, pairs) + NOISE_VARIANCE * np.eye(len(pairs))


def _covariance(a: FloatArray, b: FloatArray) -> FloatArray:
    offset = np.log2(a)[:, None, :] - np.log2(b)[None, :, :]
    total = MEAN_VARIANCE + _matern(np.hypot(*np.moveaxis(offset / CORRELATION_OCTAVES, -1, 0)))
    for direction, variance, octaves in SHARED_PARTS:
        total = total + variance * _matern(np.abs(offset @ np.array(direction)) / octaves)
    return np.asarray(total)


def _matern(distance: FloatArray) -> FloatArray:
    """Matérn correlation of order 3/2: continuous slope, no overshoot far away."""
    scaled = np.sqrt(3.0) * distance
    return np.asarray((1 + scaled) * np.exp(-scaled))
