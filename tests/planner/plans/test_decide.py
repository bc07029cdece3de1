"""The decision near a limit, where averages rank wrongly."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cost_models.deployment import Deployment
from planner import PlanRequest, plan
from planner.plans.decide import (
    CLIMBED_KNOBS,
    LEAST_GAIN,
    NEAR_LIMIT,
    Finalist,
    decide,
    neighbouring,
)
from planner.prediction.predict import predict_deployment
from planner.question import load_problem, predict_problem, search_space
from planner.search.objective import DECIDING, expected, quality_handicap
from planner.search.study import Candidate, SearchOptions, evaluated, search
from planner.workloads.demand import workload_demand

PATIENT_S = 600.0
"""A budget that no plan here uses up: what is decided must not depend on the clock."""

REPOSITORY = Path(__file__).parents[3]


def chat_at(rate_per_s: float, folder: Path) -> str:
    """A chat near what one H200 can serve, short enough to simulate often."""
    data: dict[str, Any] = json.loads((REPOSITORY / "profiles/workloads/chat.json").read_text())
    data["arrival"] |= {"rate_per_s": rate_per_s, "num_requests": 200}
    data["slo"] = {"ttft_ms.p99": 1000.0, "tpot_ms.p99": 30.0}
    path = folder / "busy.json"
    path.write_text(json.dumps(data))
    return str(path)


@pytest.fixture(name="busy")
def _busy(tmp_path: Path) -> str:
    return chat_at(30.0, tmp_path)


def simulated_score(workload: str, deployment: Deployment) -> tuple[bool, float]:
    """Whether it is feasible, and the goodput that is expected of it."""
    problem = load_problem(gpu="h200", workload=workload, model="", engine="vllm")
    demand = workload_demand(problem.workload)
    prediction, _ = predict_problem(problem, deployment, {}, demand=demand)
    value = prediction.value(DECIDING["goodput"].metric)
    certain = value * (1 - quality_handicap(prediction.quality))
    return prediction.feasible, certain * prediction.probability


def test_no_neighbour_of_the_recommendation_is_better_when_both_are_simulated(
    tmp_path: Path,
) -> None:
    crowded = chat_at(42.0, tmp_path)
    request = PlanRequest(
        gpu="h200", workload=crowded, engine="vllm", trials=20, time_budget_s=PATIENT_S
    )
    found = plan(request)
    best = found.recommended.deployment
    assert max(found.recommended.slo_excess.values()) > -NEAR_LIMIT  # so the simulation decides
    problem = load_problem(gpu="h200", workload=crowded, model="", engine="vllm")
    space = search_space(problem, request)
    own = simulated_score(crowded, best)
    assert own[0]
    neighbours = [
        changed
        for knob in CLIMBED_KNOBS
        for value in neighbouring(list(space.choices(knob)), best.knob(knob))
        # As the decision makes them: CUDA graphs cover the batch that is asked.
        if (changed := space.legal(best, **{knob: value})) is not None
    ]
    assert neighbours
    for changed in neighbours:
        feasible, score = simulated_score(crowded, changed)
        assert not feasible or score <= own[1] * (1 + LEAST_GAIN)


def test_the_closed_forms_first_choice_does_not_win_where_the_simulation_rejects_it(
    busy: str,
) -> None:
    request = PlanRequest(gpu="h200", workload=busy, engine="vllm", time_budget_s=PATIENT_S)
    problem = load_problem(gpu="h200", workload=busy, model="", engine="vllm")
    space = search_space(problem, request)
    found = search(space, problem.evaluator, SearchOptions(trials=0))
    large = [c for c in found.candidates if c.config.quantization == "bf16"]
    first: list[Candidate] = [large[0], found.candidates[0]]
    decision = decide(
        space,
        problem.evaluator,
        first,
        objective="goodput",
        demand=workload_demand(problem.workload),
    )
    assert decision.winner.config.quantization == "fp8_dynamic"
    assert decision.winner.prediction.feasible
    assert not any(one.beats(decision.winner) for one in decision.others)


def test_a_search_that_is_called_off_decides_by_what_it_has(busy: str) -> None:
    request = PlanRequest(gpu="h200", workload=busy, engine="vllm", time_budget_s=PATIENT_S)
    problem = load_problem(gpu="h200", workload=busy, model="", engine="vllm")
    space = search_space(problem, request)
    found = search(space, problem.evaluator, SearchOptions(trials=0))
    decision = decide(
        space,
        problem.evaluator,
        list(found.candidates[:3]),
        objective="goodput",
        demand=workload_demand(problem.workload),
        stopped=lambda: True,
    )
    assert decision.winner.config == found.candidates[0].config
    assert not decision.others


def test_a_knob_that_the_engine_does_not_have_is_no_neighbour(busy: str) -> None:
    found = plan(
        PlanRequest(gpu="h200", workload=busy, engine="vllm", trials=20, time_budget_s=PATIENT_S)
    )
    knobs = {n.knob for n in found.neighbours}
    assert "max_num_tokens" in knobs
    # gpu_memory_utilization divides the memory of vLLM.
    assert "free_gpu_memory_fraction" not in knobs


def test_what_changes_nothing_is_not_called_a_miss(busy: str) -> None:
    limits = {"kv_cache_dtype": "bf16"}  # vLLM reads a BF16 cache alike in blocks of any size
    found = plan(
        PlanRequest(
            gpu="h200",
            workload=busy,
            engine="vllm",
            trials=20,
            limits=limits,
            time_budget_s=PATIENT_S,
        )
    )
    verdicts = {n.verdict for n in found.neighbours if n.knob == "tokens_per_block"}
    assert verdicts == {"no difference"}


def test_an_uncontested_plan_is_decided_by_headroom() -> None:
    found = plan(PlanRequest(gpu="h100", workload="chat", trials=20, time_budget_s=PATIENT_S))
    assert found.status == "feasible"
    gains = [a.rejected_because for a in found.alternatives]
    assert all(reason.startswith("-") for reason in gains)
    assert all(a.prediction.simulation is None for a in found.alternatives)


Made = Callable[..., Finalist]


@pytest.fixture(scope="module")
def made() -> Made:
    """Make a finalist with an objective's value and the probability that its SLO holds."""
    problem = load_problem(gpu="h200", workload="chat", engine="vllm")
    deployment, evaluator = problem.default_deployment, problem.evaluator
    closed = predict_deployment(evaluator, deployment)

    def make(value: float, probability: float, objective: str = "goodput") -> Finalist:
        name = DECIDING[objective].metric
        metrics = dict(closed.metrics) | {name: replace(closed.metrics[name], value=value)}
        likely = {"ttft_ms.p99": probability, "tpot_ms.p99": 1.0}
        return Finalist(
            candidate=evaluated(deployment, evaluator, objective=objective),
            prediction=replace(closed, metrics=metrics, slo_probability=likely),
            objective=objective,
        )

    return make


