"""Constants as a solver sees them: logarithms, in units of their prior's spread."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from planner.calibration.constants import Constant

FloatArray = NDArray[np.float64]

DIFFERENCE = 0.15
"""Change of an unknown by which a slope is taken."""

LEAST_LOG_DIFFERENCE = 0.03
"""Least change of a constant's logarithm: predictions jump where a block more fits."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Unknowns:
    """The constants that are fitted, each 0 at its prior."""

    names: tuple[str, ...]
    prior: FloatArray
    log_sd: FloatArray
    low: FloatArray
    high: FloatArray

    @classmethod
    def of(cls, table: Mapping[str, Constant]) -> Unknowns:
        """Return the constants of a table."""
        rows = np.array([[c.prior, c.low, c.high] for c in table.values()]).reshape(-1, 3)
        prior, low, high = np.log(rows).T
        log_sd = np.array([c.log_sd for c in table.values()])
        return cls(
            names=tuple(table),
            prior=prior,
            log_sd=log_sd,
            low=(low - prior) / log_sd,
            high=(high - prior) / log_sd,
        )

    @property
    def bounds(self) -> tuple[FloatArray, FloatArray]:
        """Lowest and highest."""
        return self.low, self.high

    def values(self, z: FloatArray) -> dict[str, float]:
        """Return the constants themselves, by name."""
        return dict(zip(self.names, np.exp(self.prior + self.log_sd * z).tolist(), strict=True))

    def at(self, values: Mapping[str, float]) -> FloatArray:
        """Return where the unknowns stand at these constants."""
        logs = np.log([values[name] for name in self.names])
        return np.asarray(np.clip((logs - self.prior) / self.log_sd, self.low, self.high))

    def relative_errors(self, jac: FloatArray) -> dict[str, float]:
        """Return standard errors by name; the prior is part of the residuals behind `jac`."""
        deviations = np.sqrt(np.diag(np.linalg.inv(jac.T @ jac)))
        return dict(zip(self.names, (self.log_sd * deviations).tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Slopes:
    """How the misses of each run change with the logarithm of each constant."""

    by_run: Mapping[str, Mapping[str, FloatArray]]
    """By run id and constant; what is not named changes nothing."""

    @classmethod
    def measured(
        cls,
        misses: Callable[[FloatArray, str], Sequence[FloatArray]],
        unknowns: Unknowns,
        *,
        run_ids: Sequence[str],
        start: FloatArray,
        base: Sequence[FloatArray],
    ) -> Slopes:
        """Take them by differences.

        Args:
            misses: Of each run, when the named constant has moved.
            unknowns: What is moved, one after the other.
            run_ids: Names of the runs, in order of the misses.
            start: Where the unknowns stand.
            base: The misses there.
        """
        by_run: dict[str, dict[str, FloatArray]] = {run_id: {} for run_id in run_ids}
        for row, name in enumerate(unknowns.names):
            shift = max(DIFFERENCE, LEAST_LOG_DIFFERENCE / float(unknowns.log_sd[row]))
            moved = start.copy()
            moved[row] += shift if start[row] + shift < unknowns.high[row] else -shift
            change = float(moved[row] - start[row]) * float(unknowns.log_sd[row])
            found = misses(moved, name)
            for run_id, after, before in zip(run_ids, found, base, strict=True):
                by_run[run_id][name] = (after - before) / change
        return cls(by_run=by_run)

    def jacobian(
        self, unknowns: Unknowns, run_ids: Collection[str], base: Sequence[FloatArray]
    ) -> FloatArray:
        """Return the derivatives of some runs' misses and, behind them, of the priors'."""
        rows = [
            np.array(
                [self.by_run[run_id].get(name, np.zeros(len(found))) for name in unknowns.names]
            ).T
            * unknowns.log_sd
            for run_id, found in zip(run_ids, base, strict=True)
        ]
        return np.concatenate([*rows, np.eye(len(unknowns.names))])
