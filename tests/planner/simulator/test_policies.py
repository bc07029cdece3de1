"""What is known of schedulers holds here too, in direction and in size."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from planner.simulator import Arrivals, Requests, SimulationResult
from planner.simulator.capacity import GuaranteedNoEvict, MaxUtilization, StaticBatch
from planner.simulator.chunking import FirstComeChunks
from planner.simulator.queue_order import FirstComeFirstServed, PriorityWithAgeing, ShortestJobFirst
from tests.planner.simulator.stand_in import engine_limits, requests_of, run

CLIENTS = Arrivals(concurrency=16)


def _long_outputs() -> Requests:
    rng = np.random.default_rng(0)
    osl = np.clip(rng.lognormal(np.log(500), 0.5, 160), 8, 1500).astype(np.int64)
    return Requests.of(np.full(160, 64), osl)


def _under(policy: type[GuaranteedNoEvict | MaxUtilization], blocks: int) -> SimulationResult:
    limits = engine_limits(capacity=policy(), blocks=blocks)
    return run(_long_outputs(), CLIENTS, limits=limits)


def test_policies_agree_while_the_cache_is_ample() -> None:
    reserved, grown = (_under(policy, 10_000) for policy in (GuaranteedNoEvict, MaxUtilization))
    assert grown.requests.preemptions.sum() == 0
    assert grown.metrics == reserved.metrics


def test_max_utilization_falls_off_a_cliff_under_pressure() -> None:
    """The tail of TPOT grows several times; TensorRT-LLM #16827 reports 9.1 times."""
    reserved, grown = (_under(policy, 220) for policy in (GuaranteedNoEvict, MaxUtilization))
    assert grown.requests.preemptions.sum() > 20
    assert grown.metrics.tpot_s.p99 > 3 * reserved.metrics.tpot_s.p99
    assert grown.metrics.tpot_s.p50 < 2 * reserved.metrics.tpot_s.p50


def test_a_static_batch_waits_for_its_longest_output() -> None:
    rolling = _under(GuaranteedNoEvict, 10_000).metrics
    static = _under(StaticBatch, 10_000).metrics
    assert static.output_tok_per_s < 0.7 * rolling.output_tok_per_s


@pytest.mark.parametrize("budget", [64, 256])
def test_smaller_steps_trade_ttft_for_itl(budget: int) -> None:
    rng = np.random.default_rng(1)
    requests = Requests.of(rng.integers(200, 1800, 200), rng.integers(50, 150, 200))
    arrivals = Arrivals(arrival_s=np.cumsum(rng.exponential(0.12, 200)))
    large, small = (
        run(
            requests,
            arrivals,
            limits=engine_limits(max_num_tokens=tokens, chunking=FirstComeChunks(16)),
        ).metrics
        for tokens in (2048, budget)
    )
    assert small.itl_s.p99 < 0.7 * large.itl_s.p99
    assert small.ttft_s.mean > 1.2 * large.ttft_s.mean


def test_a_long_prompt_holds_up_the_short_ones_behind_it() -> None:
    """Head-of-line blocking: what does not fit stops the queue, though others would fit."""
    requests = requests_of([64, 1500, 64, 64], [400, 100, 20, 20])
    limits = engine_limits(blocks=110)
    blocked = run(requests, Arrivals(arrival_s=np.zeros(4)), limits=limits)
    alone = run(requests.at(np.array([0, 2, 3])), Arrivals(arrival_s=np.zeros(3)), limits=limits)
    first, second = blocked.times.ttft_s[0], blocked.times.ttft_s[1]
    assert second > 10 * first
    assert (blocked.times.ttft_s[2:] >= second).all()
    assert (alone.times.ttft_s[1:] < second / 10).all()


def _crowded() -> tuple[Requests, Arrivals]:
    """More than 16 slots of work at the start; a tenth of the outputs is ten times as long."""
    rng = np.random.default_rng(2)
    osl = np.where(rng.random(300) < 0.1, 800, 80)
    return Requests.of(np.full(300, 100), osl), Arrivals(arrival_s=np.zeros(300))


def test_shortest_job_first_lowers_the_mean_and_starves_the_long() -> None:
    requests, arrivals = _crowded()
    fair, short = (
        run(requests, arrivals, limits=engine_limits(order=order))
        for order in (FirstComeFirstServed(), ShortestJobFirst())
    )
    long = requests.osl == 800
    assert short.times.e2el_s.mean() < 0.85 * fair.times.e2el_s.mean()
    assert np.quantile(short.times.e2el_s[long], 0.5) > np.quantile(fair.times.e2el_s[long], 0.5)


def test_a_bad_predictor_loses_part_of_what_shortest_job_first_gains() -> None:
    requests, arrivals = _crowded()
    limits = engine_limits(order=ShortestJobFirst())
    exact = run(requests, arrivals, limits=limits).times.e2el_s.mean()
    noisy = requests.with_predictor(np.random.default_rng(3), log_sd=2.0)
    blurred = run(noisy, arrivals, limits=limits).times.e2el_s.mean()
    fair = run(requests, arrivals).times.e2el_s.mean()
    assert exact < blurred < fair


def test_urgent_requests_go_first_and_ageing_bounds_the_wait_of_the_rest() -> None:
    requests, _ = _crowded()
    arrivals = Arrivals(arrival_s=np.arange(0.0, 1.5, 5e-3))
    priority = np.arange(300) % 3
    ranked = replace(requests, priority=priority)
    strict, aged = (
        run(ranked, arrivals, limits=engine_limits(order=PriorityWithAgeing(seconds))).times.ttft_s
        for seconds in (1e9, 1e-9)
    )
    assert strict[priority == 0].mean() < 0.5 * strict[priority == 2].mean()
    assert aged[priority == 2].mean() < strict[priority == 2].mean()
