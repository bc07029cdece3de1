"""Engines that keep step: one is an engine alone, a prompt on one holds up all."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.simulator import Arrivals, Requests, Share, SimulationResult, simulate_in_step
from planner.simulator.engine import Engine
from planner.simulator.lockstep import Lockstep
from tests.planner.simulator.stand_in import (
    CLOCK,
    NO_FRONT_END,
    engine_limits,
    requests_of,
    run,
)
from tests.planner.simulator.test_properties import clocks, engines, front_ends, workloads

COLUMNS = ("arrival_s", "started_s", "first_token_s", "last_token_s")
thorough = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])


def assert_same(one: SimulationResult, other: SimulationResult, tolerance: float) -> None:
    for name in COLUMNS:
        np.testing.assert_allclose(
            getattr(one.requests, name),
            getattr(other.requests, name),
            rtol=tolerance,
            atol=tolerance,
        )


def in_step(shares: list[Share], **changes: object) -> list[SimulationResult]:
    given: dict[str, object] = {
        "clock": CLOCK, "limits": engine_limits(), "front_end": NO_FRONT_END,
    }  # fmt: skip
    return simulate_in_step(shares, **(given | changes))  # type: ignore[arg-type]


@thorough
@given(workloads(), engines(), front_ends, clocks)
def test_one_engine_in_step_is_an_engine_alone(workload, limits, front_end, clock) -> None:  # type: ignore[no-untyped-def]
    requests, arrivals = workload
    first, second = (
        Engine(
            requests,
            arrivals.source(len(requests)),
            clock=clock,
            limits=limits,
            constants=front_end,
        )
        for _ in range(2)
    )
    first.run()
    Lockstep([second]).run()
    np.testing.assert_allclose(
        np.frombuffer(first.results.last_s), np.frombuffer(second.results.last_s), rtol=1e-9
    )


@thorough
@given(st.lists(workloads(), min_size=2, max_size=4), engines(), front_ends, clocks)
def test_skipping_rounds_changes_nothing_and_nothing_is_lost(  # type: ignore[no-untyped-def]
    work, limits, front_end, clock
) -> None:
    shares = [Share(*one) for one in work]
    fast, exact = (
        in_step(shares, limits=limits, front_end=front_end, clock=clock, exact=exact)
        for exact in (False, True)
    )
    for share, one, other in zip(shares, fast, exact, strict=True):
        assert_same(one, other, 1e-9)
        served = ~one.requests.refused
        assert np.isfinite(one.requests.last_token_s[served]).all()
        assert len(one.requests.arrival_s) == len(share.requests)


@thorough
@given(st.lists(workloads(), min_size=2, max_size=4), engines())
def test_all_steps_of_a_round_begin_and_end_together(work, limits) -> None:  # type: ignore[no-untyped-def]
    logs = [r.engines[0].log for r in in_step([Share(*one) for one in work], limits=limits)]
    spans = sorted({(s, e) for log in logs for s, e in zip(log.start_s, log.end_s, strict=True)})
    for (_, end_s), (start_s, _) in pairwise(spans):
        assert start_s >= end_s - 1e-12


def test_a_prompt_on_one_rank_holds_up_the_tokens_of_all() -> None:
    answers = Share(requests_of([10], [200]), Arrivals(arrival_s=np.zeros(1)))
    prompt = Share(requests_of([2000], [1]), Arrivals(arrival_s=np.array([0.1])))
    beside, _ = in_step([answers, prompt])
    alone = run(answers.requests, answers.arrivals)
    prefill = run(prompt.requests, prompt.arrivals)
    assert alone.metrics.itl_s.p99 < 0.01
    longest_s = float(np.diff(beside.token_times(0)).max())
    step_s = float(prefill.engines[0].log.last_step_s[0])
    assert longest_s == pytest.approx(step_s, rel=1e-6)
    added_s = beside.times.e2el_s[0] - alone.times.e2el_s[0]
    assert added_s == pytest.approx(step_s - alone.metrics.itl_s.mean, rel=0.02)


def test_equal_ranks_are_as_fast_as_one() -> None:
    requests = Requests.of(np.full(20, 100), np.full(20, 50))
    shares = [Share(requests, Arrivals(concurrency=4))] * 4
    alone = run(requests, Arrivals(concurrency=4))
    for one in in_step(shares):
        assert_same(one, alone, 1e-9)


def test_uneven_ranks_are_as_slow_as_the_fullest() -> None:
    full = Share(Requests.of(np.full(16, 120), np.full(16, 300)), Arrivals(concurrency=16))
    light = Share(requests_of([10], [300]), Arrivals(concurrency=1))
    slow, held_up = in_step([full, light])
    assert_same(slow, run(full.requests, full.arrivals), 1e-9)
    tpot_s = run(light.requests, light.arrivals).metrics.tpot_s.mean
    assert held_up.metrics.tpot_s.mean == pytest.approx(slow.metrics.tpot_s.mean, rel=1e-9)
    assert held_up.metrics.tpot_s.mean > 1.1 * tpot_s
