"""Servers behind a router: what routing as an event gives is what each server alone would do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost_models.frontend import FrontEndConstants
from planner.simulator import Arrivals, Requests, ServerModel, SimulationResult, simulate
from planner.simulator.router import (
    MOST_IMBALANCE,
    ROUTERS,
    LeastOutstanding,
    PrefixAware,
    RoundRobin,
)
from tests.planner.simulator.stand_in import CLOCK, NO_FRONT_END, engine_limits, requests_of
from tests.planner.simulator.test_properties import clocks, engines, front_ends, workloads

COLUMNS = (
    "arrival_s", "started_s", "first_token_s", "last_token_s", "refusal", "served_by",
    "preemptions", "cached_tokens",
)  # fmt: skip
thorough = settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
servers = st.integers(1, 4)
instances = st.integers(1, 3)


def model_of(**changes: object) -> ServerModel:
    given: dict[str, object] = {
        "clock": CLOCK, "limits": engine_limits(), "front_end": NO_FRONT_END,
    }  # fmt: skip
    return ServerModel(**(given | changes))  # type: ignore[arg-type]


def assert_identical(one: SimulationResult, other: SimulationResult) -> None:
    for name in COLUMNS:
        np.testing.assert_array_equal(getattr(one.requests, name), getattr(other.requests, name))


class _First(RoundRobin):
    """Sends every request to the first server."""

    is_static = False

    def choose(self, index: int) -> int:  # noqa: ARG002
        return 0


class _RoutedRoundRobin(RoundRobin):
    """Takes turns like its parent, but is not known beforehand: it meets requests as they come."""

    is_static = False


@thorough
@given(workloads(), servers, instances, engines(), front_ends, clocks)
def test_routed_requests_are_served_as_if_each_server_had_known_its_own(  # type: ignore[no-untyped-def]
    workload, num_servers, num_instances, limits, front_end, clock
) -> None:
    requests, arrivals = workload
    if arrivals.arrival_s is None:
        arrivals = Arrivals(arrival_s=np.zeros(len(requests)))
    model = ServerModel(
        clock=clock, limits=limits, front_end=front_end, num_instances=num_instances
    )
    apart, routed = (
        simulate(requests, arrivals, model, num_servers=num_servers, router=router)
        for router in (RoundRobin, _RoutedRoundRobin)
    )
    assert_identical(apart, routed)


@thorough
@given(workloads(), st.sampled_from(sorted(ROUTERS)), servers, engines(), front_ends, clocks)
def test_every_request_is_served_once(  # type: ignore[no-untyped-def]
    workload, router, num_servers, limits, front_end, clock
) -> None:
    requests, arrivals = workload
    model = ServerModel(clock=clock, limits=limits, front_end=front_end)
    result = simulate(requests, arrivals, model, num_servers=num_servers, router=ROUTERS[router])
    columns = result.requests
    served = ~columns.refused
    assert np.isfinite(columns.arrival_s).all()
    assert np.isfinite(columns.last_token_s[served]).all()
    assert (columns.first_token_s[served] <= columns.last_token_s[served]).all()
    made = sum(int((t.log.decoding.astype(int) * t.log.steps).sum()) for t in result.engines)
    assert made + int(served.sum()) + len(result.pauses_s) == int(requests.osl[served].sum())


@thorough
@given(workloads(), engines(), front_ends, clocks)
def test_a_router_before_one_server_changes_nothing(workload, limits, front_end, clock) -> None:  # type: ignore[no-untyped-def]
    """The clock over all servers gives one server what its own loop gives, in closed loops too."""
    requests, arrivals = workload
    model = ServerModel(clock=clock, limits=limits, front_end=front_end)
    alone = simulate(requests, arrivals, model)
    routed = _through_a_fleet(requests, arrivals, model)
    # A span that is shortened twice may end a rounding apart.
    for name in COLUMNS:
        np.testing.assert_allclose(
            getattr(alone.requests, name), getattr(routed.requests, name), rtol=1e-12
        )


def _through_a_fleet(
    requests: Requests, arrivals: Arrivals, model: ServerModel
) -> SimulationResult:
    """Serve with two servers of which a router uses only the first."""
    return simulate(requests, arrivals, model, num_servers=2, router=_First)


def test_equal_servers_share_closed_loop_clients_alike() -> None:
    requests = Requests.of(np.full(200, 100), np.full(200, 50))
    one = simulate(
        Requests.of(np.full(50, 100), np.full(50, 50)), Arrivals(concurrency=4), model_of()
    )
    for router in ROUTERS.values():
        four = simulate(
            requests, Arrivals(concurrency=16), model_of(), num_servers=4, router=router
        )
        assert np.bincount(four.requests.served_by).tolist() == [50] * 4
        assert four.metrics.request_per_s == pytest.approx(4 * one.metrics.request_per_s, rel=1e-6)


def test_each_server_has_a_front_end_of_its_own() -> None:
    """Where one front end is the limit, a second server doubles what is served."""
    front_end = FrontEndConstants(request_s=0.02)
    requests = Requests.of(np.full(400, 10), np.full(400, 2))
    burst = Arrivals(arrival_s=np.zeros(400))
    rates = [
        simulate(
            requests, burst, model_of(front_end=front_end), num_servers=number
        ).metrics.request_per_s
        for number in (1, 2, 4)
    ]
    assert rates[0] == pytest.approx(50, rel=0.02)
    assert rates[1] == pytest.approx(100, rel=0.02)
    assert rates[2] == pytest.approx(200, rel=0.04)


def test_least_outstanding_spares_the_server_with_long_answers() -> None:
    osl = np.where(np.arange(60) % 2 == 0, 400, 4)
    requests = Requests.of(np.full(60, 20), osl)
    arrivals = Arrivals(arrival_s=0.05 * np.arange(60, dtype=np.float64))
    in_turn, balanced = (
        simulate(requests, arrivals, model_of(limits=engine_limits(max_batch_size=4)),
                 num_servers=2, router=router)
        for router in (RoundRobin, LeastOutstanding)
    )  # fmt: skip
    # In turn, one server gets every long answer and the other every short one.
    assert balanced.metrics.e2el_s.p99 < 0.8 * in_turn.metrics.e2el_s.p99


def test_ties_go_round_and_counts_fall_with_departures() -> None:
    router = LeastOutstanding(requests_of([1], [1]), 3)
    assert [router.choose(index) for index in range(4)] == [0, 1, 2, 0]
    router.departed(1)
    assert router.choose(4) == 1


def test_a_prefix_goes_where_it_went_before_unless_that_server_is_too_far_ahead() -> None:
    hashes = [(1, 2), (9,), (1, 2, 3), *[(1, 2)] * (MOST_IMBALANCE + 3)]
    requests = replace(requests_of([600] * len(hashes), [5] * len(hashes)), prefix_hashes=hashes)
    router = PrefixAware(requests, 2)
    chosen = [router.choose(index) for index in range(len(hashes))]
    assert chosen[:3] == [0, 1, 0]
    assert 1 in chosen[3:], "a server that is far ahead is spared"
    assert chosen.index(1, 3) > 3, "but not at the first request"


def test_prefix_routing_finds_more_in_the_cache() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 24, 300)
    requests = replace(
        Requests.of(np.full(300, 400), np.full(300, 20)),
        prefix_hashes=[
            tuple(100 * int(group) + block for block in range(1, 6)) for group in groups
        ],
        prefix_hash_tokens=64,
    )
    arrivals = Arrivals(arrival_s=np.cumsum(rng.exponential(0.05, 300)))
    limits = engine_limits(blocks=200, enable_block_reuse=True)
    hits = {
        name: simulate(
            requests, arrivals, model_of(limits=limits), num_servers=4, router=router
        ).prefix_hit_fraction
        for name, router in ROUTERS.items()
    }
    assert hits["prefix_aware"] > 1.2 * hits["round_robin"]
