"""How likely a limit holds, and what a risk demands: both from the interval that is printed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.percent import probability_words
from planner.prediction.evaluator import Slice
from planner.prediction.highest_rate import highest_rate
from planner.prediction.intervals import (
    least_served,
    probability_of_all,
    probability_within,
    upper_end,
)
from planner.prediction.predict import HostUncertainty, Prediction, predict_deployment
from planner.question import Problem, load_problem
from planner.text.lines import limit_lines
from planner.workloads.demand import workload_demand

REPOSITORY = Path(__file__).parents[3]

FACTORS = st.floats(1.01, 3.0)
VALUES = st.floats(1.0, 1e4)


@given(VALUES, FACTORS, FACTORS, st.floats(0.2, 5.0), FACTORS)
def test_a_limit_holds_less_often_the_lower_it_is(
    value: float, below: float, above: float, share: float, lower: float
) -> None:
    interval = value / below, value * above
    limit = share * value
    assert probability_within(limit / lower, value, interval) <= probability_within(
        limit, value, interval
    )


@given(VALUES, FACTORS, FACTORS)
def test_a_limit_at_the_prediction_holds_half_the_time(
    value: float, below: float, above: float
) -> None:
    interval = value / below, value * above
    assert probability_within(value, value, interval) == pytest.approx(0.5)
    # The ends of the 90 % interval are its quantiles of 5 and 95 %.
    for limit, probability in zip(interval, (0.05, 0.95), strict=True):
        assert probability_within(limit, value, interval) == pytest.approx(probability, abs=1e-3)


@given(VALUES, FACTORS, st.floats(0.3, 3.0), FACTORS)
def test_doubt_moves_a_probability_to_one_half(
    value: float, factor: float, share: float, wider: float
) -> None:
    limit = share * value
    narrow, wide = (
        probability_within(limit, value, (value / f, value * f)) for f in (factor, factor * wider)
    )
    assert abs(wide - 0.5) <= abs(narrow - 0.5) + 1e-12
    assert (wide - 0.5) * (narrow - 0.5) >= 0


@given(VALUES, FACTORS, FACTORS, st.floats(0.3, 3.0), st.floats(0.01, 0.9))
def test_a_risk_is_met_where_the_probability_says_so(
    value: float, below: float, above: float, share: float, risk: float
) -> None:
    limit, interval = share * value, (value / below, value * above)
    end = upper_end(value, interval[1], risk)
    if abs(math.log(end / limit)) > 1e-6:
        likely = probability_within(limit, value, interval) > 1 - risk / 2
        assert likely is (end < limit)


def test_without_doubt_a_limit_holds_or_not() -> None:
    assert probability_within(2.0, 1.0, (1.0, 1.0)) == 1.0
    assert probability_within(0.5, 1.0, (1.0, 1.0)) == 0.0
    assert probability_within(1.0, 0.0, (0.0, 0.0)) == 1.0
    assert probability_within(1.0, math.inf, (1.0, math.inf)) == 0.0


def test_all_limits_hold_as_often_as_the_least_likely() -> None:
    assert probability_of_all([0.9, 0.6, 0.8]) == 0.6
    assert probability_of_all([]) == 1.0


@pytest.fixture(scope="module", name="busy")
def _busy() -> Problem:
    """Summaries near the capacity of an H100 whose host no run has shown."""
    path = REPOSITORY / "docs/regret_h100/summaries_open.json"
    return load_problem(gpu="h100", engine="vllm", workload=str(path), calibration="shipped")


def predicted(problem: Problem, change: Callable[[Problem], Problem] = lambda p: p) -> Prediction:
    """A configuration whose small steps leave the host little time."""
    config = replace(
        problem.default_config, quantization="fp8_dynamic", kv_cache_dtype="fp8",
        max_num_tokens=1024, max_batch_size=256, tokens_per_block=128,
    )  # fmt: skip
    changed = change(problem)
    return predict_deployment(
        changed.evaluator, problem.deployment_of(config), workload_demand(problem.workload)
    )


def on_host(factor: float) -> Callable[[Problem], Problem]:
    def change(problem: Problem) -> Problem:
        calibration = problem.evaluator.calibration.with_slower_host(factor)
        return replace(problem, evaluator=problem.evaluator.calibrated(calibration))

    return change


def known_host(problem: Problem) -> Problem:
    calibration = replace(problem.evaluator.calibration, knows_host=True)
    return replace(problem, evaluator=problem.evaluator.calibrated(calibration))


def test_a_prediction_says_what_its_intervals_say(busy: Problem) -> None:
    found = predicted(busy)
    for name, limit in busy.slo.items():
        metric = found.metrics[name]
        expected = probability_within(limit, metric.value, metric.interval_90)
        assert found.slo_probability[name] == expected
    assert found.probability == min(found.slo_probability.values())
    said = found.to_json()["slo_probability"]
    assert said["all"] == pytest.approx(found.probability, rel=1e-5)
    assert set(said["by_limit"]) == set(busy.slo)


def test_a_host_in_doubt_or_slower_keeps_a_limit_less_often(busy: Problem) -> None:
    known, doubtful = predicted(busy, known_host), predicted(busy)
    assert known.value("ttft_ms.p95") == doubtful.value("ttft_ms.p95")
    assert doubtful.probability < known.probability - 0.05
    assert predicted(busy, on_host(1.3)).probability < doubtful.probability


def test_a_slow_host_opens_what_its_simulation_shows(busy: Problem) -> None:
    """On the slowest of twenty hosts this configuration cannot keep up: the closed form is mute."""
    found, slow = predicted(busy), predicted(busy, on_host(math.exp(1.645 * 0.25)))
    value, (_, high) = found.value("ttft_ms.p95"), found.metrics["ttft_ms.p95"].interval_90
    assert slow.value("ttft_ms.p95") > 3 * value
    assert high > slow.value("ttft_ms.p95")


def test_what_does_not_fit_or_refuses_prompts_keeps_no_slo(busy: Problem) -> None:
    found = predicted(busy)
    assert replace(found, refused_share=0.1).probability == 0.0
    tight = replace(busy.evaluator, gpu=replace(busy.gpu, memory_bytes=8e9))
    assert not predict_deployment(tight, found.deployment).fits
    assert predict_deployment(tight, found.deployment).probability == 0.0


def test_a_risk_is_judged_by_the_whole_interval(busy: Problem) -> None:
    """The 90 % interval at a risk of 10 %, the host's doubt in it, simulated or not."""
    risky = replace(busy, evaluator=replace(busy.evaluator, risk=0.1))
    found = predicted(risky)
    for name, limit in busy.slo.items():
        high = found.metrics[name].interval_90[1]
        assert found.slo_excess[name] == pytest.approx(high / limit - 1, rel=1e-3)
    assert predicted(busy).feasible
    assert not found.feasible
    closed = predict_deployment(risky.evaluator, found.deployment)
    searched = risky.evaluator.evaluate(Slice(base=found.deployment))
    for name, excess in closed.slo_excess.items():
        assert float(searched.slo_excess[name][0]) == pytest.approx(excess, rel=1e-6)
    assert (
        searched.highest_rate_per_s
        < busy.evaluator.evaluate(Slice(base=found.deployment)).highest_rate_per_s
    )


