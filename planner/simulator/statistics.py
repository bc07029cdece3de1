"""How sure simulated numbers are: where a warm-up ends, and the error of a percentile."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

MSER_BATCH = 5
"""Observations averaged before the truncation rule looks at them (White, Cobb and Spratt 2000)."""

BLOCKS = 40
"""Stretches of consecutive requests that the bootstrap draws."""

REPLICATES = 100

BEYOND = 20
"""Requests that should lie beyond a percentile for it to be worth reporting."""


def requests_needed(fraction: float) -> int:
    """Return how many requests in steady state a percentile asks for."""
    return math.ceil(BEYOND / (1.0 - fraction))


def warm_up_length(values: FloatArray) -> int:
    """Return how many first observations are not yet steady state, by MSER-5.

    Among all cuts in the first half, the one that leaves the mean with the smallest
    marginal standard error, var(rest) / length(rest) (White 1997; batches of five).
    """
    batches = values[: values.size // MSER_BATCH * MSER_BATCH].reshape(-1, MSER_BATCH).mean(axis=1)
    count = batches.size
    if count < 4:
        return 0
    left = np.arange(count, 0, -1)
    total = np.cumsum(batches[::-1])[::-1]
    squares = np.cumsum(batches[::-1] ** 2)[::-1]
    variance = np.maximum(squares / left - (total / left) ** 2, 0.0)
    return int(np.argmin((variance / left)[: count // 2])) * MSER_BATCH


def percentile_error(values: FloatArray, fraction: float, rng: np.random.Generator) -> float:
    """Return the standard error of a percentile of serially dependent values.

    Block bootstrap: neighbours share bursts and backlogs, so stretches of consecutive
    requests are drawn, not single ones.
    """
    if values.size < 2 * BLOCKS:
        return math.nan
    order = np.argsort(values)
    block = (np.arange(values.size) * BLOCKS // values.size)[order]
    ordered = values[order]
    estimates = np.empty(REPLICATES)
    for i in range(REPLICATES):
        drawn = rng.multinomial(BLOCKS, np.full(BLOCKS, 1 / BLOCKS))
        cumulative = np.cumsum(drawn[block])
        place = np.searchsorted(cumulative, fraction * cumulative[-1])
        estimates[i] = ordered[min(place, ordered.size - 1)]
    return float(estimates.std(ddof=1))
