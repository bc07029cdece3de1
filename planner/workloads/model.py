"""Workloads: who asks for what, how often, and what they accept."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cost_models.acceptance import Acceptance
from cost_models.errors import ProfileError
from cost_models.metrics import PERCENTILES
from planner.workloads.load import ArrivalMode, Lengths, Load

FloatArray = NDArray[np.float64]

LARGEST_TOKENS = 10_000_000
"""No prompt or output is longer; beyond it, the file is damaged."""

SLO_METRICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms")

SLO_STATISTICS = ("mean", *PERCENTILES)

OBJECTIVES = ("goodput", "throughput", "latency", "cost")


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """How requests come."""

    process: str
    """`poisson`, `gamma`, `closed_loop`, `offline` or `trace`."""
    rate_per_s: float = 0.0
    cv: float = 1.0
    """Standard deviation over mean of the time between arrivals."""
    concurrency: int = 0
    num_requests: int = 0

    @property
    def protocol(self) -> ArrivalMode:
        """The protocol under which such arrivals are measured."""
        named = {"closed_loop": ArrivalMode.CLOSED_LOOP, "offline": ArrivalMode.OFFLINE}
        return named.get(self.process, ArrivalMode.OPEN_LOOP)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LengthDistribution:
    """Lengths in tokens as an inverse CDF: linear between its knots."""

    probabilities: FloatArray
    tokens: FloatArray

    def quantile(self, probability: FloatArray | float) -> FloatArray:
        """Return the length below which this share of requests falls."""
        return np.asarray(np.interp(probability, self.probabilities, self.tokens))

    def sample(self, rng: np.random.Generator, size: int) -> NDArray[np.int64]:
        """Draw whole lengths: one from each of `size` equally likely slices, in random order."""
        slices = (rng.permutation(size) + rng.random(size)) / size
        return np.maximum(np.rint(self.quantile(slices)), 1).astype(np.int64)

    def lengths(self) -> Lengths:
        """Return moments and percentiles, integrated over the inverse CDF."""
        values = self.quantile((np.arange(20_000) + 0.5) / 20_000)
        mean = float(values.mean())
        return Lengths(
            mean=mean,
            cv=float(values.std() / mean),
            quantiles={name: float(self.quantile(q)) for name, q in PERCENTILES.items()},
            maximum=float(self.tokens[-1]),
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RequestTrace:
    """Requests one by one, in order of arrival."""

    arrival_s: FloatArray
    isl: NDArray[np.int64]
    osl: NDArray[np.int64]
    prefix_hashes: Sequence[Sequence[int]] | None = None
    """Mooncake's ids of 512-token prefix blocks, one list a request."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """What a deployment is asked to serve, and what counts as served well."""

    name: str
    title: str
    model: str
    """Profile or hub name; empty where the file states none (a bare trace)."""
    arrival: Arrival
    isl: LengthDistribution
    osl: LengthDistribution
    shared_prefix_tokens: int = 0
    max_output_tokens: int
    slo: Mapping[str, float] = field(default_factory=dict)
    """Limits by metric name, in the unit of the name: `{"ttft_ms.p99": 500}`."""
    acceptances: Mapping[str, Acceptance] = field(default_factory=dict)
    """How often drafts of this text are right, by decoding type."""
    objective: str = "goodput"
    source: str = ""
    trace: RequestTrace | None = None

    def load(self) -> Load:
        """Return what the closed form reads."""
        isl = self.isl.lengths()
        return Load(
            protocol=self.arrival.protocol,
            isl=isl,
            osl=self.osl.lengths(),
            concurrency=float(self.arrival.concurrency),
            rate_per_s=self.arrival.rate_per_s,
            arrival_cv=self.arrival.cv,
            num_requests=float(self.arrival.num_requests),
            reusable_prefix_tokens=float(min(self.shared_prefix_tokens, isl.quantiles["p50"] / 2)),
            max_output_tokens=float(self.max_output_tokens),
            acceptances=self.acceptances,
        )

    @property
    def max_seq_len(self) -> int:
        """Longest prompt with the longest output that clients allow, in steps of 64."""
        longest = int(self.isl.tokens[-1]) + self.max_output_tokens
        return -(-longest // 64) * 64


def check_slo(slo: Mapping[str, float], where: str) -> dict[str, float]:
    """Return an SLO whose metrics and limits make sense.

    Raises:
        ProfileError: With the metric, its limit and what would be accepted.
    """
    known = [f"{metric}.{statistic}" for metric in SLO_METRICS for statistic in SLO_STATISTICS]
    for name, limit in slo.items():
        if name not in known:
            raise ProfileError(
                f"{where}: slo metric {name!r} is unknown",
                hint=f"known: {', '.join(SLO_METRICS)} with .{', .'.join(SLO_STATISTICS)}",
            )
        if not (math.isfinite(limit) and 0 < limit <= 1e9):
            raise ProfileError(f"{where}: slo {name}={limit}", hint="give milliseconds above 0")
    return dict(slo)
