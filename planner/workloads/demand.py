"""Every request of a workload or of a measured run: how long it is, and when it comes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from cost_models.metrics import PERCENTILES
from planner.simulator import (
    Arrivals,
    Requests,
    gamma_arrivals,
    offline_arrivals,
)
from planner.simulator.statistics import requests_needed
from planner.workloads.load import ArrivalMode, Load
from planner.workloads.measured import MeasuredRun
from planner.workloads.model import RequestTrace, Workload

FloatArray = NDArray[np.float64]

WARM_UP_FACTOR = 1.25
"""Requests drawn over those that a percentile needs: the warm-up is cut off."""

MOST_REQUESTS = 20_000
"""Requests simulated of a workload that does not end before."""

PREDICTOR_LOG_SD = 0.5
"""Error of the length predictor that shortest-job-first goes by, in log."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Demand:
    """Every request of a deployment, and when clients send it."""

    protocol: ArrivalMode
    requests: Requests
    arrival_s: FloatArray
    """Ascending; ignored in a closed loop."""
    concurrency: int = 0
    """Clients of a closed loop."""
    shared_prefix_tokens: int = 0
    """Tokens with which every prompt that is longer begins."""
    is_endless: bool = False
    """Whether a closed loop does not state how many requests it sends."""
    has_steady_state: bool = False
    """Whether the first requests are a warm-up to be cut off, not part of what was asked."""

    def __len__(self) -> int:
        """Return the number of requests."""
        return len(self.requests)

    @property
    def arriving_per_s(self) -> float:
        """Mean rate of the arrivals; infinite where all come at once."""
        span_s = float(self.arrival_s[-1] - self.arrival_s[0])
        return (len(self) - 1) / span_s if span_s > 0 else math.inf

    @property
    def arrivals(self) -> Arrivals:
        """How the requests come, as the simulator takes them."""
        if self.protocol is ArrivalMode.CLOSED_LOOP:
            return Arrivals(concurrency=self.concurrency)
        return Arrivals(arrival_s=self.arrival_s)

    def at_rate(self, rate_per_s: float) -> Demand:
        """Return the same open loop, sped up or slowed down to another mean rate."""
        return replace(self, arrival_s=self.arrival_s * (self.arriving_per_s / rate_per_s))

    def repeated(self, times: int) -> Demand:
        """Return the demand of an open loop several times over, one after the other.

        What a repeat finds in the prefix cache is its own: it is another day's traffic.
        """
        if times == 1:
            return self
        period_s = float(self.arrival_s[-1]) + 1.0 / self.arriving_per_s
        starts_s = np.repeat(np.arange(times) * period_s, len(self))
        return replace(
            self,
            requests=self.requests.repeated(times),
            arrival_s=np.tile(self.arrival_s, times) + starts_s,
        )

    def every(self, stride: int) -> Demand:
        """Return the share of an open loop that one of several servers gets in turn."""
        if stride == 1:
            return self
        rows = np.arange(0, len(self), stride)
        return replace(self, requests=self.requests.at(rows), arrival_s=self.arrival_s[rows])


def workload_demand(
    workload: Workload,
    *,
    seed: int = 0,
    num_requests: int = 0,
    most_requests: int = MOST_REQUESTS,
) -> Demand:
    """Draw as many requests of a workload as its percentiles need; a trace is taken whole.

    Simulations, load generators and datasets of engines' own benchmarks take requests from here.

    Args:
        workload: What is asked.
        seed: Same seed and number, same requests.
        num_requests: Another number of requests; of a trace, the first so many.
        most_requests: Bound on a workload that states how many requests it has.
    """
    rng = np.random.default_rng(seed)
    protocol = workload.arrival.protocol
    count = num_requests or _num_requests(workload, most_requests)
    if workload.trace is not None:
        requests, arrival_s = _of_trace(workload.trace, workload.max_output_tokens)
        if num_requests:
            rows = np.arange(min(num_requests, len(requests)))
            requests, arrival_s = requests.at(rows), arrival_s[rows]
    else:
        requests = Requests.of(
            workload.isl.sample(rng, count),
            workload.osl.sample(rng, count),
            max_output_tokens=workload.max_output_tokens,
        )
        arrival_s = _arrivals(rng, workload, count)
    # Drawn apart: who predicts lengths must not change the lengths.
    guesses = np.random.default_rng([seed, 1])
    return Demand(
        protocol=protocol,
        requests=requests.with_predictor(guesses, log_sd=PREDICTOR_LOG_SD),
        arrival_s=arrival_s,
        concurrency=workload.arrival.concurrency,
        shared_prefix_tokens=workload.shared_prefix_tokens,
        has_steady_state=protocol is ArrivalMode.OPEN_LOOP and not _has_an_end(workload),
    )


