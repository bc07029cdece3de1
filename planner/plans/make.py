"""A plan from a question."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.plans.plan import Plan, make_plan
from planner.question import (
    PlanRequest,
    Problem,
    _objective,
    requested_problem,
    search_space,
)
from planner.search.study import SearchOptions
from planner.workloads.demand import workload_demand


def plan(request: PlanRequest) -> Plan:
    """Return the best configuration for a workload on a GPU, and why.

    Raises:
        PlannerError: Bad input; what merely does not fit or misses the SLO is a `Plan`
            with status `infeasible`.
    """
    return plan_problem(requested_problem(request), request)


def plan_problem(problem: Problem, request: PlanRequest) -> Plan:
    """Return the best configuration for a problem that is loaded; see `plan`."""
    space = search_space(problem, request)
    options = SearchOptions(
        objective=_objective(request.objective or problem.workload.objective),
        trials=request.trials,
        time_budget_s=request.time_budget_s,
        seed=request.seed,
        storage=request.storage,
        progress=request.progress,
        on_best=request.on_best,
        stopped=request.stopped,
    )
    # The seed is the search's: which requests are drawn must not decide what is recommended.
    demand = workload_demand(problem.workload)
    found = make_plan(space, problem.evaluator, options, demand, all_orders=request.scheduling)
    return replace(found, asked=_asked(problem, request))


def _asked(problem: Problem, request: PlanRequest) -> dict[str, Any]:
    """What a plan answers, so that its file alone can be measured; files by their full path."""
    return {
        "gpu": problem.gpu.name if request.gpu == "auto" else _full_path(request.gpu),
        "workload": _full_path(request.workload),
        "model": _full_path(request.model or problem.workload.model),
        "engine": request.engine,
        "num_gpus": request.num_gpus,
        "use_all": request.use_all,
        "slo": dict(problem.slo),
        "risk": request.risk,
        "max_quality_loss_pct": request.max_quality_loss_pct,
    }


def _full_path(name: str) -> str:
    path = Path(name)
    return str(path.resolve()) if name and path.exists() else name
