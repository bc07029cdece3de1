"""What holds for every workload and every engine: both modes agree, nothing is lost."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cost_models.frontend import FrontEndConstants
from planner.simulator import Arrivals, EngineLimits, Requests, SimulationResult
from planner.simulator.capacity import POLICIES
from planner.simulator.chunking import EqualProgress, FirstComeChunks, WholePrompts
from planner.simulator.engine import Engine
from planner.simulator.queue_order import (
    FirstComeFirstServed,
    LongestPrefixMatch,
    PriorityWithAgeing,
    ShortestJobFirst,
)
from planner.simulator.recorder import RequestRecorder
from planner.simulator.server import SingleServer
from tests.planner.simulator.stand_in import (
    CLOCK,
    SLOW_LAUNCH_CLOCK,
    engine_limits,
    run,
)

ORDERS = (
    FirstComeFirstServed(),
    ShortestJobFirst(),
    PriorityWithAgeing(0.05),
    LongestPrefixMatch(),
)
CHUNKINGS = (WholePrompts(), FirstComeChunks(16), FirstComeChunks(1), EqualProgress(16))


@st.composite
def workloads(draw: st.DrawFn) -> tuple[Requests, Arrivals]:
    count = draw(st.integers(1, 30))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    isl = rng.integers(1, draw(st.sampled_from([20, 200, 900])), count)
    osl = rng.integers(1, draw(st.sampled_from([3, 40, 150])), count)
    requests = replace(
        Requests.of(isl, osl, max_output_tokens=draw(st.sampled_from([0, 60]))),
        priority=rng.integers(0, 3, count),
        prefix_hash_tokens=32,
        prefix_tail_tokens=draw(st.sampled_from([0, 5])),
    ).with_predictor(rng, log_sd=0.5)
    if draw(st.booleans()):
        hashes = [_prefix(rng, int(tokens)) for tokens in isl]
        requests = replace(requests, prefix_hashes=hashes)
    if draw(st.booleans()):
        return requests, Arrivals(concurrency=draw(st.integers(1, 12)))
    gaps = rng.exponential(draw(st.sampled_from([0.0, 0.002, 0.05, 1.0])), count)
    return requests, Arrivals(arrival_s=np.cumsum(gaps))


def _prefix(rng: np.random.Generator, isl: int) -> list[int]:
    """One of three conversations, as far as the prompt goes, then a tail of its own."""
    conversation = int(rng.integers(0, 3))
    shared = int(rng.integers(0, 8))
    own = 1000 + int(rng.integers(0, 10**9))
    return [conversation * 100 + i if i < shared else own + i for i in range(-(-isl // 32))]


@st.composite
def engines(draw: st.DrawFn) -> EngineLimits:
    return engine_limits(
        blocks=draw(st.sampled_from([70, 100, 400, 10_000])),
        host_blocks=draw(st.sampled_from([0, 40])),
        onboard_block_s=1e-4,
        enable_partial_reuse=draw(st.booleans()),
        max_batch_size=draw(st.integers(1, 16)),
        max_num_tokens=draw(st.sampled_from([128, 1024])),
        capacity=POLICIES[draw(st.sampled_from(sorted(POLICIES)))](),
        order=draw(st.sampled_from(ORDERS)),
        chunking=draw(st.sampled_from(CHUNKINGS)),
        overlap=draw(st.booleans()),
        enable_block_reuse=draw(st.booleans()),
    )


front_ends = st.sampled_from(
    [
        FrontEndConstants(),
        FrontEndConstants(request_s=0.003, prompt_token_s=2e-6, active_stream_s=2e-4),
        FrontEndConstants(request_s=0.01, streamed_token_s=8e-4, first_token_s=1e-3),
        FrontEndConstants(slot_lag=1, steps_in_flight=1),
        FrontEndConstants(
            request_s=2e-3,
            prompt_token_s=5e-6,
            active_stream_s=1e-4,
            streamed_token_s=3e-4,
            accepts_together=True,
            read_tokens=64,
        ),
        FrontEndConstants(
            streamed_token_s=2e-4, streamed_chunk_s=6e-4, merged_streams=8, accepts_together=True
        ),
    ]
)
clocks = st.sampled_from([CLOCK, SLOW_LAUNCH_CLOCK])
thorough = settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow])


@thorough
@given(workloads(), engines(), front_ends, clocks)
def test_skipping_steps_changes_nothing(workload, limits, front_end, clock) -> None:  # type: ignore[no-untyped-def]
    requests, arrivals = workload
    fast, exact = (
        run(requests, arrivals, clock=clock, limits=limits, front_end=front_end, exact=exact)
        for exact in (False, True)
    )
    for name in ("arrival_s", "started_s", "first_token_s", "last_token_s"):
        np.testing.assert_allclose(
            getattr(fast.requests, name), getattr(exact.requests, name), rtol=1e-9, atol=1e-9
        )
    np.testing.assert_array_equal(fast.requests.preemptions, exact.requests.preemptions)
    np.testing.assert_array_equal(fast.requests.refused, exact.requests.refused)
    assert fast.num_steps == exact.num_steps
    # How many steps a client sees at once is counted over several steps only.
    if fast.served.size and not front_end.merged_streams:
        assert fast.metrics.itl_s.mean == pytest.approx(
            exact.metrics.itl_s.mean, rel=1e-5, nan_ok=True
        )


@thorough
@given(workloads(), engines(), front_ends, clocks)
def test_every_request_is_served_once_and_in_full(workload, limits, front_end, clock) -> None:  # type: ignore[no-untyped-def]
    requests, arrivals = workload
    result = run(requests, arrivals, clock=clock, limits=limits, front_end=front_end)
    columns = result.requests
    served = ~columns.refused
    assert np.isfinite(columns.last_token_s[served]).all()
    assert np.isnan(columns.last_token_s[~served]).all()
    assert (columns.arrival_s[served] <= columns.started_s[served]).all()
    assert (columns.started_s[served] < columns.first_token_s[served]).all()
    assert (columns.first_token_s[served] <= columns.last_token_s[served]).all()
    assert _tokens_made(result) == int(requests.osl[served].sum())


def _tokens_made(result: SimulationResult) -> int:
    """Decoded tokens, and one for each prompt that was computed (again after each pause)."""
    log, columns = result.engines[0].log, result.requests
    decoded = int((log.decoding.astype(int) * log.steps).sum())
    resumed_while_decoding = len(result.pauses_s)
    return decoded + int((~columns.refused).sum()) + resumed_while_decoding


@thorough
@given(workloads(), engines(), clocks)
def test_blocks_are_conserved_at_every_step(workload, limits, clock) -> None:  # type: ignore[no-untyped-def]
    requests, arrivals = workload
    results, constants = RequestRecorder(len(requests)), FrontEndConstants()
    engine = Engine(requests, results, clock=clock, limits=limits, constants=constants)
    source = arrivals.source(len(requests))
    server = SingleServer(engine, source, results, constants, exact=True)
    total = engine.kv.pool.unnumbered_free
    while server.next_s < math.inf:
        server.advance()
        _check_blocks(engine, total)
    cached = engine.kv.cache.cached_blocks if engine.kv.cache else 0
    assert engine.kv.pool.used == engine.kv.pool.reserved == 0
    assert engine.kv.pool.unnumbered_free + cached == total


def _check_blocks(engine: Engine, total: int) -> None:
    """Each physical block is free, in the cache, or in the table of one sequence."""
    kv, cache = engine.kv, engine.kv.cache
    held = [*engine._started, *(request for _, request in engine._leaving)]
    size = cache.blocks_per_hash if cache else 0
    private = [block for request in held for block in request.table[request.pinned * size :]]
    cached = cache.cached_blocks if cache else 0
    assert len(private) == len(set(private))
    assert len(private) + cached + kv.pool.unnumbered_free == total
    assert kv.pool.used + cached <= total
    assert kv.pool.used >= len(private)
    if cache is not None:
        assert cache.pinned <= cached


@thorough
@given(workloads(), engines(), front_ends, clocks)
def test_limits_hold_in_every_step(workload, limits, front_end, clock) -> None:  # type: ignore[no-untyped-def]
    requests, arrivals = workload
    result = run(requests, arrivals, clock=clock, limits=limits, front_end=front_end)
    log = result.engines[0].log
    assert (log.decoding + log.prompts <= limits.max_batch_size).all()
    resumed = bool(result.requests.preemptions.any()) and not limits.chunks
    if not resumed:
        assert (log.decoding + log.prompt_tokens <= limits.max_num_tokens).all()
    assert (log.end_s > log.start_s).all()
    assert (log.start_s[1:] >= log.end_s[:-1] - 1e-12).all()


@thorough
@given(workloads(), engines(), front_ends)
def test_little_s_law(workload, limits, front_end) -> None:  # type: ignore[no-untyped-def]
    """The time integral of requests present equals the sum of their latencies."""
    requests, arrivals = workload
    result = run(requests, arrivals, limits=limits, front_end=front_end)
    columns = result.requests
    rows = np.flatnonzero(~columns.refused)
    if not rows.size:
        return
    events = np.concatenate([columns.arrival_s[rows], columns.last_token_s[rows]])
    change = np.concatenate([np.ones(rows.size), -np.ones(rows.size)])
    order = np.lexsort((change, events))
    present = np.cumsum(change[order])[:-1]
    integral = float((present * np.diff(events[order])).sum())
    assert integral == pytest.approx(result.times.e2el_s.sum(), rel=1e-9, abs=1e-9)
    assert (present >= 0).all()
    if arrivals.arrival_s is None:
        assert present.max() <= arrivals.concurrency


@thorough
@given(workloads(), engines())
def test_the_engine_never_idles_while_it_has_work(workload, limits) -> None:  # type: ignore[no-untyped-def]
    """Between two steps the GPU rests only when nothing that it may see waits or runs."""
    requests, arrivals = workload
    result = run(requests, arrivals, limits=limits)
    log, columns = result.engines[0].log, result.requests
    for row in np.flatnonzero(log.start_s[1:] > log.end_s[:-1] + 1e-12):
        end_s, start_s = log.end_s[row], log.start_s[row + 1]
        present = (columns.arrival_s < end_s - 1e-12) & (columns.last_token_s > start_s + 1e-12)
        assert not present.any()


def test_same_input_same_bytes() -> None:
    rng = np.random.default_rng(1)
    requests = Requests.of(rng.integers(1, 900, 200), rng.integers(1, 90, 200))
    arrivals = Arrivals(arrival_s=np.cumsum(rng.exponential(0.01, 200)))
    first, second = (run(requests, arrivals) for _ in range(2))
    assert first.requests.last_token_s.tobytes() == second.requests.last_token_s.tobytes()
    assert first.engines[0].log.start_s.tobytes() == second.engines[0].log.start_s.tobytes()
    assert first.metrics == second.metrics
