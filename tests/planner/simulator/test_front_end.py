"""The front end as one event loop: what comes together, what is long, what is streamed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from cost_models.frontend import FrontEndConstants
from planner.simulator import Arrivals, Requests, SimulationResult
from planner.simulator.front_end import FrontEnd
from tests.planner.simulator.stand_in import CLOCK, engine_limits, run

LOOP = FrontEndConstants(
    request_s=1e-3, prompt_token_s=1e-6, accepts_together=True, read_tokens=10_000
)


def passing_times(front_end: FrontEnd) -> dict[int, float]:
    """Return when each request passes, in order."""
    found: dict[int, float] = {}
    while (next_s := front_end.next_s) < math.inf:
        found |= dict.fromkeys(front_end.passed(next_s), next_s)
    return found


def test_a_burst_passes_when_the_work_for_all_of_it_is_done() -> None:
    front_end = FrontEnd(LOOP)
    for index in range(4):
        front_end.accept(0.0, index, 500)
    assert passing_times(front_end) == pytest.approx(dict.fromkeys(range(4), 6e-3))


def test_without_a_loop_they_pass_one_by_one() -> None:
    front_end = FrontEnd(FrontEndConstants(request_s=1e-3))
    for index in range(3):
        front_end.accept(0.0, index, 500)
    assert passing_times(front_end) == pytest.approx({0: 1e-3, 1: 2e-3, 2: 3e-3})


def test_a_long_body_is_read_in_turns_behind_those_that_came_with_it() -> None:
    front_end = FrontEnd(LOOP)
    for index, isl in enumerate((100, 25_000, 100)):
        front_end.accept(0.0, index, isl)
    assert list(passing_times(front_end)) == [0, 2, 1]


MERGING = FrontEndConstants(
    streamed_token_s=1e-4, streamed_chunk_s=5e-4, merged_streams=16, accepts_together=True
)
"""16 streams: 1.6 ms for the tokens of a step of some 4.5 ms, and 8 ms for its chunks."""


def served(clients: int, front_end: FrontEndConstants) -> SimulationResult:
    return run(
        Requests.of(np.full(clients, 64), np.full(clients, 400)),
        Arrivals(concurrency=clients),
        clock=CLOCK, limits=engine_limits(max_batch_size=32), front_end=front_end,
    )  # fmt: skip


def test_tokens_that_wait_leave_in_one_chunk_and_the_loop_keeps_up() -> None:
    """Turn = k steps = k * 1.6 ms + 8 ms, so a client sees k = 8 / (step - 1.6) steps at once."""
    alone = served(16, replace(MERGING, streamed_token_s=0.0, streamed_chunk_s=0.0))
    step_s = alone.metrics.tpot_s.mean
    merged = served(16, MERGING)
    assert merged.metrics.tpot_s.mean == pytest.approx(step_s, rel=0.02)
    at_once = 8e-3 / (step_s - 1.6e-3)
    assert merged.metrics.itl_s.p50 == pytest.approx(at_once * step_s, rel=0.1)
    assert merged.metrics.itl_s.mean == pytest.approx(at_once * step_s, rel=0.1)


def test_of_more_streams_than_are_merged_every_token_is_a_chunk() -> None:
    result = served(17, MERGING)
    assert result.metrics.tpot_s.mean == pytest.approx(17 * 6e-4, rel=0.05)
    assert result.metrics.itl_s.p50 == pytest.approx(17 * 6e-4, rel=0.05)


def test_a_loop_that_keeps_up_merges_nothing() -> None:
    merged = served(8, replace(MERGING, streamed_chunk_s=1e-4))
    apart = served(8, replace(MERGING, streamed_chunk_s=1e-4, merged_streams=0))
    assert merged.metrics.itl_s.p50 == pytest.approx(apart.metrics.itl_s.p50)
    assert merged.metrics.tpot_s.mean == pytest.approx(apart.metrics.tpot_s.mean)


def test_a_saturated_loop_sets_the_pace_that_clients_see() -> None:
    """Sixteen streams of 2 ms each make 32 ms of work for a step of a few milliseconds."""
    constants = FrontEndConstants(streamed_token_s=2e-3, accepts_together=True)
    requests = Requests.of(np.full(16, 64), np.full(16, 100))
    result = run(
        requests, Arrivals(concurrency=16), clock=CLOCK, limits=engine_limits(), front_end=constants
    )
    assert result.metrics.tpot_s.mean == pytest.approx(0.032, rel=0.05)
    assert result.metrics.itl_s.p50 == pytest.approx(0.032, rel=0.05)