def _num_requests(workload: Workload, most_requests: int) -> int:
    asked = workload.arrival.num_requests
    if asked:
        return min(asked, most_requests)
    needed = math.ceil(WARM_UP_FACTOR * requests_needed(PERCENTILES["p99"]))
    return max(needed, 10 * workload.arrival.concurrency)


def _has_an_end(workload: Workload) -> bool:
    """Whether its requests are told or counted, so that the first belong to what was asked."""
    return workload.trace is not None or bool(workload.arrival.num_requests)


def _of_trace(trace: RequestTrace, max_output_tokens: int) -> tuple[Requests, FloatArray]:
    requests = Requests.of(trace.isl, trace.osl, max_output_tokens=max_output_tokens)
    return replace(requests, prefix_hashes=trace.prefix_hashes), trace.arrival_s


def _arrivals(rng: np.random.Generator, workload: Workload, count: int) -> FloatArray:
    if workload.arrival.protocol is not ArrivalMode.OPEN_LOOP:
        return offline_arrivals(count)
    rate_per_s = workload.arrival.rate_per_s
    drawn_s = gamma_arrivals(rng, rate_per_s=rate_per_s, cv=workload.arrival.cv, count=count)
    # The sample has exactly the asked mean rate: one source of chance less.
    return np.asarray(drawn_s * ((count - 1) / rate_per_s / drawn_s[-1]))


def run_demand(run: MeasuredRun, load: Load) -> Demand:
    """Return what a measured run asked for: its own lengths, its own open-loop arrivals.

    Raises:
        ProfileError: The run's requests file cannot be read.
    """
    isl, osl, arrival_s = run.lengths()
    count = len(isl) if len(isl) > 1 else _asked_requests(load)
    requests = Requests.of(
        np.broadcast_to(isl, count).astype(np.int64), np.broadcast_to(osl, count).astype(np.int64)
    )
    if load.protocol is not ArrivalMode.OPEN_LOOP:
        arrival_s = offline_arrivals(count)
    elif len(arrival_s) != count:
        rng = np.random.default_rng(0)
        rate_per_s = float(np.asarray(load.rate_per_s))
        arrival_s = gamma_arrivals(rng, rate_per_s=rate_per_s, cv=load.arrival_cv, count=count)
    order = np.argsort(arrival_s, kind="stable")
    return Demand(
        protocol=load.protocol,
        requests=requests.at(order),
        arrival_s=arrival_s[order] - arrival_s.min(),
        concurrency=round(load.concurrency),
        shared_prefix_tokens=int(run.workload.get("shared_prefix_tokens") or 0),
        is_endless=load.protocol is ArrivalMode.CLOSED_LOOP and not load.num_requests,
    )


def _asked_requests(load: Load) -> int:
    """Requests of a run of equal lengths; 10 per client where it does not say."""
    unstated = 10 * load.concurrency or requests_needed(PERCENTILES["p99"])
    return min(round(load.num_requests or unstated), MOST_REQUESTS)


RESIDENCES = 10.0
"""Times that a request stays in a server which a simulated span lasts, so that a queue shows."""

MOST_TILED = 20_000
"""Requests that a demand is repeated up to for that."""


def lasting(demand: Demand, residence_s: float, *, fewest: int = 0) -> Demand:
    """Return the demand of an open loop repeated until a queue would show.

    Args:
        demand: What is asked.
        residence_s: How long a request stays in a server.
        fewest: Requests that there are at least.
    """
    wanted = max(fewest, RESIDENCES * residence_s * demand.arriving_per_s, 1.0)
    return demand.repeated(math.ceil(min(wanted, max(MOST_TILED, fewest)) / len(demand)))
