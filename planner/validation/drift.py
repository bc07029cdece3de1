"""Tells when a calibration no longer fits: runs far outside their interval, other versions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Watched:
    """One run beside what was predicted of it."""

    engine: str
    engine_version: str
    drifts: tuple[Drift, ...]


def drift_lines(
    runs: Sequence[Watched], known: Callable[[str], Iterable[str]], *, source: str
) -> list[str]:
    """Say which runs the calibration no longer explains, by engine, and how to recalibrate.

    Args:
        runs: Of any engines.
        known: Versions that an engine's calibration has seen.
        source: Runs as `planner calibrate` takes them: `--runs FILE` or `--store URL`.

    Returns:
        Nothing where nothing drifted, or no more runs than chance explains.
    """
    lines: list[str] = []
    for engine in dict.fromkeys(run.engine for run in runs):
        of_engine = [run for run in runs if run.engine == engine]
        far = [run for run in of_engine if run.drifts]
        is_chance = len(far) <= TOLERATED_SHARE * len(of_engine)
        found = [] if is_chance else [f"drift: {d.words}" for run in far for d in run.drifts]
        found += [
            f"drift: {engine} {version} was never seen by the calibration in force"
            for version in new_versions((run.engine_version for run in of_engine), known(engine))
        ]
        if found:
            command = f"recalibrate: planner calibrate {source} --engine {engine} --install"
            lines += [*found, command]
    return lines
