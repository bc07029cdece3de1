"""What a client sees of a served request, from timestamps: TTFT, TPOT, ITL, E2EL, goodput.

The one definition of each, for simulated and for measured requests alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Seconds = TypeVar("Seconds", float, FloatArray)

PERCENTILES: Mapping[str, float] = {"p50": 0.50, "p90": 0.90, "p95": 0.95, "p99": 0.99}
"""Reported percentiles by name, as the share of values below."""


def percentile(values: ArrayLike, fraction: float) -> float:
    """Return the value below which a share lies, linear between neighbours; NaN of nothing."""
    values = np.asarray(values, dtype=np.float64)
    return float(np.quantile(values, fraction)) if values.size else math.nan


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Mean and percentiles of a sample, in the unit of the sample."""

    mean: float
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def of(cls, values: ArrayLike) -> Distribution:
        """Return the summary of a sample; all NaN where it is empty."""
        values = np.asarray(values, dtype=np.float64)
        if not values.size:
            return cls(mean=math.nan, **dict.fromkeys(PERCENTILES, math.nan))
        cuts = np.quantile(values, list(PERCENTILES.values())).tolist()
        return cls(mean=float(values.mean()), **dict(zip(PERCENTILES, cuts, strict=True)))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTimes:
    """Finished requests as columns, one entry a request; seconds."""

    arrival_s: FloatArray
    """When the client sent the request, on any clock."""
    ttft_s: FloatArray
    """From the arrival to the first token."""
    e2el_s: FloatArray
    """From the arrival to the last token."""
    osl: NDArray[np.int64]
    """Output tokens."""
    itl_s: FloatArray
    """Gaps between streamed chunks, of all requests together; empty where not recorded."""

    @property
    def tpot_s(self) -> FloatArray:
        """(E2EL − TTFT)/(OSL − 1) of each request that has a second token."""
        several = self.osl > 1
        decode_s = (self.e2el_s - self.ttft_s)[several]
        return np.asarray(decode_s / (self.osl[several] - 1))

    @property
    def duration_s(self) -> float:
        """From the first arrival to the last token; 0 without requests."""
        if not self.arrival_s.size:
            return 0.0
        return float((self.arrival_s + self.e2el_s).max() - self.arrival_s.min())


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingMetrics:
    """What a whole run delivered; seconds and rates."""

    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2el_s: Distribution
    duration_s: float
    request_per_s: float
    output_tok_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyLimits:
    """What each single request must keep to count as served well; seconds."""

    ttft_s: float = math.inf
    tpot_s: float = math.inf
    e2el_s: float = math.inf


def chunk_gap(gap: Seconds, *, mean_gap: Seconds, tokens_per_chunk: float) -> Seconds:
    """Return the gap between streamed chunks of several tokens, from that between tokens.

    A chunk waits for one gap of the asked rank and otherwise average ones.
    """
    return gap + (tokens_per_chunk - 1) * mean_gap


def serving_metrics(times: RequestTimes) -> ServingMetrics:
    """Return the distributions and rates of a run."""
    duration_s = times.duration_s
    return ServingMetrics(
        ttft_s=Distribution.of(times.ttft_s),
        tpot_s=Distribution.of(times.tpot_s),
        itl_s=Distribution.of(times.itl_s),
        e2el_s=Distribution.of(times.e2el_s),
        duration_s=duration_s,
        request_per_s=_rate(times.arrival_s.size, duration_s),
        output_tok_per_s=_rate(float(times.osl.sum()), duration_s),
    )


def goodput_per_s(times: RequestTimes, limits: LatencyLimits) -> float:
    """Return requests per second that keep every limit (DistServe, OSDI 2024, section 2).

    A request of one token has no TPOT and keeps any limit on it.
    """
    tpot_s = np.zeros_like(times.e2el_s)
    tpot_s[times.osl > 1] = times.tpot_s
    good = (
        (times.ttft_s <= limits.ttft_s)
        & (tpot_s <= limits.tpot_s)
        & (times.e2el_s <= limits.e2el_s)
    )
    return _rate(float(good.sum()), times.duration_s)


def _rate(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
