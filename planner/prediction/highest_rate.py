"""The highest request rate that a deployment serves within its SLO: one number for all who ask.

A rate is served where the deployment is feasible at it (it fits, refuses nothing and meets the
SLO) and keeps up: of what is offered, at least `SERVED` is served while it lasts. The span is long
enough that a queue would show, however fast requests come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from cost_models.deployment import Deployment
from cost_models.errors import ConfigError
from planner.prediction.evaluator import Evaluator, Slice
from planner.prediction.predict import Outcome, outcome_of, predict_deployment
from planner.prediction.simulation import servers_alike
from planner.simulator import SimulationResult
from planner.workloads.demand import Demand, lasting
from planner.workloads.load import ArrivalMode

SERVED = 0.97
"""Share of what is offered that must be served while it lasts."""

TOLERANCE = 0.01
"""Relative width of the last bracket."""

FEWEST_REQUESTS = 2500
"""Of a probe: what a 99th percentile needs."""

FIRST_STEP = 1.05
MOST_STEPS = 8
"""Steps from the closed form's guess to a bracket: the first is so wide, each further squared."""

CRAWL = 1e-3
"""Share of the guess at which hardly two requests meet: what misses its SLO there always does."""

Progress = Callable[[int, float], None]
"""Called with the number of simulations so far and the rate that is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HighestRate:
    """What a deployment can take."""

    rate_per_s: float
    """Of the whole deployment; 0 where even a crawl misses the SLO or requests are refused."""
    num_simulations: int


def check_has_rate(protocol: ArrivalMode) -> None:
    """Refuse what has no highest rate.

    Raises:
        ConfigError: Clients or a queue set the pace of the requests.
    """
    if protocol is not ArrivalMode.OPEN_LOOP:
        raise ConfigError(
            "--find-rate needs requests that come on their own clock",
            hint="give a workload with poisson, gamma or trace arrivals",
        )


def highest_rate(
    evaluator: Evaluator,
    deployment: Deployment,
    demand: Demand,
    *,
    progress: Progress | None = None,
) -> HighestRate:
    """Return the highest rate under the SLO, by simulation.

    Under clients who wait for answers, and for work that is queued from the start, that is the
    rate at which the load itself is served, if that meets the SLO.

    Args:
        evaluator: Model, GPU, calibration, load and SLO.
        deployment: What serves. Servers that a static router feeds are alike: one of them is
            simulated under its share.
        demand: Requests that are sped up and slowed down.
        progress: Told of every simulation.
    """
    return _Search(evaluator, deployment, demand, progress).run()


class _Search:
    def __init__(
        self,
        evaluator: Evaluator,
        deployment: Deployment,
        demand: Demand,
        progress: Progress | None,
    ) -> None:
        self.evaluator, self.progress = evaluator, progress
        self.shares = servers_alike(deployment, replace(demand, has_steady_state=True))
        """Servers that one stands for."""
        self.whole = demand
        self.deployment = deployment.with_knobs(num_servers=deployment.num_servers // self.shares)
        self.num_simulations = 0
        rows = evaluator.evaluate(Slice(base=deployment))
        self.guess_per_s = float(rows.highest_rate_per_s[0]) / self.shares
        """What the closed form says, of what is simulated."""
        self.residence_s = float(rows.metrics["e2el_ms.mean"][0]) / 1e3

    def run(self) -> HighestRate:
        if self.whole.protocol is not ArrivalMode.OPEN_LOOP:
            rate_per_s = self._rate_at_the_load()
        else:
            low, high = self._bracket()
            while low and high / low > 1 + TOLERANCE:
                middle = math.sqrt(low * high)
                low, high = (middle, high) if self._is_served(middle) else (low, middle)
            rate_per_s = low
        return HighestRate(
            rate_per_s=rate_per_s * self.shares, num_simulations=self.num_simulations
        )

    def _rate_at_the_load(self) -> float:
        outcome = outcome_of(self.evaluator, self.deployment, self.whole)
        return outcome.values["request_per_s"] if self._is_feasible(outcome) else 0.0

    def _bracket(self) -> tuple[float, float]:
        """Return a rate that is served, or 0, and one that is not, which bracket the highest."""
        guess = self.guess_per_s
        if not 0 < guess < math.inf:
            guess = float(np.asarray(self.evaluator.load.rate_per_s)) / self.shares
        is_served = self._is_served(guess)
        if not is_served and not self._is_served(CRAWL * guess):
            return 0.0, guess
        low, high = (guess, math.inf) if is_served else (CRAWL * guess, guess)
        rate_per_s, step = guess, FIRST_STEP
        for _ in range(MOST_STEPS):
            rate_per_s = rate_per_s * step if is_served else rate_per_s / step
            if rate_per_s <= low:
                break
            step = step * step
            if self._is_served(rate_per_s):
                low = rate_per_s
            else:
                high = rate_per_s
            if (low == rate_per_s) != is_served:
                break
        return low, high if high < math.inf else low

    def _is_served(self, rate_per_s: float) -> bool:
        """Whether a rate of what is simulated meets the SLO and does not pile up."""
        self.num_simulations += 1
        if self.progress is not None:
            self.progress(self.num_simulations, rate_per_s * self.shares)
        demand = self._demand(rate_per_s)
        evaluator = self.evaluator.at_rate(rate_per_s)
        if evaluator.risk:
            found = predict_deployment(evaluator, self.deployment, demand)
            simulation, is_feasible = found.simulation, found.feasible
        else:
            outcome = outcome_of(evaluator, self.deployment, demand)
            simulation, is_feasible = outcome.simulation, self._is_feasible(outcome)
        return is_feasible and simulation is not None and served_share(simulation) >= SERVED

    def _is_feasible(self, outcome: Outcome) -> bool:
        if not outcome.memory.fits or outcome.refused_share > 0:
            return False
        return all(outcome.values[name] <= limit for name, limit in self.evaluator.slo.items())

    def _demand(self, rate_per_s: float) -> Demand:
        """Return the requests of what is simulated at a rate, as many as show a queue."""
        whole = self.whole.at_rate(rate_per_s * self.shares)
        fewest = FEWEST_REQUESTS * self.shares
        return lasting(whole, self.residence_s, fewest=fewest).every(self.shares)


def served_share(simulation: SimulationResult) -> float:
    """Return what share of the requests that come in the second half of a run leaves in it.

    In steady state as many leave as come. Where more come than are served, the requests under way
    grow: N(t) counts them, and the share is 1 − (N(end) − N(middle)) / arrivals between the two.
    """
    columns = simulation.requests
    served = ~columns.refused
    arrival_s, last_s = columns.arrival_s[served], np.sort(columns.last_token_s[served])
    arrival_s = np.sort(arrival_s)
    middle = len(arrival_s) // 2
    came = len(arrival_s) - middle
    under_way = [
        count - int(np.searchsorted(last_s, arrival_s[count - 1], side="right"))
        for count in (middle, len(arrival_s))
        if count
    ]
    return 1.0 - max(under_way[-1] - under_way[0], 0) / came
