"""A small grid of knots that holds what a physical form misses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResidualGrid:
    """log(measured / analytic) on knots over log2 of the shape; multilinear between, flat outside.

    Flat extrapolation keeps a residual that was seen at the edge and lets the
    physical form alone carry the trend beyond it.
    """

    axes: tuple[FloatArray, ...]
    """Increasing knots of each axis, in log2 of the shape variable."""
    values: FloatArray
    """One residual per knot, shape (len(axes[0]), len(axes[1]), …)."""

    def factor(self, *coordinates: ArrayLike) -> FloatArray:
        """Return measured / analytic at shape coordinates (not logs), one argument per axis."""
        return np.exp(self.log_factor(*coordinates))

    def log_factor(self, *coordinates: ArrayLike) -> FloatArray:
        """Return the interpolated residual at shape coordinates (not logs)."""
        result = np.zeros(np.broadcast_shapes(*(np.shape(c) for c in coordinates)))
        for index, weight in knot_weights(self.axes, coordinates):
            result = result + weight * self.values[index]
        return result

    def to_json(self) -> dict[str, object]:
        """Return plain lists, residuals rounded to 1e-4."""
        return {
            "axes_log2": [np.round(axis, 6).tolist() for axis in self.axes],
            "values": np.round(self.values, 4).ravel().tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Sequence[float]]) -> Self:
        """Rebuild from `to_json`."""
        axes = tuple(np.asarray(axis, dtype=np.float64) for axis in data["axes_log2"])
        values = np.asarray(data["values"], dtype=np.float64)
        return cls(axes=axes, values=values.reshape([len(axis) for axis in axes]))


def knot_weights(
    axes: Sequence[FloatArray], coordinates: Sequence[ArrayLike]
) -> list[tuple[tuple[NDArray[np.intp], ...], FloatArray]]:
    """Return the corners around each point: (knot index per axis, weight)."""
    lows, fractions = [], []
    for axis, coordinate in zip(axes, coordinates, strict=True):
        position = np.log2(np.maximum(np.asarray(coordinate, dtype=np.float64), 2.0**-20))
        if len(axis) == 1:
            lows.append(np.zeros(position.shape, dtype=np.intp))
            fractions.append(np.zeros(position.shape))
            continue
        low = np.clip(np.searchsorted(axis, position, side="right") - 1, 0, len(axis) - 2)
        width = axis[low + 1] - axis[low]
        lows.append(low)
        fractions.append(np.clip((position - axis[low]) / width, 0.0, 1.0))
    corners = []
    sides = [(0, 1) if fraction.any() else (0,) for fraction in fractions]
    for corner in product(*sides):
        weight: FloatArray = np.ones(())
        for bit, fraction in zip(corner, fractions, strict=True):
            weight = weight * (fraction if bit else 1.0 - fraction)
        corners.append((tuple(low + bit for low, bit in zip(lows, corner, strict=True)), weight))
    return corners
