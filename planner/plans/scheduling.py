"""What another order of the waiting queue would bring a plan, and whether its engine has it.

An order changes something only while at least two requests wait; elsewhere nothing is simulated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cost_models.engine_rules import EngineRules
from engines.registry import find_engine
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import HostUncertainty, Prediction, predict_deployment
from planner.simulator import SimulationResult
from planner.workloads.demand import Demand

LEAST_CONTENTION = 0.01
"""Share of the engine's time with two or more waiting below which no order matters."""

MOST_WORK = 200_000
"""Steps, and ten for each request, of a simulation that is repeated without being asked to."""

STEPS_PER_REQUEST = 10
"""A simulated request takes about as long as so many steps."""

COMPARED = (
    "ttft_ms.mean", "ttft_ms.p99", "e2el_ms.mean", "e2el_ms.p99", "goodput_request_per_s",
)  # fmt: skip

SHORTEST, PRIORITY, PREFIX = "SHORTEST_JOB_FIRST", "PRIORITY", "LONGEST_PREFIX_MATCH"


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderAlternative:
    """One order of the queue against first-come-first-served, both simulated."""

    queue_order: str
    changes: Mapping[str, tuple[float, float]]
    """(first come first served, this order) by metric."""
    how: str
    """How the engine is told; empty where it has no such order."""
    requests: str = "all requests"
    """Of whom the metrics are."""

    def gain(self, metric: str) -> float:
        """Return the relative gain in a metric; above 0 is better."""
        before, after = self.changes[metric]
        if metric.startswith("goodput"):
            return after / before - 1 if before else 0.0
        return 1 - after / before if before else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheduling:
    """What orders of the queue would do to a plan."""

    contention: float
    """Share of the engine's time in which at least two requests wait."""
    alternatives: tuple[OrderAlternative, ...] = ()
    engine: str = ""
    """The engine's title."""
    was_too_long: bool = False
    """Whether it queues, but was not simulated: that would keep a person waiting."""

    @property
    def matters(self) -> bool:
        """Whether requests compete for their place."""
        return self.contention >= LEAST_CONTENTION

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "contention_fraction": round(self.contention, 4),
            "simulated": bool(self.alternatives),
            "alternatives": [
                {
                    "queue_order": one.queue_order,
                    "requests": one.requests,
                    "offered_through": one.how or None,
                    "changes": {
                        name: [round(value, 4) for value in pair]
                        for name, pair in one.changes.items()
                    },
                }
                for one in self.alternatives
            ],
        }


def scheduling_of(
    recommended: Prediction,
    *,
    evaluator: Evaluator,
    demand: Demand,
    rules: EngineRules,
    always: bool = False,
) -> Scheduling:
    """Return what each order of the queue would do to a recommendation.

    Args:
        recommended: A simulated prediction, first come first served.
        evaluator: Model, GPU, calibration, load and SLO.
        demand: The requests that it was simulated with.
        rules: What the engine offers.
        always: Simulate however long it takes.
    """
    simulation = recommended.simulation
    if simulation is None:
        return Scheduling(contention=0.0, engine=rules.title)
    found = Scheduling(contention=contention(simulation), engine=rules.title)
    if not found.matters:
        return found
    work = simulation.num_steps + STEPS_PER_REQUEST * simulation.num_requests
    if work > MOST_WORK and not always:
        return replace(found, was_too_long=True)
    orders = _Orders(recommended, simulation, evaluator, demand, rules)
    alternatives = [orders.shortest_first(), orders.urgent_first()]
    if demand.requests.prefix_hashes is not None:
        alternatives.append(orders.longest_prefix_first())
    return replace(found, alternatives=tuple(alternatives))


def contention(simulation: SimulationResult) -> float:
    """Return the share of the engines' time in which two or more requests wait."""
    logs = [trace.log for trace in simulation.engines]
    busy_s = np.concatenate([log.end_s - log.start_s for log in logs])
    waiting = np.concatenate([log.waiting for log in logs])
    total_s = float(busy_s.sum())
    return float(busy_s[waiting >= 2].sum()) / total_s if total_s else 0.0


@dataclass(frozen=True, slots=True)
class _Orders:
    """The recommendation under other orders."""

    recommended: Prediction
    simulation: SimulationResult
    evaluator: Evaluator
    demand: Demand
    rules: EngineRules

    def shortest_first(self) -> OrderAlternative:
        """Those with the shortest predicted output first; the predictor errs as real ones do."""
        return OrderAlternative(
            queue_order=SHORTEST,
            changes=_changes(self.recommended, self._under(SHORTEST, self.demand)),
            how=self._how(SHORTEST),
        )

    def longest_prefix_first(self) -> OrderAlternative:
        """Those that find most of their prompt in the cache first."""
        return OrderAlternative(
            queue_order=PREFIX,
            changes=_changes(self.recommended, self._under(PREFIX, self.demand)),
            how=self._how(PREFIX),
        )

    def urgent_first(self) -> OrderAlternative:
        """Every second request is urgent: what that half gains, the other half waits for."""
        classes = np.arange(len(self.demand), dtype=np.int64) % 2
        requests = replace(self.demand.requests, priority=classes)
        found = self._under(PRIORITY, replace(self.demand, requests=requests))
        after = found.simulation or self.simulation
        changes = {
            f"ttft_ms.{name}": (
                _urgent_ttft_ms(self.simulation, name),
                _urgent_ttft_ms(after, name),
            )
            for name in ("mean", "p99")
        }
        return OrderAlternative(
            queue_order=PRIORITY,
            changes=changes,
            how=self._how(PRIORITY),
            requests="the urgent half",
        )

    def _how(self, order: str) -> str:
        """Return how the engine is told of an order; empty where it has none."""
        return find_engine(self.rules.name).queue_orders.get(order, "")

    def _under(self, order: str, demand: Demand) -> Prediction:
        deployment = self.recommended.deployment.with_knobs(queue_order=order)
        return predict_deployment(self.evaluator, deployment, demand, host=HostUncertainty.LEFT_OUT)


def _changes(before: Prediction, after: Prediction) -> dict[str, tuple[float, float]]:
    return {name: (before.value(name), after.value(name)) for name in COMPARED}


def _urgent_ttft_ms(simulation: SimulationResult, statistic: str) -> float:
    """Return a statistic of TTFT over every second request, the warm-up left out."""
    urgent = simulation.served[simulation.served % 2 == 0]
    columns = simulation.requests
    ttft_s = columns.first_token_s[urgent] - columns.arrival_s[urgent]
    value_s = ttft_s.mean() if statistic == "mean" else np.quantile(ttft_s, 0.99)
    return 1e3 * float(value_s)
