"""The search against the whole space, and against itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cost_models.errors import ConfigError
from planner import PlanRequest, plan
from planner.plans.plan import Plan
from planner.prediction.feasibility import violation
from planner.question import load_problem, search_space
from planner.search.objective import handicapped, score

PATIENT_S = 600.0
"""A budget that no plan here uses up: what is decided must not depend on the clock."""

SMALL = {
    "quantization": "bf16,fp8",
    "kv_cache_dtype": "bf16,fp8",
    "max_batch_size": "16,64,256",
    "max_num_tokens": "2048,8192",
    "tokens_per_block": "32,64",
    "free_gpu_memory_fraction": "0.8,0.9",
    "enable_chunked_prefill": "true,false",
    "capacity_scheduler_policy": "GUARANTEED_NO_EVICT,MAX_UTILIZATION",
}


def _best_score(result: Plan) -> float:
    return result.search.best.score


@pytest.mark.parametrize("workload", ["chat", "summarization", "offline-batch"])
def test_within_one_percent_of_the_enumerated_optimum(workload: str) -> None:
    request = PlanRequest(gpu="h100", workload=workload, limits=SMALL, time_budget_s=PATIENT_S)
    problem = load_problem(gpu="h100", workload=workload)
    optimum = float("-inf")
    for rows in search_space(problem, request).screen(every_inner_knob=True):
        evaluation = problem.evaluator.evaluate(rows)
        raw = score(
            problem.workload.objective,
            rows,
            evaluation,
            load=problem.evaluator.load,
            usd_per_hour=problem.gpu.usd_per_hour,
        )
        memory = evaluation.memory
        broken = violation(
            shortfall=memory.shortfall_bytes / memory.total_bytes,
            refused_share=evaluation.refused_share,
            excess=evaluation.slo_excess,
        )
        feasible = broken <= 0
        quality = problem.evaluator.quality_of(rows.base.config)
        if feasible.any():
            optimum = max(optimum, float(handicapped(raw, quality)[feasible].max()))
    found = _best_score(plan(request))
    assert found >= optimum - 0.01 * abs(optimum)


def test_refinement_reaches_a_space_too_large_to_enumerate() -> None:
    coarse = plan(PlanRequest(gpu="h200", workload="chat", trials=0, time_budget_s=PATIENT_S))
    refined = plan(PlanRequest(gpu="h200", workload="chat", trials=80, time_budget_s=PATIENT_S))
    assert _best_score(refined) >= _best_score(coarse)


def test_same_seed_same_plan() -> None:
    request = PlanRequest(gpu="h100", workload="chat", trials=40, seed=7, time_budget_s=PATIENT_S)
    first, second = plan(request).to_json(), plan(request).to_json()
    first["search"].pop("wall_s")
    second["search"].pop("wall_s")
    for result in (first, second):
        result["recommended"]["simulation"].pop("wall_s")
    assert first == second


def test_pinned_knobs_stay_pinned() -> None:
    request = PlanRequest(
        gpu="h100",
        workload="chat",
        pins={"quantization": "bf16", "max_batch_size": "48"},
        limits={"tokens_per_block": "64"},
        time_budget_s=PATIENT_S,
    )
    config = plan(request).recommended.config
    assert (config.quantization, config.max_batch_size, config.tokens_per_block) == ("bf16", 48, 64)


def test_the_front_trades_throughput_for_speed_and_quality() -> None:
    found = plan(
        PlanRequest(gpu="h100", workload="chat", trials=20, time_budget_s=PATIENT_S)
    ).search
    axes = [
        (point.tok_per_s_per_gpu, point.tok_per_s_per_user, -point.quality.loss_pct)
        for point in found.pareto
    ]
    assert len({quality for *_, quality in axes}) > 2
    everything = [
        (c.tok_per_s_per_gpu, c.tok_per_s_per_user, -c.quality.loss_pct)
        for c in found.candidates
        if c.feasible
    ]
    for point in axes:
        better = [o for o in everything if all(a >= b for a, b in zip(o, point, strict=True))]
        assert set(better) == {point}
    for other in everything:
        assert any(all(a >= b for a, b in zip(p, other, strict=True)) for p in axes)


def test_more_gpus_serve_more() -> None:
    one, four = (
        plan(
            PlanRequest(
                gpu="h100",
                workload="chat",
                num_gpus=n,
                use_all=True,
                trials=10,
                time_budget_s=PATIENT_S,
            )
        )
        for n in (1, 4)
    )
    assert four.recommended.highest_rate_per_s > 3.8 * one.recommended.highest_rate_per_s
    assert four.recommended.deployment.num_gpus == 4


GPUS = ("h100", "h200", "b200", "l40s", "a100")

WORKLOADS = ("chat", "rag", "code-completion", "summarization", "agent")


@pytest.mark.parametrize(
    ("gpu", "workload"),
    [(gpu, WORKLOADS[(at + turn) % 5]) for at, gpu in enumerate(GPUS) for turn in (0, 2, 3)],
)
def test_gpus_have_deployable_plans_for_unlike_workloads(gpu: str, workload: str) -> None:
    result = plan(PlanRequest(gpu=gpu, workload=workload, trials=0, time_budget_s=PATIENT_S))
    problem = load_problem(gpu=gpu, workload=workload)
    best = result.recommended
    assert best.fits
    assert not problem.rules.violations(best.config, model=problem.model, gpu=problem.gpu)


def test_plans_differ_between_gpus() -> None:
    chosen = {
        gpu: plan(
            PlanRequest(gpu=gpu, workload="chat", trials=0, time_budget_s=PATIENT_S)
        ).recommended.config
        for gpu in ("a100", "h100", "b200")
    }
    assert chosen["a100"].quantization in ("bf16", "w4a16_awq")
    assert len({config.quantization for config in chosen.values()}) > 1


def test_a_careful_plan_keeps_its_limits_at_the_upper_end_of_the_interval() -> None:
    """A limit inside the interval of a bold plan passes; a careful plan must do better."""
    asked = PlanRequest(gpu="h100", workload="chat", trials=0, time_budget_s=PATIENT_S)
    bold = plan(asked).recommended
    high = bold.metrics["tpot_ms.p99"].interval_90[1]
    between = (bold.value("tpot_ms.p99") + high) / 2
    asked = replace(asked, slo={"tpot_ms.p99": between})
    assert plan(asked).recommended.value("tpot_ms.p99") < between
    careful = plan(replace(asked, risk=0.1))
    if careful.status == "feasible":
        # Statistical error of the simulated percentile widens what is shown.
        assert careful.recommended.metrics["tpot_ms.p99"].interval_90[1] < between * 1.05
    else:
        assert careful.relaxations[0].given == between < careful.relaxations[0].needed
    assert careful.recommended.config != bold.config
    assert careful.to_json()["asked"]["risk"] == 0.1
    with pytest.raises(ConfigError, match="risk 1"):
        plan(replace(asked, risk=1.0))
