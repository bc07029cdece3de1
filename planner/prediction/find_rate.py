"""The highest request rate that meets the SLO when it is simulated: goodput."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from planner.estimator.load import Protocol
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import HostDoubt, Prediction, predict_config
from planner.prediction.simulation import Demand

TOLERANCE = 0.01
"""Relative width of the last bracket."""

LARGEST_STEPS = 24
"""Doublings or halvings until a bracket is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HighestRate:
    """What a configuration can take."""

    rate_per_s: float
    """0 where even a crawl misses the SLO."""
    prediction: Prediction
    """At that rate."""
    num_simulations: int


def find_rate(evaluator: Evaluator, config: EngineConfig, demand: Demand) -> HighestRate:
    """Bisect the arrival rate between one that meets the SLO and one that does not.

    Raises:
        ConfigError: The workload has no arrival rate, or no SLO that could break.
    """
    if demand.protocol is not Protocol.OPEN_LOOP:
        raise ConfigError(
            "--find-rate needs requests that come on their own clock",
            hint="give a workload with poisson, gamma or trace arrivals",
        )
    if not evaluator.slo:
        raise ConfigError("--find-rate needs an SLO", hint="give --slo ttft_ms.p99=500")
    return _Bisection(evaluator, config, demand).run()


class _Bisection:
    def __init__(self, evaluator: Evaluator, config: EngineConfig, demand: Demand) -> None:
        self.evaluator, self.config, self.demand = evaluator, config, demand
        self.num_simulations = 0

    def run(self) -> HighestRate:
        low, high, slowest = self._bracket()
        while low and high / low > 1 + TOLERANCE:
            middle = (low * high) ** 0.5
            if self._at(middle).feasible:
                low = middle
            else:
                high = middle
        # Once more, with every doubt, what the search saw without that of the host.
        prediction = self._at(low or slowest, host=HostDoubt.SIMULATED)
        return HighestRate(
            rate_per_s=low, prediction=prediction, num_simulations=self.num_simulations
        )

    def _bracket(self) -> tuple[float, float, float]:
        """Return a rate that meets the SLO or 0, twice that or less that does not, and the last."""
        rate = float(np.asarray(self.evaluator.load.rate_per_s))
        is_met = self._at(rate).feasible
        factor = 2.0 if is_met else 0.5
        for _ in range(LARGEST_STEPS):
            other = rate * factor
            if self._at(other).feasible != is_met:
                low = rate if is_met else other
                return low, low * 2.0, other
            rate = other
        return (rate, rate, rate) if is_met else (0.0, 0.0, rate)

    def _at(self, rate_per_s: float, host: HostDoubt | None = None) -> Prediction:
        """Predict a rate; only at a risk does the host's doubt decide what meets the SLO."""
        deciding = HostDoubt.SIMULATED if self.evaluator.risk else HostDoubt.LEFT_OUT
        self.num_simulations += 1
        load = replace(self.evaluator.load, rate_per_s=rate_per_s)
        return predict_config(
            replace(self.evaluator, load=load),
            self.config,
            self.demand.at_rate(rate_per_s),
            host=host or deciding,
        )
