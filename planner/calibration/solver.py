"""Least squares over constants in units of their prior's standard deviation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """Return which unknowns change any miss when they grow by a standard deviation.

    A smaller change may be hidden behind what takes longer. The others stay at their prior.
    """
    base = misses(start)
    shifted = start + np.eye(start.size)
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


NOT_SHARED = 1e-9
"""Spread over the noise below which a common error is none: its column is of no run's kind."""


def shared_apart(misses: FloatArray, shared: FloatArray) -> FloatArray:
    """Return misses that have errors in common as independent ones of variance 1.

    With unit noise and common errors the covariance is V = I + S S^T (a random effect for each
    column of S: Laird and Ware, Biometrics 38, 1982). With S = U D W^T the squares of what is
    returned add up to m^T V^-1 m: the part of m along each column of U, over sqrt(1 + D^2), and
    the rest as it is. However many misses there are, they tell of what is along a column no more
    than one observation with its spread does, and the loss bounds its pull as one outlier.

    Args:
        misses: Over their expected noise, shape [n].
        shared: Standard deviations of common errors over the same noise, shape [n, effects].

    Returns:
        Shape [n + effects].
    """
    along, spread, _ = np.linalg.svd(shared, full_matrices=False)
    along = np.where(spread > NOT_SHARED, along, 0.0)
    parts = along.T @ misses
    return np.concatenate([misses - along @ parts, parts / np.sqrt(1.0 + spread**2)])


DAMPINGS = (0.0, 1.0, 5.0, 25.0)
"""Added to the curvature, more and more, until a step helps."""

LONGEST_STEP = 2.0
"""Standard deviations of the prior that one step moves a constant at most."""

SETTLED = 0.005
"""Share of the loss below which a step's gain is not worth the next one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Solution:
    """Where the residuals are least, and their derivatives there, weighted as the loss does."""

    x: FloatArray
    jac: FloatArray
    loss: float

    @property
    def doubt(self) -> float:
        """Return -2 log of what the residuals say for this minimum, but for a constant.

        Laplace's approximation: depth and width of a minimum both count, so of two that explain
        the residuals alike, the one that asks for less precise constants is the likelier
        (MacKay, Neural Computation 4, 1992).
        """
        return self.loss + float(np.linalg.slogdet(self.jac.T @ self.jac)[1])


def solve_costly(
    residuals: Callable[[FloatArray], FloatArray],
    start: FloatArray,
    *,
    bounds: tuple[FloatArray, FloatArray],
    steps: int,
    jac: FloatArray,
    settled: float = SETTLED,
) -> Solution:
    """Minimise the same loss where a call takes seconds.

    Gauss and Newton's steps with a Jacobian that is taken once; Broyden's rule then keeps it up to
    date with what each step showed (Math. Comp. 19, 1965).

    Args:
        residuals: Misses over expected errors, the priors' own among them.
        start: Where to begin.
        bounds: Lowest and highest.
        steps: Most of them.
        jac: Derivatives near the start. They only show the way: a step counts by what the
            residuals are behind it.
        settled: Share of the loss that a step must gain for another one to follow.
    """
    x, missed = start, residuals(start)
    for _ in range(steps):
        for damping in DAMPINGS:
            moved = _stepped(x, missed, jac, damping=damping, bounds=bounds)
            found = residuals(moved)
            gain = 1.0 - _loss(found) / max(_loss(missed), 1e-12)
            if gain > 0:
                break
        else:
            break
        move = moved - x
        jac = jac + np.outer(found - missed - jac @ move, move) / max(float(move @ move), 1e-12)
        x, missed = moved, found
        if gain < settled:
            break
    weighted = jac * np.sqrt(_weights(missed))[:, None]
    return Solution(x=x, jac=weighted, loss=_loss(missed))


def _stepped(
    x: FloatArray,
    missed: FloatArray,
    jac: FloatArray,
    *,
    damping: float,
    bounds: tuple[FloatArray, FloatArray],
) -> FloatArray:
    weighted = jac.T * _weights(missed)
    curvature = weighted @ jac + damping * np.eye(x.size)
    move = -np.linalg.solve(curvature, weighted @ missed)
    move *= min(1.0, LONGEST_STEP / max(float(np.abs(move).max()), 1e-12))
    return np.clip(x + move, *bounds)


def _weights(missed: FloatArray) -> FloatArray:
    """Return the pull of each miss over that of least squares."""
    return np.asarray(1.0 / np.sqrt(1.0 + (missed / OUTLIER) ** 2))


def _loss(missed: FloatArray) -> float:
    """Return SciPy's `soft_l1`."""
    return float(2 * OUTLIER**2 * np.sum(np.sqrt(1.0 + (missed / OUTLIER) ** 2) - 1.0))
