"""Fits a `ResidualGrid` to scattered residuals: least squares with a smoothness penalty."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import sparse
from scipy.sparse.linalg import lsqr

from cost_models.operators.grid import FloatArray, ResidualGrid, knot_weights


def fit_residual_grid(
    axes_log2: Sequence[ArrayLike],
    coordinates: Sequence[ArrayLike],
    log_residual: ArrayLike,
    *,
    smoothness: float = 0.3,
    weight: ArrayLike | None = None,
) -> ResidualGrid:
    """Return the grid whose multilinear interpolation is closest to the residuals.

    Args:
        axes_log2: Knots of each axis in log2.
        coordinates: Shape coordinates of each point (not logs), one array per axis.
        log_residual: log(measured / analytic) of each point.
        smoothness: Weight of second differences between neighbouring knots; knots
            that no point touches are carried by it.
        weight: Weight of each point.
    """
    axes = tuple(np.asarray(axis, dtype=np.float64) for axis in axes_log2)
    residual = np.asarray(log_residual, dtype=np.float64)
    shape = tuple(len(axis) for axis in axes)
    scale = np.ones(residual.size) if weight is None else np.sqrt(np.asarray(weight, np.float64))
    rows = np.arange(residual.size)
    design = sparse.csr_matrix((residual.size, int(np.prod(shape))))
    for index, corner_weight in knot_weights(axes, coordinates):
        columns = np.ravel_multi_index(index, shape)
        entries = np.broadcast_to(corner_weight, residual.shape) * scale
        design = design + sparse.csr_matrix((entries, (rows, columns)), shape=design.shape)
    points_per_knot = max(residual.size / np.prod(shape), 1.0)
    penalty = _smoothness_rows(shape) * (smoothness * np.sqrt(points_per_knot))
    ridge = sparse.identity(design.shape[1]) * 1e-3
    system = sparse.vstack([design, penalty, ridge]).tocsr()
    target = np.concatenate([residual * scale, np.zeros(penalty.shape[0] + ridge.shape[0])])
    values: FloatArray = lsqr(system, target, atol=1e-8, btol=1e-8, iter_lim=2000)[0]
    return ResidualGrid(axes=axes, values=values.reshape(shape))


def _smoothness_rows(shape: tuple[int, ...]) -> sparse.csr_matrix:
    """Second differences along each axis (first differences where it has two knots)."""
    blocks = []
    for axis, size in enumerate(shape):
        if size < 2:
            continue
        stencil = [1.0, -2.0, 1.0] if size > 2 else [1.0, -1.0]
        length = size - len(stencil) + 1
        difference = sparse.diags(stencil, range(len(stencil)), shape=(length, size))
        before = sparse.identity(int(np.prod(shape[:axis])))
        after = sparse.identity(int(np.prod(shape[axis + 1 :])))
        blocks.append(sparse.kron(sparse.kron(before, difference), after))
    return sparse.vstack(blocks).tocsr() if blocks else sparse.csr_matrix((0, int(np.prod(shape))))
