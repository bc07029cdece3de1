"""The front end as one event loop: what comes together, what is long, what is streamed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cost_models.frontend import FrontEndConstants
from planner.simulator import Arrivals, Requests
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


def test_a_saturated_loop_sets_the_pace_that_clients_see() -> None:
    """Sixteen streams of 2 ms each make 32 ms of work for a step of a few milliseconds."""
    constants = FrontEndConstants(streamed_token_s=2e-3, accepts_together=True)
    requests = Requests.of(np.full(16, 64), np.full(16, 100))
    result = run(
        requests, Arrivals(concurrency=16), clock=CLOCK, limits=engine_limits(), front_end=constants
    )
    assert result.metrics.tpot_s.mean == pytest.approx(0.032, rel=0.05)
    assert result.metrics.itl_s.p50 == pytest.approx(0.032, rel=0.05)
