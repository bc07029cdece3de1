"""Inter-token latencies from the step log: every gap counted, none stored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cost_models.frontend import FrontEndConstants
from cost_models.metrics import PERCENTILES, Distribution
from planner.simulator.step_log import StepLog

FloatArray = NDArray[np.float64]

SHORTEST_S, LONGEST_S = 1e-6, 1e4
BIN_RATIO = 1.0005
"""Bounds and spacing of the histogram of gaps: a percentile is known to a twentieth of 1 %."""

INNER_POINTS = 6
"""Points that stand for the steps between the first and the last of a row."""

ROWS_AT_ONCE = 1 << 17
"""Rows expanded at a time."""

JITTER_QUANTILES = np.array([0.151, 0.455, 0.765, 1.150, 1.834]) * np.array([[-1.0], [1.0]])
"""Means of ten equally likely slices of a standard normal, scaled to unit variance."""


class GapHistogram:
    """Weighted gaps on a logarithmic grid, with their exact mean."""

    def __init__(self) -> None:
        bins = int(np.log(LONGEST_S / SHORTEST_S) / np.log(BIN_RATIO)) + 1
        self._edges = SHORTEST_S * BIN_RATIO ** np.arange(bins + 1)
        self._weights = np.zeros(bins)
        self._total_s = 0.0

    def add(self, gaps_s: ArrayLike, weights: ArrayLike) -> None:
        """Count gaps, each as often as its weight says."""
        gaps, weights = np.broadcast_arrays(
            np.asarray(gaps_s, np.float64), np.asarray(weights, np.float64)
        )
        self._total_s += float((gaps * weights).sum())
        bins = self._bins(gaps.ravel())
        self._weights += np.bincount(bins, weights.ravel(), minlength=self._weights.size)

    def merge(self, other: GapHistogram) -> None:
        """Count what another histogram has counted too."""
        self._weights += other._weights
        self._total_s += other._total_s

    def smeared(self, constants: FrontEndConstants) -> GapHistogram:
        """Return the histogram with each gap spread by the jitter of a step.

        SD² = jitter_s² + (jitter_fraction · gap)²; the mean stays.
        """
        if not constants.jitter_s and not constants.jitter_fraction:
            return self
        centres = np.sqrt(self._edges[1:] * self._edges[:-1])
        sd = np.hypot(constants.jitter_s, constants.jitter_fraction * centres)
        smeared = GapHistogram()
        filled = self._weights > 0
        for z in JITTER_QUANTILES.ravel():
            bins = self._bins(centres[filled] + z * sd[filled])
            share = self._weights[filled] / JITTER_QUANTILES.size
            smeared._weights += np.bincount(bins, share, minlength=self._weights.size)
        smeared._total_s = self._total_s
        return smeared

    def distribution(self) -> Distribution:
        """Return mean and percentiles; NaN where nothing was counted."""
        cumulative = np.cumsum(self._weights)
        count = cumulative[-1]
        if count == 0:
            return Distribution.of([])
        cuts = {
            name: float(np.interp(share * count, cumulative, self._edges[1:]))
            for name, share in PERCENTILES.items()
        }
        return Distribution(mean=float(self._total_s / count), **cuts)

    def _bins(self, gaps: FloatArray) -> NDArray[np.intp]:
        position = np.log(np.maximum(gaps, SHORTEST_S) / SHORTEST_S) / np.log(BIN_RATIO)
        bins: NDArray[np.intp] = np.minimum(position.astype(np.intp), self._weights.size - 1)
        return bins


def gap_histogram(log: StepLog, pauses_s: FloatArray, *, since_s: float = 0.0) -> GapHistogram:
    """Return the gaps between the tokens of all decoding sequences.

    A step's gap reaches from the output of the step before to its own; an output that the
    host delays makes one gap longer and the next one shorter. A front end that falls behind
    makes all gaps of a row longer, one that catches up shorter. Where tokens of several steps come
    at once, there are fewer gaps, and longer ones.
    """
    histogram = GapHistogram()
    histogram.add(pauses_s, 1.0)
    for first in range(0, len(log.steps), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        for kind, gaps, weights in _gaps(log, rows, since_s):
            at_once = np.asarray(log.steps_at_once[rows], np.float64)[kind]
            at_once = at_once.reshape(-1, *[1] * (gaps.ndim - 1))
            histogram.add(gaps * at_once, weights / at_once)
    return histogram


def _gaps(
    log: StepLog, rows: slice, since_s: float
) -> Iterator[tuple[NDArray[np.bool_], FloatArray, FloatArray]]:
    """Yield which rows, gaps and weights of first steps, last steps and those between."""
    steps = log.steps[rows]
    weights = np.where(log.end_s[rows] >= since_s, log.decoding[rows], 0).astype(np.float64)
    first, last = (np.array(c[rows], np.float64) for c in (log.first_step_s, log.last_step_s))
    delay = np.array(log.output_delay_s[rows], np.float64)
    lead = _lead_s(log, rows)
    lag = _falling_behind_s(log, rows) / steps
    first, last = first + lag, last + lag
    several = steps > 1
    yield np.ones_like(several), first + lead + np.where(several, 0.0, delay), weights
    yield several, (last + delay)[several], weights[several]
    many = steps > 2
    inner = (steps[many] - 2).astype(np.float64)
    position = (np.arange(INNER_POINTS) + 0.5) / INNER_POINTS
    share = (0.5 + position * inner[:, None]) / (inner[:, None] + 1)
    line = first[many, None] + share * (last - first)[many, None]
    yield many, line, (weights[many] * inner / INNER_POINTS)[:, None]


def _falling_behind_s(log: StepLog, rows: slice) -> FloatArray:
    """By how much the front end is later at the end of a row than at the end of the one before."""
    late = np.array(log.stream_delay_s[rows], np.float64)
    before = log.stream_delay_s[rows.start - 1] if rows.start else 0.0
    return np.diff(late, prepend=before)


def _lead_s(log: StepLog, rows: slice) -> FloatArray:
    """Time from the output of the step before to the start of a row's first step."""
    start = log.start_s[rows]
    before = slice(max(rows.start - 1, 0), max(rows.start - 1, 0) + len(start))
    end = log.end_s[before] + log.output_delay_s[before]
    if rows.start == 0:
        end = np.concatenate([start[:1], end[: len(start) - 1]])
    return np.asarray(start - end[: len(start)])
