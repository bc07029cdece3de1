"""How good a fit is: cross-validation over whole shapes, error percentiles."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypedDict

import numpy as np
from numpy.typing import ArrayLike, NDArray

NUM_FOLDS = 5

Mask = NDArray[np.bool_]


class Quality(TypedDict):
    """The part of an `OperatorFit` that says how well it does."""

    num_points: int
    mape_pct: float
    holdout_mape_pct: float
    log_error_q05: float
    log_error_q95: float


def folds_by_key(keys: ArrayLike) -> Iterator[tuple[Mask, Mask]]:
    """Yield (train, test) masks that keep all rows of a key on one side.

    Keys are dealt to folds in a fixed pseudo-random order, so that neighbouring
    shapes do not all fall into the same fold.
    """
    _, inverse = np.unique(np.asarray(keys), return_inverse=True, axis=0)
    inverse = inverse.ravel()
    order = np.random.default_rng(0).permutation(inverse.max() + 1)
    fold = order[inverse] % NUM_FOLDS
    for number in range(NUM_FOLDS):
        test = fold == number
        if test.any() and not test.all():
            yield ~test, test


def fit_quality(
    measured: ArrayLike, predicted: ArrayLike, left_out_log_error: ArrayLike
) -> Quality:
    """Return the quality of a fit from its predictions and its cross-validated log error."""
    measured, predicted = np.asarray(measured), np.asarray(predicted)
    left_out = np.asarray(left_out_log_error)
    low, high = np.quantile(left_out, [0.05, 0.95])
    return Quality(
        num_points=int(measured.size),
        mape_pct=round(float(np.mean(np.abs(predicted / measured - 1)) * 100), 3),
        holdout_mape_pct=round(float(np.mean(np.abs(np.exp(-left_out) - 1)) * 100), 3),
        log_error_q05=round(float(low), 5),
        log_error_q95=round(float(high), 5),
    )
