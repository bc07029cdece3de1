"""What if: a change is compared with the same configuration unchanged, like with like."""

from __future__ import annotations

from planner.plans.make import plan_problem
from planner.question import PlanRequest, requested_problem
from planner.what_if import ask, differences


def test_no_change_makes_no_difference() -> None:
    request = PlanRequest(gpu="h100", workload="chat", trials=0)
    problem = requested_problem(request)
    recommended = plan_problem(problem, request).recommended
    answer = ask(problem, recommended.deployment, {})
    assert dict(answer.base.metrics) == dict(answer.prediction.metrics)
    found = differences(answer.base, answer.prediction)
    assert [difference.is_better for difference in found] == [None] * len(found)


def test_more_bits_leave_less_room_for_the_cache() -> None:
    request = PlanRequest(gpu="h100", workload="chat", trials=0)
    problem = requested_problem(request)
    deployment = plan_problem(problem, request).recommended.deployment
    answer = ask(problem, deployment, {"quantization": "bf16"})
    assert answer.prediction.value("kv_cache_tokens") < answer.base.value("kv_cache_tokens")
    assert answer.prediction.value("tpot_ms.mean") > answer.base.value("tpot_ms.mean")
