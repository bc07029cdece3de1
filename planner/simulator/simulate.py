"""One call: requests and their arrivals in, a simulated run out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cost_models.frontend import FrontEndConstants
from planner.simulator.arrivals import ArrivalSource, ClosedLoop, OpenLoop
from planner.simulator.clock import StepClock
from planner.simulator.engine import Engine
from planner.simulator.limits import EngineLimits
from planner.simulator.lockstep import Lockstep
from planner.simulator.requests import Requests
from planner.simulator.results import EngineTrace, RequestColumns, SimulationResult

FloatArray = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrivals:
    """How the requests come: at given times, or from so many clients."""

    arrival_s: FloatArray | None = None
    """Ascending, one for each request: an open loop, or zeros for an offline burst."""
    concurrency: int = 0
    """Clients of a closed loop; used where no times are given."""

    def source(self, num_requests: int) -> ArrivalSource:
        """Return the source that gives the requests out."""
        if self.arrival_s is not None:
            return OpenLoop(self.arrival_s)
        return ClosedLoop(concurrency=self.concurrency, num_requests=num_requests)


def simulate(
    requests: Requests,
    arrivals: Arrivals,
    *,
    clock: StepClock,
    limits: EngineLimits,
    front_end: FrontEndConstants,
    exact: bool = False,
) -> SimulationResult:
    """Run requests through one engine, request by request.

    Args:
        requests: Lengths, and what the scheduler knows of them.
        arrivals: When clients send them.
        clock: Step costs of the engine.
        limits: Batch, tokens, KV blocks and policies of the engine.
        front_end: What stands between the clients and the step loop.
        exact: Take every step singly: slow, and the same result to rounding.
    """
    share = Share(requests, arrivals)
    (result,) = simulate_in_step(
        [share], clock=clock, limits=limits, front_end=front_end, exact=exact
    )
    return result


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one of several engines serves."""

    requests: Requests
    arrivals: Arrivals


def simulate_in_step(
    shares: Sequence[Share],
    *,
    clock: StepClock,
    limits: EngineLimits,
    front_end: FrontEndConstants,
    expert_ranks: int = 0,
    exact: bool = False,
) -> list[SimulationResult]:
    """Run requests through engines whose steps begin and end together.

    Args:
        shares: What each engine serves.
        clock: Step costs of each engine.
        limits: Batch, tokens, KV blocks and policies of each engine.
        front_end: What stands between the clients and each step loop.
        expert_ranks: Attention-DP ranks that share the experts, those without a request among
            them; 0 without attention DP.
        exact: Take every step singly: slow, and the same result to rounding.
    """
    start_s = time.perf_counter()
    engines = [
        Engine(
            share.requests,
            share.arrivals.source(len(share.requests)),
            clock=clock,
            limits=limits,
            constants=front_end,
            exact=exact,
        )
        for share in shares
    ]
    if len(engines) == 1 and not expert_ranks:
        engines[0].run()
    else:
        Lockstep(engines, expert_ranks=expert_ranks, exact=exact).run()
    wall_s = time.perf_counter() - start_s
    return [_result(engine, front_end, wall_s / len(engines)) for engine in engines]


def _result(engine: Engine, front_end: FrontEndConstants, wall_s: float) -> SimulationResult:
    return SimulationResult(
        requests=_columns(engine),
        engines=(_trace(engine),),
        front_end=front_end,
        wall_s=wall_s,
    )


def _columns(engine: Engine) -> RequestColumns:
    found, asked = engine.results, engine.requests
    longest = engine.limits.max_seq_len - asked.isl
    return RequestColumns(
        arrival_s=np.frombuffer(found.arrival_s),
        started_s=np.frombuffer(found.started_s),
        first_token_s=np.frombuffer(found.first_s),
        last_token_s=np.frombuffer(found.last_s),
        isl=asked.isl,
        osl=np.minimum(asked.osl, longest),
        preemptions=np.frombuffer(found.preemptions, np.int32),
        cached_tokens=np.frombuffer(found.cached_tokens, np.int32),
        refused=np.frombuffer(found.refused, np.int8).astype(bool),
    )


def _trace(engine: Engine) -> EngineTrace:
    return EngineTrace(
        log=engine.steps.log(),
        pauses_s=np.array(engine.results.pauses_s),
        pool=engine.limits.pool,
        max_seq_len=engine.limits.max_seq_len,
        shares_prefixes=any(engine.results.cached_tokens),
    )
