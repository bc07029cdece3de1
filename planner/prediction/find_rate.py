"""The highest request rate that meets the SLO when it is simulated: goodput."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from cost_models.engine import EngineConfig
from cost_models.errors import ConfigError
from planner.estimator.load import Protocol
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import Prediction, predict_config
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
        low, high, best = self._bracket()
        if low == 0.0:
            return HighestRate(
                rate_per_s=0.0, prediction=best, num_simulations=self.num_simulations
            )
        while high / low > 1 + TOLERANCE:
            middle = (low * high) ** 0.5
            prediction = self._at(middle)
            if prediction.feasible:
                low, best = middle, prediction
            else:
                high = middle
        return HighestRate(rate_per_s=low, prediction=best, num_simulations=self.num_simulations)

    def _bracket(self) -> tuple[float, float, Prediction]:
        """Return a rate that meets the SLO, twice that or less that does not, and the first."""
        rate = float(np.asarray(self.evaluator.load.rate_per_s))
        prediction = self._at(rate)
        factor = 2.0 if prediction.feasible else 0.5
        for _ in range(LARGEST_STEPS):
            other = self._at(rate * factor)
            if other.feasible != prediction.feasible:
                low, best = (rate, prediction) if prediction.feasible else (rate * factor, other)
                return low, low * 2.0, best
            rate, prediction = rate * factor, other
        return (rate, rate, prediction) if prediction.feasible else (0.0, 0.0, prediction)

    def _at(self, rate_per_s: float) -> Prediction:
        self.num_simulations += 1
        load = replace(self.evaluator.load, rate_per_s=rate_per_s)
        return predict_config(
            replace(self.evaluator, load=load), self.config, self.demand.at_rate(rate_per_s)
        )
