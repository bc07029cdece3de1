"""When a measurement has been repeated often enough, and what its repeats say together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from typing import Any

import numpy as np

DECIDING_METRICS = ("ttft_ms.p50", "tpot_ms.p50", "output_tok_per_s")
"""Repeats go on until the median of each of these is known."""

CONFIDENCE = 0.9

OUTLIER_SCALES = 3.5
"""Modified z-score above which a repeat is reported (Iglewicz and Hoaglin, 1993)."""

MAD_TO_SD = 1.4826
"""Standard deviation over median absolute deviation of a normal distribution."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MedianInterval:
    """Median of some repeats, with the distribution-free interval around it."""

    median: float
    low: float
    high: float
    coverage: float
    """Probability that the true median is inside; few repeats cannot reach 0.9."""

    @property
    def relative_width(self) -> float:
        """Width over median."""
        return (self.high - self.low) / abs(self.median) if self.median else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RepeatRule:
    """When to stop repeating."""

    least: int = 3
    most: int = 10
    tolerance: float = 0.05
    """Greatest relative width of the interval of the median."""

    def is_enough(self, measured: Sequence[Mapping[str, Any]]) -> bool:
        """Return whether these repeats will do."""
        if len(measured) < self.least:
            return False
        if len(measured) >= self.most:
            return True
        intervals = intervals_of(measured).values()
        return all(interval.relative_width <= self.tolerance for interval in intervals)


def interval_of_median(values: Sequence[float], confidence: float = CONFIDENCE) -> MedianInterval:
    """Return the narrowest pair of order statistics that holds the median so surely.

    The number of values below the median is binomial (David and Nagaraja, Order Statistics,
    section 7.1). Where the whole range does not suffice, it is returned with what it covers.
    """
    ordered = sorted(values)
    n = len(ordered)
    below = [comb(n, k) / 2**n for k in range(n + 1)]
    rank = 0
    while rank + 1 < n - 1 - rank and 1 - 2 * sum(below[: rank + 2]) >= confidence:
        rank += 1
    return MedianInterval(
        median=float(np.median(ordered)),
        low=ordered[rank],
        high=ordered[n - 1 - rank],
        coverage=1 - 2 * sum(below[: rank + 1]),
    )


def intervals_of(measured: Sequence[Mapping[str, Any]]) -> dict[str, MedianInterval]:
    """Return the deciding metrics' intervals over the `measured` sections of some repeats."""
    columns = {name: [_value(section, name) for section in measured] for name in DECIDING_METRICS}
    known = {name: [v for v in column if v is not None] for name, column in columns.items()}
    return {name: interval_of_median(column) for name, column in known.items() if column}


def outliers(values: Sequence[float]) -> list[int]:
    """Return which repeats lie far from the others; they are reported, never left out."""
    centre = float(np.median(values))
    scale = MAD_TO_SD * float(np.median(np.abs(np.array(values) - centre)))
    if scale == 0.0:
        return []
    return [i for i, value in enumerate(values) if abs(value - centre) > OUTLIER_SCALES * scale]


def repeats_section(measured: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what repeats say together, for a report."""
    section: dict[str, Any] = {"num_repeats": len(measured)}
    for name, interval in intervals_of(measured).items():
        values = [_value(repeat, name) or 0.0 for repeat in measured]
        section[name] = {
            "median": interval.median,
            "interval": [interval.low, interval.high],
            "coverage": round(interval.coverage, 3),
            "outliers": outliers(values),
        }
    return section


def _value(section: Mapping[str, Any], name: str) -> float | None:
    value: Any = section
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None
