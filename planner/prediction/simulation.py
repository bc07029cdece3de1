"""Runs a configuration through the simulator: whose requests, on which engines, what came out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cost_models.acceptance import Acceptance
from cost_models.deployment import Deployment
from cost_models.engine import EngineConfig
from cost_models.frontend import FrontEndConstants
from cost_models.memory import MemoryPlan
from cost_models.metrics import PERCENTILES, LatencyLimits
from cost_models.speculation import AnyStep, Speculation, SpeculativeStep
from cost_models.step import StepBatch
from cost_models.step_constants import LAUNCH_CONSTANTS, StepConstants
from planner.prediction.evaluator import Evaluator
from planner.simulator import (
    EngineLimits,
    Requests,
    ServerModel,
    SimulationResult,
    StepClock,
    simulate,
)
from planner.simulator.router import ROUTERS
from planner.simulator.speculative_clock import SpeculativeClock
from planner.workloads.demand import Demand, lasting
from planner.workloads.load import ArrivalMode, Load

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


FIRST_WAVE_SHORTEST = 0.5
"""Shortest first output, as a share of the asked one, of clients that fall out of step."""

SPECULATION_SEED = 20
"""Of the draws of accepted drafts: the same for all configurations, so that they compare."""


LOGGED_ROWS = 300
"""Rows of a step log that are priced by operator."""

GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def servers_alike(deployment: Deployment, demand: Demand) -> int:
    """Return for how many servers one of them can stand: those that a static router feeds."""
    is_static = ROUTERS[deployment.router].is_static
    alike = is_static and demand.protocol is ArrivalMode.OPEN_LOOP and demand.has_steady_state
    return deployment.num_servers if alike else 1


def simulate_deployment(
    evaluator: Evaluator,
    deployment: Deployment,
    memory: MemoryPlan,
    demand: Demand,
    *,
    residence_s: float = 0.0,
    whole_fleet: bool = True,
) -> SimulationResult:
    """Serve a demand with every server of a deployment, or with one that stands for all.

    Args:
        evaluator: Model, GPU and calibration.
        deployment: What serves.
        memory: How its GPUs divide their memory; one row, and it fits.
        demand: What is asked of the whole deployment.
        residence_s: How long a request stays, roughly; a service of several servers is simulated
            for a multiple of that.
        whole_fleet: Simulate all servers, also those that are alike.

    Raises:
        SimulationStalledError: Requests would wait for ever.
    """
    alike = servers_alike(deployment, demand)
    if alike == 1:
        return _simulated(evaluator, deployment, memory, demand)
    if whole_fleet:
        return _simulated(evaluator, deployment, memory, lasting(demand, residence_s))
    one = deployment.with_knobs(num_servers=1)
    share = lasting(demand, residence_s, fewest=alike * len(demand)).every(alike)
    return replace(_simulated(evaluator, one, memory, share), stands_for=alike)


def _simulated(
    evaluator: Evaluator, deployment: Deployment, memory: MemoryPlan, demand: Demand
) -> SimulationResult:
    """Serve a demand with every server of a deployment."""
    config = deployment.config
    front_end = evaluator.front_end(config)
    demand = asked = _reusing_prefix(demand, config)
    # Luck with drafts sets requests apart by itself.
    if not config.speculates and _drifts_apart(demand, evaluator.load, front_end):
        demand = replace(demand, requests=out_of_step(demand.requests, demand.concurrency))
    limits = _limits(evaluator, deployment, memory, clients=demand.concurrency)
    speculation = evaluator.speculation(config)
    if speculation:
        demand = asked = _cut(demand, limits.max_seq_len)
        demand = _in_steps(demand, speculation)
        limits = _reaching(limits, demand.requests)
    clock = _clock(evaluator, config, max_seq_len=limits.max_seq_len)
    server = ServerModel(
        clock=clock,
        limits=limits,
        front_end=front_end,
        num_instances=config.num_instances,
        expert_ranks=config.attention_dp_ranks if config.enable_attention_dp else 0,
    )
    result = simulate(
        demand.requests,
        demand.arrivals,
        server,
        num_servers=deployment.num_servers,
        router=ROUTERS[deployment.router],
    )
    if speculation:
        tokens = speculation.tokens_per_step
        result = result.of_speculation(asked.requests.osl, tokens_per_step=tokens)
    return result.in_steady_state() if demand.has_steady_state else result


def _cut(demand: Demand, max_seq_len: int) -> Demand:
    """End outputs where the engine does."""
    requests = demand.requests
    osl = np.minimum(requests.osl, np.maximum(max_seq_len - requests.isl, 1))
    return replace(demand, requests=replace(requests, osl=osl))


def _in_steps(demand: Demand, speculation: Speculation) -> Demand:
    """Give each request as many tokens as its drawn number of steps yields on average.

    The simulation counts steps of one token. A request that was lucky with its drafts takes
    fewer iterations than others of its length, so there it has a shorter output.
    """
    requests = demand.requests
    rng = np.random.default_rng(SPECULATION_SEED)
    steps = speculation.acceptance.steps_for(requests.osl - 1, speculation.max_draft_len, rng)
    osl = 1 + np.rint(steps * speculation.tokens_per_step).astype(np.int64)
    longest = np.maximum(requests.max_tokens, osl)
    return replace(demand, requests=replace(requests, osl=osl, max_tokens=longest))


def _reaching(limits: EngineLimits, requests: Requests) -> EngineLimits:
    """Return limits under which no drawn output is cut: the real ones were before."""
    accepted = requests.isl < limits.max_seq_len
    ends = (requests.isl + requests.osl)[accepted]
    return replace(limits, max_seq_len=max(limits.max_seq_len, int(ends.max(initial=0))))


_ClockKey = tuple[int, int, int, str, EngineConfig, int, Acceptance | None]
_clocks: dict[_ClockKey, tuple[StepClock, Evaluator]] = {}
"""Memo of `_clock`; it holds the evaluators, so that identities stay theirs."""

_launched: dict[_ClockKey, tuple[StepClock, Evaluator]] = {}
"""The same by what clocks are but for launches: most of their tables do not hang on these."""

MOST_CLOCKS = 64


def _clock(evaluator: Evaluator, config: EngineConfig, *, max_seq_len: int) -> StepClock:
    """Return the step costs of an engine; runs of one server, and fits, share their tables."""
    key = _clock_key(evaluator, config, max_seq_len, evaluator.calibration.step)
    if key not in _clocks:
        _remember(_clocks, key, _new_clock(evaluator, config, max_seq_len=max_seq_len), evaluator)
    return _clocks[key][0]


def _new_clock(evaluator: Evaluator, config: EngineConfig, *, max_seq_len: int) -> StepClock:
    model = evaluator.step_model(config)
    limits = {
        "max_batch_size": config.max_batch_size,
        "max_num_tokens": config.max_num_tokens,
        "max_seq_len": max_seq_len,
    }
    if isinstance(model, SpeculativeStep):
        return SpeculativeClock(model, **limits)
    if not _replays_all_decoding(evaluator, config):
        return StepClock(model, **limits)
    step = replace(evaluator.calibration.step, **NO_LAUNCHES)
    key = _clock_key(evaluator, config, max_seq_len, step)
    if key in _launched:
        return _launched[key][0].relaunched(model)
    clock = StepClock(model, **limits)
    _remember(_launched, key, clock, evaluator)
    return clock


def _clock_key(
    evaluator: Evaluator, config: EngineConfig, max_seq_len: int, step: StepConstants
) -> _ClockKey:
    operators = evaluator.calibration.operators
    identities = (id(evaluator.model), id(evaluator.gpu), id(operators))
    return (*identities, repr(step), config, max_seq_len, evaluator.acceptance(config))


def _remember(
    memo: dict[_ClockKey, tuple[StepClock, Evaluator]],
    key: _ClockKey,
    clock: StepClock,
    evaluator: Evaluator,
) -> None:
    if len(memo) >= MOST_CLOCKS:
        memo.clear()
    memo[key] = (clock, evaluator)


NO_LAUNCHES: Mapping[str, Any] = dict.fromkeys(LAUNCH_CONSTANTS, 0)


def _replays_all_decoding(evaluator: Evaluator, config: EngineConfig) -> bool:
    """Whether every step that only decodes is replayed as a whole, whatever launches take."""
    sizes = evaluator.calibration.traits.captured_batch_sizes(config)
    return bool(sizes) and sizes[-1] >= config.max_batch_size


def _limits(
    evaluator: Evaluator, deployment: Deployment, memory: MemoryPlan, *, clients: int
) -> EngineLimits:
    """Return the limits of one scheduler instance.

    Clients of a closed loop who have one instance to themselves bound its batch.
    """
    config = deployment.config
    limits = EngineLimits.of(
        config,
        memory,
        max_seq_len=evaluator.model.max_position_embeddings,
        engine=evaluator.calibration.traits,
        host_link_bytes_per_s=evaluator.gpu.host_link_bytes_per_s,
    )
    speculation = evaluator.speculation(config)
    if speculation:
        limits = replace(limits, tokens_per_decode=speculation.rows_per_sequence)
    if not clients or config.num_instances * deployment.num_servers > 1:
        return limits
    return replace(limits, max_batch_size=min(limits.max_batch_size, clients))


def _reusing_prefix(demand: Demand, config: EngineConfig) -> Demand:
    """Name the full blocks of the prefix that all long enough prompts share."""
    blocks = demand.shared_prefix_tokens // config.tokens_per_block
    if not blocks or not config.enable_block_reuse or demand.requests.prefix_hashes is not None:
        return demand
    prefix_tokens = blocks * config.tokens_per_block
    hashes = [(0,) if isl > prefix_tokens else () for isl in demand.requests.isl.tolist()]
    requests = replace(
        demand.requests,
        prefix_hashes=hashes,
        prefix_hash_tokens=prefix_tokens,
        prefix_tail_tokens=demand.shared_prefix_tokens - prefix_tokens,
    )
    return replace(demand, requests=requests)


def _drifts_apart(demand: Demand, load: Load, front_end: FrontEndConstants) -> bool:
    """Whether equal requests of a closed loop would stay together here but not in reality."""
    closed = demand.protocol is ArrivalMode.CLOSED_LOOP and load.is_lockstep
    return closed and not front_end.keeps_waves


def out_of_step(requests: Requests, concurrency: int) -> Requests:
    """Shorten each client's first output by a share of its own, so that waves fall apart.

    The shares are spread evenly (multiples of the golden ratio), without chance.
    """
    wave = np.arange(min(concurrency, len(requests)))
    share = FIRST_WAVE_SHORTEST + (1 - FIRST_WAVE_SHORTEST) * (wave * GOLDEN_RATIO % 1.0)
    osl = requests.osl.copy()
    osl[wave] = np.maximum(np.rint(osl[wave] * share), 1).astype(np.int64)
    return replace(requests, osl=osl)


def simulated_metrics(
    result: SimulationResult, demand: Demand, limits: LatencyLimits
) -> dict[str, float]:
    """Name a simulation's metrics as a measured run does, latencies in milliseconds.

    A closed loop without an end has no last requests that run alone: its rates follow from
    its latencies by Little's law.
    """
    found = result.metrics
    values = {
        f"{name}_ms.{statistic}": 1e3 * getattr(getattr(found, f"{name}_s"), statistic)
        for name in ("ttft", "tpot", "itl", "e2el")
        for statistic in ("mean", *PERCENTILES)
    }
    values["request_per_s"] = found.request_per_s * result.stands_for
    values["output_tok_per_s"] = found.output_tok_per_s * result.stands_for
    if demand.is_endless:
        osl = float(demand.requests.osl.mean())
        latency_s = found.ttft_s.mean + (osl - 1) * found.tpot_s.mean
        values["request_per_s"] = demand.concurrency / latency_s
        values["output_tok_per_s"] = osl * values["request_per_s"]
    values["goodput_request_per_s"] = result.goodput_per_s(limits) * result.stands_for
    return values


def request_limits(slo: Mapping[str, float]) -> LatencyLimits:
    """Return what each single request must keep: the tightest limit of each metric."""
    tightest = {
        metric: min(
            (limit for name, limit in slo.items() if name.split(".")[0] == f"{metric}_ms"),
            default=math.inf,
        )
        for metric in ("ttft", "tpot", "e2el")
    }
    return LatencyLimits(**{f"{metric}_s": limit / 1e3 for metric, limit in tightest.items()})


def operator_seconds(result: SimulationResult, step: AnyStep) -> dict[str, float]:
    """Return the time of all engines by operator family, priced anew from their step logs.

    Long logs are sampled evenly; what a chunk has already in the cache is not logged, so
    prefill attention of chunked prompts comes out low.
    """
    totals: dict[str, float] = {}
    for log in (trace.log for trace in result.engines if len(trace.log.steps)):
        rows = np.unique(np.linspace(0, len(log.steps) - 1, LOGGED_ROWS).astype(np.int64))
        steps, decoding = log.steps[rows], log.decoding[rows].astype(np.float64)
        grown = log.context_tokens[rows] + decoding * (steps - 1) / 2
        cost = step.cost(
            StepBatch(
                decode_sequences=decoding,
                decode_kv_len=grown / np.maximum(decoding, 1.0),
                prefill_sequences=log.prompts[rows],
                prefill_tokens=log.prompt_tokens[rows],
            )
        )
        busy_s = log.end_s - log.start_s
        weight = steps * (busy_s.sum() / busy_s[rows].sum())
        for family, seconds in cost.by_family.items():
            totals[family] = totals.get(family, 0.0) + float(np.sum(weight * seconds))
    return totals


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationSummary:
    """What a prediction tells of the simulation behind it."""

    num_requests: int
    num_refused: int
    num_steps: int
    num_preemptions: int
    warm_up_requests: int
    wall_s: float
    kv_mean_fraction: float
    kv_max_fraction: float
    kv_waste_fraction: float
    """Of the held block space; NaN where sequences share blocks."""
    kv_contiguous_saving_fraction: float
    """Memory that paging saves against max_seq_len tokens for each running sequence."""
    prefix_hit_fraction: float
    queue_ms_mean: float
    steps_by_kind: Mapping[str, int]
    relative_errors: Mapping[str, float]
    """Standard error of each percentile over its value, by metric name; from the bootstrap."""

    @classmethod
    def of(cls, result: SimulationResult) -> SimulationSummary:
        """Return the summary of a result."""
        usage = result.kv_usage()
        queue_s = result.queue_s
        return cls(
            num_requests=result.num_requests,
            num_refused=result.num_refused,
            num_steps=result.num_steps,
            num_preemptions=int(result.requests.preemptions.sum()),
            warm_up_requests=result.warm_up_requests,
            wall_s=result.wall_s,
            kv_mean_fraction=usage.mean_fraction,
            kv_max_fraction=usage.max_fraction,
            kv_waste_fraction=usage.waste_fraction,
            kv_contiguous_saving_fraction=usage.contiguous_saving_fraction,
            prefix_hit_fraction=result.prefix_hit_fraction,
            queue_ms_mean=1e3 * float(queue_s.mean()) if queue_s.size else 0.0,
            steps_by_kind=result.steps_by_kind(),
            relative_errors=percentile_errors(result),
        )

    def to_json(self) -> dict[str, Any]:
        """Return the documented JSON form."""
        return {
            "num_requests": self.num_requests,
            "num_refused": self.num_refused,
            "num_steps": self.num_steps,
            "num_preemptions": self.num_preemptions,
            "warm_up_requests": self.warm_up_requests,
            "wall_s": round(self.wall_s, 4),
            "kv_cache_used": {
                "mean_fraction": round(self.kv_mean_fraction, 4),
                "max_fraction": round(self.kv_max_fraction, 4),
                "waste_fraction": _rounded(self.kv_waste_fraction),
                "contiguous_saving_fraction": round(self.kv_contiguous_saving_fraction, 4),
            },
            "prefix_hit_fraction": round(self.prefix_hit_fraction, 4),
            "queue_ms_mean": round(self.queue_ms_mean, 3),
            "steps_by_kind": dict(self.steps_by_kind),
            "standard_error_fraction": {
                name: round(error, 4) for name, error in self.relative_errors.items()
            },
        }


def _rounded(fraction: float) -> float | None:
    return round(fraction, 4) if math.isfinite(fraction) else None


def percentile_errors(result: SimulationResult) -> dict[str, float]:
    """Return the standard error of each percentile over its value, by metric name."""
    found = {}
    for metric, errors in result.percentile_errors().items():
        distribution = getattr(result.metrics, metric)
        for statistic, error_s in errors.items():
            value_s = getattr(distribution, statistic)
            if math.isfinite(error_s) and value_s > 0:
                found[f"{metric.removesuffix('_s')}_ms.{statistic}"] = error_s / value_s
    return found
