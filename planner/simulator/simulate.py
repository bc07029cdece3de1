"""One call: requests and their arrivals in, a simulated run out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from cost_models.frontend import FrontEndConstants
from planner.simulator.arrivals import ArrivalSource, ClosedLoop, OpenLoop
from planner.simulator.clock import StepClock
from planner.simulator.engine import Engine
from planner.simulator.fleet import Fleet
from planner.simulator.limits import EngineLimits
from planner.simulator.lockstep import LockstepServer
from planner.simulator.recorder import RequestRecorder
from planner.simulator.requests import Requests
from planner.simulator.results import EngineTrace, RequestColumns, SimulationResult
from planner.simulator.router import RoundRobin, Router, RouterFactory
from planner.simulator.server import Server, SingleServer

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


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServerModel:
    """What one server of a deployment is, to the simulator."""

    clock: StepClock
    """Step costs of each scheduler instance."""
    limits: EngineLimits
    """Batch, tokens, KV blocks and policies of each scheduler instance."""
    front_end: FrontEndConstants
    """What stands between the clients and the step loop: one for all instances."""
    num_instances: int = 1
    """Scheduler instances that keep step: attention-DP ranks x pipeline micro-batches."""
    expert_ranks: int = 0
    """Attention-DP ranks that share the experts, those without a request among them; 0 without."""


def simulate(
    requests: Requests,
    arrivals: Arrivals,
    server: ServerModel,
    *,
    num_servers: int = 1,
    router: RouterFactory = RoundRobin,
    exact: bool = False,
) -> SimulationResult:
    """Run requests through the servers of a deployment, request by request.

    Args:
        requests: Lengths, and what routers and schedulers know of them.
        arrivals: When clients send them.
        server: What each server is.
        num_servers: Like servers behind the router.
        router: How requests are spread over them (`planner.simulator.router`).
        exact: Take every step singly: slow, and the same result to rounding.

    Raises:
        SimulationStalledError: Requests would wait for ever.
    """
    start_s = time.perf_counter()
    results = RequestRecorder(len(requests))
    make = partial(_server, requests, results, server, exact)
    servers = _run(requests, arrivals, make, num_servers, router(requests, num_servers))
    wall_s = time.perf_counter() - start_s
    return SimulationResult(
        requests=_columns(requests, results, server.limits),
        engines=tuple(_trace(engine) for one in servers for engine in one.engines),
        pauses_s=np.array(results.pauses_s),
        front_end=server.front_end,
        wall_s=wall_s,
    )


def _run(
    requests: Requests,
    arrivals: Arrivals,
    make: Callable[[int, ArrivalSource], Server],
    num_servers: int,
    router: Router,
) -> list[Server]:
    """Serve every request; servers that nothing ties together run one after another."""
    if num_servers == 1:
        servers = [make(0, arrivals.source(len(requests)))]
    elif router.is_static and arrivals.arrival_s is not None:
        servers = _independent(arrivals.arrival_s, make, num_servers, router)
    else:
        fleet = Fleet(arrivals.source(len(requests)), router, make, num_servers)
        fleet.run()
        return list(fleet.servers)
    for server in servers:
        server.run()
    return servers


def _independent(
    arrival_s: FloatArray,
    make: Callable[[int, ArrivalSource], Server],
    num_servers: int,
    router: Router,
) -> list[Server]:
    """Return servers that each pull what a static router would submit to them."""
    chosen = np.array([router.choose(index) for index in range(len(arrival_s))], np.int64)
    own = [np.flatnonzero(chosen == number) for number in range(num_servers)]
    return [make(number, OpenLoop(arrival_s[rows], rows)) for number, rows in enumerate(own)]


def _server(
    requests: Requests,
    results: RequestRecorder,
    model: ServerModel,
    exact: bool,
    number: int,
    source: ArrivalSource,
) -> Server:
    engines = [
        Engine(
            requests,
            results,
            clock=model.clock,
            limits=model.limits,
            constants=model.front_end,
            number=number * model.num_instances + instance,
        )
        for instance in range(model.num_instances)
    ]
    if len(engines) == 1 and not model.expert_ranks:
        return SingleServer(engines[0], source, results, model.front_end, exact=exact)
    return LockstepServer(
        engines,
        source,
        results,
        model.front_end,
        expert_ranks=model.expert_ranks,
        exact=exact,
    )


def _columns(asked: Requests, found: RequestRecorder, limits: EngineLimits) -> RequestColumns:
    return RequestColumns(
        arrival_s=np.frombuffer(found.arrival_s),
        started_s=np.frombuffer(found.started_s),
        first_token_s=np.frombuffer(found.first_s),
        last_token_s=np.frombuffer(found.last_s),
        isl=asked.isl,
        osl=np.minimum(asked.osl, limits.max_seq_len - asked.isl),
        max_tokens=asked.max_tokens,
        preemptions=np.frombuffer(found.preemptions, np.int32),
        cached_tokens=np.frombuffer(found.cached_tokens, np.int32),
        refusal=np.frombuffer(found.refused, np.int8),
        served_by=np.frombuffer(found.served_by, np.int32),
    )


def _trace(engine: Engine) -> EngineTrace:
    return EngineTrace(
        log=engine.steps.log(),
        pool=engine.limits.pool,
        max_seq_len=engine.limits.max_seq_len,
        shares_prefixes=any(engine.results.cached_tokens),
    )
