"""What a plan says of other orders of the waiting queue."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from planner.plans.scheduling import PRIORITY, SHORTEST, Scheduling, scheduling_of
from planner.prediction.predict import predict_deployment
from planner.question import Problem, load_problem
from planner.workloads.demand import workload_demand

CLIENTS = 48


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A closed loop whose outputs differ by much."""
    path: Path = tmp_path_factory.mktemp("workloads") / "crowded.json"
    workload = {
        "schema_version": 1,
        "name": "crowded",
        "title": "Short and long answers",
        "model": "llama-3.1-8b",
        "arrival": {"process": "closed_loop", "concurrency": CLIENTS, "num_requests": 240},
        "isl": {"kind": "fixed", "tokens": 200},
        "osl": {"kind": "lognormal", "median": 100, "sigma": 1.0, "minimum": 4, "maximum": 900},
        "objective": "goodput",
        "source": "made for a test",
    }
    path.write_text(json.dumps(workload))
    return str(path)


@cache
def problem_of(workload: str, engine: str) -> Problem:
    return load_problem(gpu="h100", workload=workload, engine=engine)


def orders(workload: str, *, batch: int, engine: str = "trtllm") -> Scheduling:
    problem = problem_of(workload, engine)
    config = replace(problem.default_config, max_batch_size=batch)
    demand = workload_demand(problem.workload)
    recommended = predict_deployment(problem.evaluator, problem.deployment_of(config), demand)
    return scheduling_of(
        recommended, evaluator=problem.evaluator, demand=demand, rules=problem.rules
    )


def test_nothing_is_simulated_where_nobody_waits(crowded: str) -> None:
    found = orders(crowded, batch=2 * CLIENTS)
    assert not found.matters
    assert found.alternatives == ()
    assert found.to_json()["simulated"] is False


def test_shortest_first_and_urgent_first_shorten_the_wait_of_a_crowd(crowded: str) -> None:
    found = orders(crowded, batch=8)
    assert found.contention > 0.5
    by_order = {one.queue_order: one for one in found.alternatives}
    assert by_order[SHORTEST].gain("ttft_ms.mean") > 0.1
    assert by_order[PRIORITY].gain("ttft_ms.mean") > 0.3


@pytest.mark.parametrize(
    ("engine", "how"), [("trtllm", ""), ("vllm", "--scheduling-policy priority")]
)
def test_it_says_whether_the_engine_has_the_order(crowded: str, engine: str, how: str) -> None:
    for one in orders(crowded, batch=8, engine=engine).alternatives:
        assert one.how.startswith(how)
        assert bool(one.how) == bool(how)
