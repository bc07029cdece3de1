"""What the planner says of a measurement before it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from cost_models.acceptance import Acceptance, stated_chances
from cost_models.engine import EngineConfig
from cost_models.errors import PlannerError
from engines.registry import as_run, is_engine
from executor.protocols import OpenLoop
from executor.traffic import Traffic
from planner.local_gpu import CPU
from planner.measuring.request import COMPARED_METRICS, MeasureRequest
from planner.workloads.model import Workload

if TYPE_CHECKING:
    from planner.question import Problem
    from planner.workloads.demand import Demand


def prediction_of(
    config: EngineConfig,
    *,
    gpu: str,
    model: str,
    traffic: Traffic,
    request: MeasureRequest,
    engine: str,
) -> dict[str, Any]:
    """Return what the planner says before a run; empty for engines and GPUs it does not know."""
    from planner.question import (  # noqa: PLC0415
        changed_load,
        load_problem,
        predict_problem,
    )

    if gpu == CPU or not is_engine(engine):
        return {}
    try:
        problem = load_problem(gpu=gpu, workload=request.workload, model=model, engine=engine)
        problem = changed_load(
            problem, rate_per_s=request.rate_per_s, isl=request.isl, osl=request.osl
        )
        problem = _drafting_by_chance(problem, config, request.backend_options)
        demand = _demand_of(traffic, problem.workload)
        deployment = problem.deployment_of(as_run(config, engine))
        prediction, _ = predict_problem(problem, deployment, {}, demand=demand)
    except PlannerError:
        return {}
    return {
        name: {"value": prediction.value(name), "interval_90": list(metric.interval_90)}
        for name, metric in prediction.metrics.items()
        if name in COMPARED_METRICS and np.isfinite(metric.value)
    }


def _demand_of(traffic: Traffic, workload: Workload) -> Demand:
    """Return the very requests that are about to be sent, as a simulation takes them."""
    from planner.simulator import Requests, offline_arrivals  # noqa: PLC0415
    from planner.workloads.demand import Demand  # noqa: PLC0415

    arrival_s = offline_arrivals(len(traffic.isl))
    if isinstance(traffic.protocol, OpenLoop):
        arrival_s = np.asarray(traffic.protocol.arrival_s)
    return Demand(
        protocol=workload.arrival.protocol,
        requests=Requests.of(np.asarray(traffic.isl), np.asarray(traffic.osl)),
        arrival_s=arrival_s,
        concurrency=workload.arrival.concurrency,
        shared_prefix_tokens=traffic.shared_prefix_tokens,
    )


def _drafting_by_chance(
    problem: Problem, config: EngineConfig, options: Mapping[str, str]
) -> Problem:
    """Return the problem with the acceptance that a backend is told to make up, if it is."""
    text = options.get("synthetic_acceptance")
    if text is None or not config.speculates:
        return problem
    chances = stated_chances(text, config.max_draft_len)
    made_up = Acceptance(conditional=chances, source="synthetic_acceptance")
    load = replace(problem.evaluator.load, acceptances={config.decoding_type: made_up})
    return replace(problem, evaluator=problem.evaluator.under(load))
