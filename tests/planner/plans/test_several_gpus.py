"""Plans for several GPUs: as few as do, obvious to a reader, the same whatever the seed."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from planner.plans.make import plan
from planner.prediction.highest_rate import highest_rate
from planner.prediction.predict import predict_deployment
from planner.question import PlanRequest, load_problem
from planner.workloads.demand import workload_demand

PATIENT_S = 600.0
"""A budget that no plan here uses up: what is decided must not depend on the clock."""

REPOSITORY = Path(__file__).parents[3]


def chat_at(rate_per_s: float, folder: Path) -> str:
    """The shipped chat at another rate."""
    data: dict[str, Any] = json.loads((REPOSITORY / "profiles/workloads/chat.json").read_text())
    data["arrival"]["rate_per_s"] = rate_per_s
    path = folder / f"chat-{rate_per_s:g}.json"
    path.write_text(json.dumps(data))
    return str(path)


@pytest.mark.parametrize(("rate_per_s", "num_servers"), [(8, 1), (40, 2), (200, 6)])
def test_the_fewest_gpus_that_do_are_recommended(
    tmp_path: Path, rate_per_s: float, num_servers: int
) -> None:
    workload = chat_at(rate_per_s, tmp_path)
    found = plan(
        PlanRequest(gpu="h100", workload=workload, num_gpus=8, trials=20, time_budget_s=PATIENT_S)
    )
    best = found.recommended
    config = best.config
    assert found.status == "feasible"
    assert best.deployment.num_servers == best.deployment.num_gpus == num_servers
    assert (config.quantization, config.tensor_parallel_size) == ("fp8", 1)
    assert config.pipeline_parallel_size == config.stream_interval == 1
    assert best.highest_rate_per_s >= rate_per_s
    # What more would buy: every further server as much as each of these.
    sizes = [step.deployment.num_gpus for step in found.growth]
    assert sizes == list(range(num_servers + 1, 9))
    each = best.highest_rate_per_s / num_servers
    for step in found.growth:
        assert step.highest_rate_per_s == pytest.approx(each * step.deployment.num_gpus, rel=0.1)


def test_using_all_gpus_is_no_worse_than_as_many_copies_of_the_plan_for_one() -> None:
    one = plan(
        PlanRequest(gpu="h100", workload="chat", trials=20, time_budget_s=PATIENT_S)
    ).recommended
    four = plan(
        PlanRequest(
            gpu="h100",
            workload="chat",
            num_gpus=4,
            use_all=True,
            trials=20,
            time_budget_s=PATIENT_S,
        )
    ).recommended
    assert four.deployment.num_gpus == 4
    assert four.highest_rate_per_s >= 0.99 * 4 * one.highest_rate_per_s
    assert four.quality.loss_pct <= one.quality.loss_pct


def test_the_seed_decides_nothing() -> None:
    rates = [
        plan(
            PlanRequest(
                gpu="h200",
                workload="chat",
                num_gpus=8,
                use_all=True,
                seed=seed,
                trials=20,
                time_budget_s=PATIENT_S,
            )
        ).recommended.highest_rate_per_s
        for seed in range(3)
    ]
    assert max(rates) <= 1.01 * min(rates)


def test_the_highest_rate_doubles_with_the_servers() -> None:
    problem = load_problem(gpu="h100", workload="chat")
    demand = workload_demand(problem.workload)
    settings = {"quantization": "fp8", "enable_chunked_prefill": True, "max_batch_size": 256}
    rates = [
        highest_rate(
            problem.evaluator,
            problem.default_deployment.with_knobs(num_servers=number, **settings),
            demand,
        ).rate_per_s
        for number in (1, 2, 4, 8)
    ]
    for fewer, more in pairwise(rates):
        assert more == pytest.approx(2 * fewer, rel=0.08)


@pytest.mark.parametrize("num_servers", [1, 2, 4])
@pytest.mark.parametrize("rate_of_each_per_s", [8.0, 24.0])
def test_closed_form_and_simulation_agree_over_servers_and_rates(
    num_servers: int, rate_of_each_per_s: float
) -> None:
    problem = load_problem(gpu="h100", workload="chat")
    rate_per_s = num_servers * rate_of_each_per_s
    evaluator = problem.evaluator.at_rate(rate_per_s)
    demand = workload_demand(problem.workload).at_rate(rate_per_s)
    deployment = problem.default_deployment.with_knobs(
        num_servers=num_servers, quantization="fp8", enable_chunked_prefill=True
    )
    closed = predict_deployment(evaluator, deployment)
    simulated = predict_deployment(evaluator, deployment, demand)
    for metric, tolerance in (("tpot_ms.mean", 0.12), ("request_per_s", 0.04)):
        assert simulated.value(metric) == pytest.approx(closed.value(metric), rel=tolerance)
    assert simulated.front_end_share == pytest.approx(closed.front_end_share, rel=0.05)


def test_one_server_stands_for_all_that_are_alike() -> None:
    problem = load_problem(gpu="h100", workload="chat")
    evaluator = problem.evaluator.at_rate(60.0)
    demand = workload_demand(problem.workload).at_rate(60.0)
    deployment = problem.default_deployment.with_knobs(
        num_servers=3, quantization="fp8", enable_chunked_prefill=True
    )
    whole, one = (
        predict_deployment(evaluator, deployment, demand, whole_fleet=whole)
        for whole in (True, False)
    )
    for metric in ("tpot_ms.mean", "ttft_ms.mean", "request_per_s", "output_tok_per_s"):
        assert one.value(metric) == pytest.approx(whole.value(metric), rel=0.05)