def test_at_the_highest_rate_a_limit_holds_half_the_time(busy: Problem) -> None:
    """So highest rates compare as they are: at one probability for all."""
    deployment, demand = predicted(busy).deployment, workload_demand(busy.workload).repeated(13)
    rate = highest_rate(busy.evaluator, deployment, demand).rate_per_s
    found = predict_deployment(busy.evaluator.at_rate(rate), deployment, demand.at_rate(rate))
    assert 0.5 <= found.probability < 0.6
    ttft = found.metrics["ttft_ms.p95"]
    assert ttft.interval_90[1] > 2 * ttft.value


def test_the_doubt_of_the_host_can_be_left_out(busy: Problem) -> None:
    evaluator, demand = busy.evaluator, workload_demand(busy.workload)
    config = predicted(busy).config
    left_out, closed_form, simulated = (
        predict_deployment(evaluator, busy.deployment_of(config), demand, host=host).metrics[
            "ttft_ms.p95"
        ]
        for host in (
            HostUncertainty.LEFT_OUT,
            HostUncertainty.CLOSED_FORM,
            HostUncertainty.SIMULATED,
        )
    )
    assert left_out.value == closed_form.value == simulated.value
    assert left_out.interval_90[1] < closed_form.interval_90[1] < simulated.interval_90[1]


def test_all_that_comes_is_served_where_a_slow_machine_can() -> None:
    assert least_served(room=1.0, capacity=1.5, latency=2.0) == 1.0
    assert least_served(room=1.0, capacity=0.8, latency=2.0) == 0.8
    # A run of 100 s whose last answers take 2 s lasts 102 s, or 104 s where they take twice that.
    assert least_served(room=1.02, capacity=1.5, latency=2.0) == pytest.approx(102 / 104)


@pytest.mark.parametrize("engine", ["trtllm", "vllm"])
def test_a_rate_far_below_capacity_is_that_of_the_arrivals(engine: str) -> None:
    problem = load_problem(gpu="h200", workload="chat", engine=engine, calibration="shipped")
    found = predict_deployment(
        problem.evaluator, problem.default_deployment, workload_demand(problem.workload)
    )
    for name in ("request_per_s", "output_tok_per_s", "output_tok_per_s_per_gpu"):
        metric = found.metrics[name]
        assert 0.98 * metric.value < metric.interval_90[0] < metric.value
    cost = found.metrics["usd_per_million_output_tokens"]
    assert cost.value < cost.interval_90[1] < 1.02 * cost.value


def test_near_capacity_a_slow_machine_falls_behind(busy: Problem) -> None:
    metric = predicted(busy).metrics["request_per_s"]
    assert metric.interval_90[0] < 0.9 * metric.value


def test_lines_of_the_slo_name_the_probability(busy: Problem) -> None:
    found = predicted(busy)
    lines = list(limit_lines(found))
    name = "ttft_ms.p95"
    share = -100 * found.slo_excess[name]
    percent = 100 * found.slo_probability[name]
    assert lines[0] == (
        f"SLO {name}: met, {share:.0f} % below the limit, with a probability of {percent:.0f} %"
    )
    missed = replace(found, slo_excess={name: 0.3}, slo_probability={name: 0.002})
    assert list(limit_lines(missed)) == [
        f"SLO {name}: MISSED, 30 % above the limit; probability that it holds: <1 %"
    ]
    assert probability_words(0.9999) == ">99 %"