@pytest.mark.parametrize("objective", DECIDING)
def test_of_two_that_promise_alike_the_one_with_more_headroom_wins(
    made: Made, objective: str
) -> None:
    safe, bold = made(10.0, 0.9, objective), made(10.0, 0.6, objective)
    assert safe.beats(bold)
    assert not bold.beats(safe)


@pytest.mark.parametrize("objective", DECIDING)
def test_where_every_limit_holds_the_objective_decides_as_it_is(made: Made, objective: str) -> None:
    better = 10.1 if DECIDING[objective].sign > 0 else 9.9
    good, usual = made(better, 1.0, objective), made(10.0, 1.0, objective)
    assert good.expected == good.score
    assert good.beats(usual)
    assert not usual.beats(good)


def test_a_large_gain_is_worth_a_small_risk_and_a_small_one_is_not(made: Made) -> None:
    safe = made(10.0, 0.88)
    assert safe.beats(made(10.06, 0.61))
    assert made(15.0, 0.61).beats(safe)


def test_what_is_predicted_to_miss_its_slo_is_no_bargain(made: Made) -> None:
    """A limit is a limit: at half the probability ends what a plan may recommend."""
    fast, slow = made(30.0, 0.49), made(10.0, 0.51)
    fast = replace(fast, prediction=replace(fast.prediction, slo_excess={"ttft_ms.p99": 0.01}))
    assert slow.beats(fast)
    assert not fast.beats(slow)


def test_expectation_keeps_order_at_one_probability() -> None:
    """So rates that are searched until the SLO breaks, at one probability, rank as they are."""
    for probability in (0.5, 0.9):
        for worse, better in ((1.0, 2.0), (-2.0, -1.0)):
            assert expected(worse, probability) < expected(better, probability)
    # A token within the SLO costs what is paid for all, over the share of them.
    assert expected(-3.0, 0.75) == -4.0
    assert expected(-3.0, 0.0) == -math.inf


def test_a_plan_says_what_it_turned_down_for_its_odds() -> None:
    """Bursts near the capacity: small steps serve a little more, and wait a little longer."""
    workload = str(REPOSITORY / "docs/regret_h100/code_open.json")
    pins = {"quantization": "fp8_dynamic", "kv_cache_dtype": "fp8"}
    found = plan(
        PlanRequest(
            gpu="h100",
            workload=workload,
            engine="vllm",
            pins=pins,
            trials=0,
            time_budget_s=PATIENT_S,
        )
    )
    best, first = found.recommended, found.alternatives[0]
    assert first.prediction.value("goodput_request_per_s") > best.value("goodput_request_per_s")
    assert first.prediction.probability < best.probability
    odds = [round(100 * one.probability) for one in (first.prediction, best)]
    assert first.rejected_because.endswith(
        f"but holds its SLO with a probability of {odds[0]} % instead of {odds[1]} %"
    )
