"""What is believed of every candidate's score, before and after some of them are measured.

The logarithm of measured over predicted is normal: a part that all candidates share (the model is
off as a whole) and a part that near ones share (it is off for large batches). Conditioning on
what was measured is Gaussian-process regression over the pool. What a measurement is worth is
the knowledge gradient (Frazier, Powell and Dayanik 2009): by how much the best choice is
expected to be better once its result is known. It counts improvement and information alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

SHARED_FRACTION = 0.5
"""Share of the prediction's variance that all candidates have in common."""

NOISE_LOG_SD = 0.01
"""Spread of one measurement around what many would give."""

_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(21)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Belief:
    """Normal beliefs of the logarithm of each candidate's score."""

    mean: FloatArray
    covariance: FloatArray

    @classmethod
    def prior(cls, log_scores: FloatArray, log_sd: FloatArray, distances: FloatArray) -> Belief:
        """Return what the predictions alone say.

        Args:
            log_scores: Predicted, shape (n,).
            log_sd: Standard error of each, shape (n,).
            distances: Between any two among the knobs; 1 is far, shape (n, n).
        """
        likeness = SHARED_FRACTION + (1 - SHARED_FRACTION) * np.exp(-2.0 * distances**2)
        return cls(mean=log_scores, covariance=likeness * np.outer(log_sd, log_sd))

    def after(self, measured: Mapping[int, Sequence[float]]) -> Belief:
        """Return the belief once some candidates have been measured, each once or more.

        Args:
            measured: Log scores by candidate.
        """
        belief = self
        for index, values in measured.items():
            for value in values:
                belief = belief._updated(index, value)
        return belief

    def without_news(self, pending: Sequence[int]) -> Belief:
        """Return the belief once candidates are measured that come out as expected."""
        belief = self
        for index in pending:
            belief = belief._updated(index, float(belief.mean[index]))
        return belief

    def gains(self, choosable: NDArray[np.bool_]) -> FloatArray:
        """Return what measuring each candidate is worth, as a share of the best score, shape (n,).

        Args:
            choosable: Candidates that may be chosen in the end; measuring others is worth nothing.
        """
        gains = np.zeros(self.mean.size)
        rows = np.flatnonzero(choosable)
        if rows.size == 0:
            return gains
        mean = self.mean[rows]
        best = mean.max()
        variance = np.diag(self.covariance)[rows] + NOISE_LOG_SD**2
        # Each candidate's mean moves along one direction per measurement: shape (measured, moved).
        moves = self.covariance[np.ix_(rows, rows)] / np.sqrt(variance)[:, None]
        weights = _WEIGHTS / _WEIGHTS.sum()
        tops = np.max(mean[None, None, :] + _NODES[:, None, None] * moves[None, :, :], axis=2)
        # Subtracting what the best is expected to be without a choice leaves what choosing adds.
        own = int(mean.argmax())
        alone = mean[own] + _NODES[:, None] * moves[None, :, own]
        gains[rows] = weights @ (np.exp(tops - best) - np.exp(alone - best))
        return gains

    def _updated(self, index: int, value: float) -> Belief:
        column = self.covariance[:, index]
        gain = column / (column[index] + NOISE_LOG_SD**2)
        return Belief(
            mean=self.mean + gain * (value - self.mean[index]),
            covariance=self.covariance - np.outer(gain, column),
        )
