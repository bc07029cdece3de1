"""Scheduler instances in step behind one front end: a prompt on one holds up all."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost_models.frontend import FrontEndConstants
from planner.simulator import Arrivals, Requests, ServerModel, SimulationResult, simulate
from planner.simulator.engine import Engine
from planner.simulator.lockstep import LockstepServer
from planner.simulator.recorder import RequestRecorder
from planner.simulator.server import SingleServer
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
ranks = st.integers(2, 4)


def assert_same(one: SimulationResult, other: SimulationResult, tolerance: float) -> None:
    for name in COLUMNS:
        np.testing.assert_allclose(
            getattr(one.requests, name),
            getattr(other.requests, name),
            rtol=tolerance,
            atol=tolerance,
        )


def in_step(
    requests: Requests,
    arrivals: Arrivals,
    num_instances: int,
    *,
    exact: bool = False,
    **changes: object,
) -> SimulationResult:
    given: dict[str, object] = {
        "clock": CLOCK, "limits": engine_limits(), "front_end": NO_FRONT_END,
    }  # fmt: skip
    model = ServerModel(num_instances=num_instances, **(given | changes))  # type: ignore[arg-type]
    return simulate(requests, arrivals, model, exact=exact)


@thorough
@given(workloads(), engines(), front_ends, clocks)
def test_one_instance_in_step_is_a_server_alone(workload, limits, front_end, clock) -> None:  # type: ignore[no-untyped-def]
    requests, arrivals = workload
    last_s = []
    for in_step_server in (False, True):
        results = RequestRecorder(len(requests))
        engine = Engine(requests, results, clock=clock, limits=limits, constants=front_end)
        source = arrivals.source(len(requests))
        if in_step_server:
            LockstepServer((engine,), source, results, front_end).run()
        else:
            SingleServer(engine, source, results, front_end).run()
        last_s.append(np.frombuffer(results.last_s))
    np.testing.assert_allclose(last_s[0], last_s[1], rtol=1e-9)


@thorough
@given(workloads(), ranks, engines(), front_ends, clocks)
def test_skipping_rounds_changes_nothing_and_nothing_is_lost(  # type: ignore[no-untyped-def]
    workload, num_instances, limits, front_end, clock
) -> None:
    requests, arrivals = workload
    given = {"limits": limits, "front_end": front_end, "clock": clock}
    fast = in_step(requests, arrivals, num_instances, **given)
    assert_same(fast, in_step(requests, arrivals, num_instances, exact=True, **given), 1e-9)
    served = ~fast.requests.refused
    assert np.isfinite(fast.requests.last_token_s[served]).all()
    assert (fast.requests.served_by < num_instances).all()


@thorough
@given(workloads(), ranks, engines())
def test_all_steps_of_a_round_begin_and_end_together(workload, num_instances, limits) -> None:  # type: ignore[no-untyped-def]
    requests, arrivals = workload
    result = in_step(requests, arrivals, num_instances, limits=limits)
    logs = [trace.log for trace in result.engines]
    spans = sorted({(s, e) for log in logs for s, e in zip(log.start_s, log.end_s, strict=True)})
    for (_, end_s), (start_s, _) in pairwise(spans):
        assert start_s >= end_s - 1e-12


def test_a_prompt_on_one_rank_holds_up_the_tokens_of_all() -> None:
    answer = Arrivals(arrival_s=np.zeros(1))
    both = Arrivals(arrival_s=np.array([0.0, 0.1]))
    result = in_step(requests_of([10, 2000], [200, 1]), both, 2)
    alone = run(requests_of([10], [200]), answer)
    prefill = run(requests_of([2000], [1]), answer)
    assert result.requests.served_by.tolist() == [0, 1]
    assert alone.metrics.itl_s.p99 < 0.01
    longest_s = float(np.diff(result.token_times(0)).max())
    step_s = float(prefill.engines[0].log.last_step_s[0])
    assert longest_s == pytest.approx(step_s, rel=1e-6)
    added_s = result.times.e2el_s[0] - alone.times.e2el_s[0]
    assert added_s == pytest.approx(step_s - alone.metrics.itl_s.mean, rel=0.02)


def test_equal_ranks_are_as_fast_as_one() -> None:
    alone = run(Requests.of(np.full(20, 100), np.full(20, 50)), Arrivals(concurrency=4))
    four = in_step(Requests.of(np.full(80, 100), np.full(80, 50)), Arrivals(concurrency=16), 4)
    assert four.metrics.request_per_s == pytest.approx(4 * alone.metrics.request_per_s, rel=1e-9)
    assert four.metrics.ttft_s.p99 == pytest.approx(alone.metrics.ttft_s.p99, rel=1e-9)


def test_a_request_goes_to_the_rank_that_holds_the_fewest() -> None:
    # The first stays for long; of those that follow, the other rank takes each in turn.
    arrivals = Arrivals(arrival_s=np.array([0.0, 0.5, 1.0, 1.5]))
    result = in_step(requests_of([10] * 4, [2000, 5, 5, 5]), arrivals, 2)
    assert result.requests.served_by.tolist() == [0, 1, 1, 1]


def test_one_front_end_streams_the_tokens_of_all_ranks() -> None:
    """Eight ranks of a server put out no more tokens/s than their one front end can stream."""
    front_end = FrontEndConstants(streamed_token_s=1e-4)
    requests, arrivals = Requests.of(np.full(400, 20), np.full(400, 100)), Arrivals(concurrency=80)
    one, eight = (
        in_step(requests, arrivals, ranks, front_end=front_end, limits=engine_limits())
        for ranks in (1, 8)
    )
    assert eight.metrics.output_tok_per_s < 1 / front_end.streamed_token_s
    free = in_step(requests, arrivals, 8)
    assert free.metrics.output_tok_per_s > 1.5 / front_end.streamed_token_s
    assert one.metrics.output_tok_per_s < eight.metrics.output_tok_per_s
