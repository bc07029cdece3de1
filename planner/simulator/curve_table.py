"""Piecewise-linear tables that answer scalar queries in well under a microsecond.

A table is made once from a vectorised function and asked hundreds of thousands of times
from plain Python, where a NumPy call costs more than the whole simulated event.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

INTERPOLATION_ERROR = 1e-3
"""Relative error of the interpolant at the middle of an interval above which it is split."""

MOST_REFINEMENTS = 12
"""Halvings of an interval; a jump is then enclosed within one token."""


def geometric_knots(first: float, last: float, ratio: float) -> FloatArray:
    """Return whole numbers from `first` to `last`, each about `ratio` times the one before."""
    count = max(int(np.log(max(last / first, 1.0)) / np.log(ratio)) + 2, 2)
    return np.unique(np.geomspace(first, max(last, first + 1), count).round())


def refined_knots(
    function: Callable[[FloatArray], FloatArray],
    knots: FloatArray,
    *,
    tolerance: float = INTERPOLATION_ERROR,
) -> tuple[FloatArray, FloatArray]:
    """Return integer knots between which `function` is as good as linear, and its values there.

    Halves every interval whose midpoint the straight line misses, down to neighbouring
    integers: smooth stretches stay coarse and jumps are enclosed.

    Args:
        function: Maps K points to values of shape (..., K); every row must be met.
        knots: Whole numbers to start from, ascending.
        tolerance: Largest relative miss at a midpoint.
    """
    values = function(knots)
    fresh = np.ones(knots.size - 1, dtype=bool)
    for _ in range(MOST_REFINEMENTS):
        left = np.flatnonzero(fresh & (np.diff(knots) > 1))
        if not left.size:
            break
        middle = np.floor((knots[left] + knots[left + 1]) / 2)
        share = (middle - knots[left]) / (knots[left + 1] - knots[left])
        line = values[..., left] * (1 - share) + values[..., left + 1] * share
        exact = function(middle)
        miss = np.abs(line - exact) > tolerance * np.abs(exact)
        split = miss.reshape(-1, left.size).any(axis=0)
        points = middle[split], exact[..., split]
        knots, values, fresh = _inserted(knots, values, left[split], points)
    return knots, values


def _inserted(
    knots: FloatArray,
    values: FloatArray,
    left: NDArray[np.intp],
    points: tuple[FloatArray, FloatArray],
) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Insert points behind the knots `left` and mark the intervals beside them as new."""
    middle, exact = points
    fresh = np.zeros(knots.size - 1, dtype=bool)
    fresh[left] = True
    fresh = np.insert(fresh, left + 1, True)
    return np.insert(knots, left + 1, middle), np.insert(values, left + 1, exact, axis=-1), fresh


def never_falling(values: FloatArray) -> FloatArray:
    """Return values along the last axis, each at most as large as all behind it.

    More work never takes less time. Where a table says so, because a faster kernel begins there,
    the time of that one counts for a little less work too: it could be padded up to it.
    """
    return np.asarray(np.minimum.accumulate(values[..., ::-1], axis=-1)[..., ::-1])


class CurveTable:
    """A piecewise-linear function of one number that never falls; its last slope goes on."""

    __slots__ = ("_inner", "_integrals", "_knots", "_slopes", "_values")

    def __init__(self, knots: FloatArray, values: FloatArray) -> None:
        widths, values = np.diff(knots), never_falling(values)
        slopes = np.diff(values) / widths
        areas = np.cumsum(widths * (values[1:] + values[:-1]) / 2)
        self._knots: list[float] = knots.tolist()
        self._values: list[float] = values.tolist()
        self._slopes: list[float] = slopes.tolist()
        self._integrals: list[float] = [0.0, *areas.tolist()]
        self._inner = self._knots[1:-1]

    def __call__(self, x: float) -> float:
        """Return the value at `x`."""
        i = bisect_right(self._inner, x)
        return self._values[i] + self._slopes[i] * (x - self._knots[i])

    def segment(self, x: float) -> tuple[float, float, float]:
        """Return the value and the slope at `x`, and how far that slope goes on."""
        i = bisect_right(self._inner, x)
        d, slope = x - self._knots[i], self._slopes[i]
        room = self._inner[i] - x if i < len(self._inner) else math.inf
        return self._values[i] + slope * d, slope, room

    def integral(self, x: float) -> float:
        """Return the integral from the first knot to `x`."""
        i = bisect_right(self._inner, x)
        d = x - self._knots[i]
        return self._integrals[i] + d * (self._values[i] + 0.5 * self._slopes[i] * d)
