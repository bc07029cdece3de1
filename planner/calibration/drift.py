"""Tells when a calibration no longer fits: runs far outside their interval, other versions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

WATCHED = ("tpot_ms.mean", "output_tok_per_s", "e2el_ms.p50", "ttft_ms.mean")
"""Metrics that an interval is checked for; others hang on chance more than on the engine."""

FAR = 1.5
"""Widths of the interval's side from which a measurement is far outside, not one of ten."""

TOLERATED_SHARE = 0.1
"""Share of many runs that may lie far outside by chance or by what no model explains."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """One metric of a run far outside what was predicted."""

    run_id: str
    metric: str
    measured: float
    predicted: float
    interval_90: tuple[float, float]

    @property
    def words(self) -> str:
        """The same as a sentence."""
        low, high = self.interval_90
        return (
            f"{self.run_id}: {self.metric} {self.measured:.4g}, "
            f"predicted {self.predicted:.4g} ({low:.4g} to {high:.4g})"
        )


def drifts(
    run_id: str,
    measured: Mapping[str, float],
    predicted: Mapping[str, tuple[float, tuple[float, float]]],
) -> list[Drift]:
    """Return the watched metrics of a run that lie far outside their interval.

    Args:
        run_id: Names the run.
        measured: By metric.
        predicted: Value and 90 % interval by metric.
    """
    found = []
    for metric in WATCHED:
        value, interval = predicted.get(metric, (0.0, (0.0, 0.0)))
        if measured.get(metric, 0.0) > 0 and _is_far(measured[metric], value, interval):
            found.append(
                Drift(
                    run_id=run_id,
                    metric=metric,
                    measured=measured[metric],
                    predicted=value,
                    interval_90=interval,
                )
            )
    return found


def _is_far(measured: float, predicted: float, interval: tuple[float, float]) -> bool:
    if min(predicted, *interval) <= 0:
        return False
    miss = math.log(measured / predicted)
    side = math.log(interval[1 if miss > 0 else 0] / predicted)
    return abs(miss) > FAR * abs(side)


def new_versions(versions: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return the engine versions that a calibration has not seen; none where it names none."""
    seen = set(known)
    if not seen:
        return []
    return sorted({version for version in versions if version and version not in seen})


def drift_lines(
    found: Iterable[Drift], versions: Iterable[str], *, engine: str, source: str
) -> list[str]:
    """Say what drifted, and the command that recalibrates; nothing where nothing did.

    Args:
        found: Metrics far outside their interval.
        versions: Engine versions that the calibration has not seen.
        engine: Whose calibration it is.
        source: Runs as `planner calibrate` takes them: `--runs FILE` or `--store URL`.
    """
    lines = [f"drift: {drift.words}" for drift in found]
    lines += [
        f"drift: {engine} {version} was never seen by the calibration in force"
        for version in versions
    ]
    if lines:
        lines.append(f"recalibrate: planner calibrate {source} --engine {engine} --install")
    return lines
