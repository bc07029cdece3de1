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
from planner.simulator import SimulationResult

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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Probe:
    rate_per_s: float
    prediction: Prediction


class _Bisection:
    def __init__(self, evaluator: Evaluator, config: EngineConfig, demand: Demand) -> None:
        self.evaluator, self.config, self.demand = evaluator, config, demand
        self.num_simulations = 0

    def run(self) -> HighestRate:
        low, high, best = self._bracket()
        while low and high / low > 1 + TOLERANCE:
            middle = self._at((low * high) ** 0.5)
            if middle.prediction.feasible:
                low, best = middle.rate_per_s, middle
            else:
                high = middle.rate_per_s
        return HighestRate(
            rate_per_s=low,
            prediction=self._with_every_doubt(best),
            num_simulations=self.num_simulations,
        )

    def _bracket(self) -> tuple[float, float, _Probe]:
        """Return a rate that meets the SLO or 0, twice that or less that does not, and a probe.

        Of the first, or of the slowest that was tried.
        """
        probe = self._at(float(np.asarray(self.evaluator.load.rate_per_s)))
        is_met = probe.prediction.feasible
        factor = 2.0 if is_met else 0.5
        for _ in range(LARGEST_STEPS):
            other = self._at(probe.rate_per_s * factor)
            if other.prediction.feasible != is_met:
                best = probe if is_met else other
                return best.rate_per_s, best.rate_per_s * 2.0, best
            probe = other
        low = probe.rate_per_s if is_met else 0.0
        return low, low, probe

    def _at(self, rate_per_s: float) -> _Probe:
        """Predict a rate; only at a risk does the host's doubt decide what meets the SLO."""
        self.num_simulations += 1
        host = HostDoubt.SIMULATED if self.evaluator.risk else HostDoubt.LEFT_OUT
        return _Probe(rate_per_s=rate_per_s, prediction=self._predicted(rate_per_s, host))

    def _with_every_doubt(self, probe: _Probe) -> Prediction:
        """Predict it, from the same simulation, with the doubt that the search left out."""
        simulation = probe.prediction.simulation
        return self._predicted(probe.rate_per_s, HostDoubt.SIMULATED, simulation)

    def _predicted(
        self, rate_per_s: float, host: HostDoubt, simulation: SimulationResult | None = None
    ) -> Prediction:
        load = replace(self.evaluator.load, rate_per_s=rate_per_s)
        return predict_config(
            replace(self.evaluator, load=load),
            self.config,
            self.demand.at_rate(rate_per_s),
            host=host,
            simulation=simulation,
        )
