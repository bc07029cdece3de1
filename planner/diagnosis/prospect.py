"""What a run should have done, and what it would have done otherwise: counterfactual predictions.

Each answer is a prediction of the run's own requests, made anew with one thing changed, so that
what a knob or a fault accounts for is computed and not remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.engine_rules import EngineRules
from cost_models.errors import PlannerError
from cost_models.gpu import GpuSpec
from cost_models.memory import MemoryPlan
from engines.registry import find_engine
from planner.prediction.evaluator import Evaluator
from planner.prediction.predict import HostUncertainty, Prediction, predict_deployment
from planner.simulator import SimulationResult
from planner.simulator.step_log import StepLog
from planner.validation.validate import capacity_evaluator, run_calibration, run_evaluator
from planner.workloads.demand import Demand, run_demand
from planner.workloads.load import ArrivalMode
from planner.workloads.measured import MeasuredRun

ROOMY = 8.0
"""A GPU of so many times the memory has no KV cache that could run out."""

ALONE = 0.05
"""Share of an open loop's rate at which hardly any two requests meet."""

COMPARED = (
    "ttft_ms.mean", "ttft_ms.p50", "ttft_ms.p90", "ttft_ms.p95", "ttft_ms.p99",
    "tpot_ms.mean", "tpot_ms.p50", "tpot_ms.p90", "tpot_ms.p95", "tpot_ms.p99",
    "itl_ms.mean", "itl_ms.p50", "itl_ms.p90", "itl_ms.p95", "itl_ms.p99",
    "e2el_ms.mean", "e2el_ms.p50", "e2el_ms.p90", "e2el_ms.p95", "e2el_ms.p99",
    "output_tok_per_s", "request_per_s", "goodput_request_per_s",
)  # fmt: skip
"""Metrics in which two predictions are compared."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prospect:
    """The prediction of a run of which memory alone is known: it failed before any request."""

    evaluator: Evaluator
    deployment: Deployment
    rules: EngineRules
    base: Prediction

    @property
    def config(self) -> EngineConfig:
        """What the engine of each server was told."""
        return self.deployment.config

    @property
    def engine(self) -> str:
        """The engine's name."""
        return self.rules.name

    def memory_with(self, **knobs: Any) -> MemoryPlan | None:
        """Return how memory divides with knobs turned; None where the engine does not take them."""
        changed = self.deployment.with_knobs(**knobs)
        if self.is_refused(changed.config):
            return None
        return predict_deployment(self.evaluator, changed).memory

    def is_refused(self, config: EngineConfig) -> bool:
        """Whether an engine does not take a configuration for a reason that the run's has not."""
        model, gpu = self.evaluator.model, self.evaluator.gpu
        known = {str(v) for v in self.rules.violations(self.config, model=model, gpu=gpu)}
        found = self.rules.violations(config, model=model, gpu=gpu)
        return any(str(violation) not in known for violation in found)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimulatedProspect(Prospect):
    """The prediction of a run's own requests, and of the same requests with something changed."""

    demand: Demand
    simulation: SimulationResult
    """The run behind `base`."""
    _known: dict[Deployment, Prediction | None] = field(default_factory=dict)

    @property
    def is_open_loop(self) -> bool:
        """Whether requests come on a clock of their own."""
        return self.demand.protocol is ArrivalMode.OPEN_LOOP

    @property
    def rate_per_s(self) -> float:
        """Mean rate of an open loop."""
        return float(np.asarray(self.evaluator.load.rate_per_s))

    @property
    def logs(self) -> list[StepLog]:
        """What each engine did, step by step."""
        return [trace.log for trace in self.simulation.engines]

    def with_knobs(self, **knobs: Any) -> Prediction | None:
        """Return the prediction with knobs turned; None where it is not legal or does not fit."""
        changed = self.deployment.with_knobs(**knobs)
        if changed not in self._known:
            self._known[changed] = self._predicted(changed)
        return self._known[changed]

    def with_memory(self) -> Prediction:
        """Return the prediction on a GPU whose KV cache does not run out."""
        gpu = self.evaluator.gpu
        roomy = self._on(replace(gpu, memory_bytes=ROOMY * gpu.memory_bytes))
        unbound = self.deployment.with_knobs(kv_cache_max_tokens=0)
        return self._values(roomy, unbound, self.demand)

    def with_clock(self, fraction: float) -> Prediction:
        """Return the prediction at a share of the SM clock: arithmetic slows, memory does not."""
        gpu = self.evaluator.gpu
        rates = {name: rate * fraction for name, rate in gpu.flop_per_s.items()}
        slow = self._on(replace(gpu, flop_per_s=rates))
        return self._values(slow, self.deployment, self.demand)

    def at_rate(self, rate_per_s: float) -> Prediction:
        """Return the prediction of an open loop at another mean rate."""
        return self._values(self.evaluator, self.deployment, self.demand.at_rate(rate_per_s))

    def with_clients(self, clients: int) -> Prediction:
        """Return the prediction of a closed loop of another number of clients."""
        fewer = replace(self.demand, protocol=ArrivalMode.CLOSED_LOOP, concurrency=clients)
        return self._values(self.evaluator, self.deployment, fewer)

    def nearly_alone(self) -> Prediction:
        """Return the prediction of a load under which hardly any two requests meet."""
        return self.at_rate(ALONE * self.rate_per_s) if self.is_open_loop else self.with_clients(1)

    def capacity_per_s(self, **knobs: Any) -> float:
        """Return how many requests a second are served when all of them wait from the start."""
        at_once = replace(
            self.demand,
            protocol=ArrivalMode.OFFLINE,
            arrival_s=np.zeros(len(self.demand)),
            has_steady_state=False,
        )
        changed = self.deployment.with_knobs(**knobs)
        return self._values(self.evaluator, changed, at_once).value("request_per_s")

    @staticmethod
    def _values(evaluator: Evaluator, deployment: Deployment, demand: Demand) -> Prediction:
        """Predict what is compared with the run's own prediction: values, without their doubt."""
        return predict_deployment(evaluator, deployment, demand, host=HostUncertainty.LEFT_OUT)

    def _on(self, gpu: GpuSpec) -> Evaluator:
        """Return the evaluator of another GPU; what it has computed belongs to the first."""
        known = self.evaluator
        return Evaluator(
            model=known.model,
            gpu=gpu,
            calibration=known.calibration,
            load=known.load,
            slo=known.slo,
        )

    def _predicted(self, deployment: Deployment) -> Prediction | None:
        if self.is_refused(deployment.config):
            return None
        prediction = self._values(self.evaluator, deployment, self.demand)
        return prediction if prediction.fits else None


def prospect_of(run: MeasuredRun) -> Prospect:
    """Return the prediction of a run, simulated where the run says what it asked for.

    Raises:
        PlannerError: An engine, GPU or model that the planner does not know.
    """
    calibration = run_calibration(run)
    try:
        evaluator, deployment = run_evaluator(run, calibration)
        demand = None if run.protocol == "capacity" else run_demand(run, evaluator.load)
    except PlannerError:
        # A run that failed before its requests were sent has no lengths, only memory.
        evaluator, deployment = capacity_evaluator(run, calibration)
        demand = None
    base = predict_deployment(evaluator, deployment, demand)
    rules = find_engine(run.engine).rules
    if demand is None or base.simulation is None:
        return Prospect(evaluator=evaluator, deployment=deployment, rules=rules, base=base)
    return SimulatedProspect(
        evaluator=evaluator,
        deployment=deployment,
        rules=rules,
        base=base,
        demand=demand,
        simulation=base.simulation,
    )


def ratios(before: Prediction, after: Prediction) -> Mapping[str, float]:
    """Return by what each compared metric is multiplied from one prediction to the next."""
    return {
        name: after.value(name) / before.value(name)
        for name in COMPARED
        if before.value(name) > 0 and after.value(name) > 0
    }
