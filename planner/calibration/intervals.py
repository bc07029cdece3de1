"""Intervals from what was left out of a fit: by metric, and by kind of load where runs suffice.

A left-out run errs by what its constants and the form of the model err together, so these
residuals hold the uncertainty of both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.stats import t

from cost_models.calibration import ErrorQuantiles, interval_key
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

    Keys are those of `cost_models.calibration.interval_key`: a metric, and a metric under a
    protocol where enough runs were measured under it.
    """
    residuals: dict[str, list[float]] = {}
    for row in rows:
        for name, error in _log_errors(row):
            residuals.setdefault(interval_key(name), []).append(error)
            residuals.setdefault(interval_key(name, row.run.protocol), []).append(error)
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
    reach = _reaches(rows, folds)
    widening = {
        name: min(max(float(np.quantile(found, 1 - 2 * TAIL, method="higher")), 1.0), MOST_WIDENED)
        for name, found in reach.items()
    }
    return {
        key: _widened(found, widening.get(key.rpartition("/")[2], 1.0))
        for key, found in residual_intervals(rows).items()
    }


def _widened(interval: ErrorQuantiles, factor: float) -> ErrorQuantiles:
    return ErrorQuantiles(
        log_q05=round(interval.log_q05 * factor, 4), log_q95=round(interval.log_q95 * factor, 4)
    )


def left_out_coverage(rows: Sequence[Row], folds: Sequence[str]) -> dict[str, tuple[int, float]]:
    """Return how many residuals each metric has, and which share its interval held.

    The interval comes from the other folds' residuals, so that no run judges itself.
    """
    return {
        name: (len(found), sum(reach <= 1.0 for reach in found) / len(found))
        for name, found in sorted(_reaches(rows, folds).items())
    }


def _reaches(rows: Sequence[Row], folds: Sequence[str]) -> dict[str, list[float]]:
    """Return each residual by metric, as a share of its side of the other folds' interval."""
    reaches: dict[str, list[float]] = {}
    for fold in sorted(set(folds)):
        others = [row for row, own in zip(rows, folds, strict=True) if own != fold]
        intervals = residual_intervals(others)
        for row in (row for row, own in zip(rows, folds, strict=True) if own == fold):
            for name, error in _log_errors(row):
                found = find_interval(intervals, name, row.run.protocol)
                if found is not None:
                    side = max(found.log_q95, 0.0) if error > 0 else -min(found.log_q05, 0.0)
                    reach = abs(error) / side if side else (math.inf if error else 0.0)
                    reaches.setdefault(name, []).append(reach)
    return reaches


def find_interval(
    intervals: Mapping[str, ErrorQuantiles], name: str, protocol: str
) -> ErrorQuantiles | None:
    """Return the interval of a metric under a protocol, else of the metric, else None."""
    return intervals.get(interval_key(name, protocol)) or intervals.get(interval_key(name))


def _log_errors(row: Row) -> Iterator[tuple[str, float]]:
    """Yield metric and log(measured / predicted), where the front end does not hide the GPU."""
    if row.front_end_share >= FRONT_END_LIMITED:
        return
    for name in row.scored():
        yield name, math.log(row.run.measured[name] / row.predicted[name])
