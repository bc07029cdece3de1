"""Intervals from what was left out of a fit: by metric, and by kind of load where runs suffice.

A left-out run errs by what its constants and the form of the model err together, so these
residuals hold the uncertainty of both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import t

from cost_models.calibration import ErrorQuantiles, interval_key, interval_keys
from planner.validation.validate import FRONT_END_LIMITED, Row

TAIL = 0.05
"""Probability beyond each end of an interval."""

MOST_WIDENED = 3.0
"""Most by which folds that differ widen an interval: some stray without measure."""

FEWEST_POOLED = 4
"""Residuals without which a metric has no interval of its own."""

FEWEST_OF_A_LOAD = 8
"""Residuals without which a kind of load shares the interval of all."""


def residual_intervals(rows: Sequence[Row]) -> dict[str, ErrorQuantiles]:
    """Return the ends of the 90 % interval of log(measured / predicted) by metric.

    Keys are those of `cost_models.calibration.interval_keys`: a metric, and a metric under a kind
    of load where enough runs were measured under it.
    """
    residuals: dict[str, list[float]] = {}
    for row in rows:
        for name, error in _log_errors(row):
            for key in interval_keys(name, row.regime):
                residuals.setdefault(key, []).append(error)
    return {
        key: quantiles(errors)
        for key, errors in sorted(residuals.items())
        if len(errors) >= (FEWEST_OF_A_LOAD if "/" in key else FEWEST_POOLED)
    }


def quantiles(errors: Sequence[float]) -> ErrorQuantiles:
    """Return bounds that the next residual keeps with 90 % probability.

    Of n exchangeable residuals the k-th smallest is above the next one with probability
    k / (n + 1) (split conformal prediction: Lei et al., JASA 2018). Below 19 residuals no rank
    bounds a tail of 5 %; there the normal prediction interval does.
    """
    ordered, n = sorted(errors), len(errors)
    rank = math.floor(TAIL * (n + 1))
    if rank:
        low, high = ordered[rank - 1], ordered[n - rank]
    else:
        mean = math.fsum(ordered) / n
        sd = math.sqrt(math.fsum((e - mean) ** 2 for e in ordered) / (n - 1))
        reach = float(t.ppf(1 - TAIL, n - 1)) * sd * math.sqrt(1 + 1 / n)
        low, high = mean - reach, mean + reach
    return ErrorQuantiles(log_q05=round(low, 4), log_q95=round(high, 4))


def fold_intervals(rows: Sequence[Row], folds: Sequence[str]) -> dict[str, ErrorQuantiles]:
    """Return intervals so wide that those of other folds would have held 90 % of each fold.

    Runs of one model or campaign err alike, so a new one errs more than the residuals at hand
    spread: what its intervals lacked in each fold's turn is made up for.
    """
    reach = _reaches(rows, folds, residual_intervals)
    widening = {key: _quantile(found) for key, found in reach.items()}
    return {
        key: _widened(found, widening.get(key, 1.0))
        for key, found in residual_intervals(rows).items()
    }


def _quantile(reaches: Sequence[float]) -> float:
    """Return the factor that would have held 90 % of them, between 1 and `MOST_WIDENED`."""
    factor = float(np.quantile(reaches, 1 - 2 * TAIL, method="higher"))
    return min(max(factor, 1.0), MOST_WIDENED)


def _widened(interval: ErrorQuantiles, factor: float) -> ErrorQuantiles:
    return ErrorQuantiles(
        log_q05=round(interval.log_q05 * factor, 4), log_q95=round(interval.log_q95 * factor, 4)
    )


def left_out_coverage(rows: Sequence[Row], folds: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Return how many residuals each metric has, and which share its interval held.

    The interval, and by how much it is widened, come from the other folds, so that no run judges
    itself. Keys name a metric, and a metric under a kind of load.
    """
    reaches: dict[str, list[float]] = {}
    for fold in sorted(set(folds)):
        others = [(row, own) for row, own in zip(rows, folds, strict=True) if own != fold]
        if not others:
            continue
        kept, own_folds = zip(*others, strict=True)
        intervals = fold_intervals(kept, own_folds)
        for row in (row for row, own in zip(rows, folds, strict=True) if own == fold):
            for name, reach in _row_reaches(row, intervals):
                for key in (interval_key(name), interval_key(name, row.regime)):
                    reaches.setdefault(key, []).append(reach)
    return {
        key: (len(found), sum(reach <= 1.0 for reach in found) / len(found))
        for key, found in sorted(reaches.items())
    }


def _reaches(
    rows: Sequence[Row],
    folds: Sequence[str],
    made_of: Callable[[Sequence[Row]], Mapping[str, ErrorQuantiles]],
) -> dict[str, list[float]]:
    """Return each residual, as a share of its side of the interval made of the other folds.

    By every key under which it may be looked up.
    """
    reaches: dict[str, list[float]] = {}
    for fold in sorted(set(folds)):
        intervals = made_of([r for r, own in zip(rows, folds, strict=True) if own != fold])
        for row in (row for row, own in zip(rows, folds, strict=True) if own == fold):
            for name, reach in _row_reaches(row, intervals):
                for key in interval_keys(name, row.regime):
                    reaches.setdefault(key, []).append(reach)
    return reaches


def _row_reaches(row: Row, intervals: Mapping[str, ErrorQuantiles]) -> Iterator[tuple[str, float]]:
    """Yield metric and residual, as a share of its side of the interval that holds for it."""
    for name, error in _log_errors(row):
        found = find_interval(intervals, name, row.regime)
        if found is not None:
            side = max(found.log_q95, 0.0) if error > 0 else -min(found.log_q05, 0.0)
            yield name, abs(error) / side if side else (math.inf if error else 0.0)


def find_interval(
    intervals: Mapping[str, ErrorQuantiles], name: str, regime: str
) -> ErrorQuantiles | None:
    """Return the interval of a metric under a kind of load, else of the metric, else None."""
    keys = (key for key in interval_keys(name, regime) if key in intervals)
    return next((intervals[key] for key in keys), None)


def _log_errors(row: Row) -> Iterator[tuple[str, float]]:
    """Yield metric and log(measured / predicted), where the front end does not hide the GPU."""
    if row.front_end_share >= FRONT_END_LIMITED:
        return
    for name in row.scored():
        yield name, math.log(row.run.measured[name] / row.predicted[name])
